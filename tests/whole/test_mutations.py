"""Mutated files of models and records: every command reads them, or says in one line why not."""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import Kvfold
from tests.toolbox.damage import answered, damage, damaged

INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
RECORD: dict[str, Any] = {
    "command": "kvfold convert source OUT --kv-heads 2",
    "source": {"name": "source", "family": "llama"},
    "geometry": {
        "num_heads": 6,
        "num_kv_heads": {"source": 6, "folded": 2},
        "kv_bytes_per_token_16bit": {"source": 768, "folded": 256},
    },
    "method": "auto",
    "fit": "local",
    "calibration": {"tokens": 1024, "texts": ["a.txt"]},
    "warnings": ["built-in text"],
    "layers": [
        {
            "layer": layer,
            "captured_value": 0.9,
            "captured_key": 0.8,
            "stages": [{"stage": "refit", "error_before": 0.5, "error_after": 0.3}],
            "drift": 0.01,
        }
        for layer in range(2)
    ],
    "run": {"seconds": 1.5, "peak_memory_bytes": 1000},
}


def check(kvfold: Kvfold, folder: Path, *commands: tuple[Any, ...]) -> None:
    before = sorted(path.name for path in folder.parent.iterdir())
    for command in commands:
        run = answered(kvfold, command)
        assert not run.code or run.err.startswith("error: "), run.err
        assert sorted(path.name for path in folder.parent.iterdir()) == before


every = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def model(llama_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama_folder, tmp_path / "model"))


@pytest.fixture
def shards(sharded_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sharded_folder, tmp_path / "model"))


def commands(folder: Path) -> list[tuple[Any, ...]]:
    return [
        ("inspect", folder),
        ("plan", folder, "--gpu", "h100"),
        ("convert", folder, folder.parent / "out", "--kv-heads", 2, "--dry-run"),
    ]


@every
@given(how=damage)
def test_configs(kvfold: Kvfold, model: Path, how: tuple[str, Any, Any]) -> None:
    path, kept = model / "config.json", model / "kept"
    if not kept.exists():
        shutil.copy(path, kept)
    path.write_bytes(damaged(kept.read_bytes(), how))
    check(kvfold, model, *commands(model))


@every
@given(how=damage)
def test_indices(kvfold: Kvfold, shards: Path, how: tuple[str, Any, Any]) -> None:
    path, kept = shards / INDEX, shards / "kept"
    if not kept.exists():
        shutil.copy(path, kept)
    path.write_bytes(damaged(kept.read_bytes(), how))
    check(kvfold, shards, *commands(shards))


@every
@given(how=damage)
def test_headers(kvfold: Kvfold, model: Path, how: tuple[str, Any, Any]) -> None:
    path, kept = model / WEIGHTS, model / "kept"
    if not kept.exists():
        shutil.copy(path, kept)
    whole = kept.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header = damaged(whole[8 : 8 + length], how)
    path.write_bytes(struct.pack("<Q", len(header)) + header + whole[8 + length :])
    check(kvfold, model, *commands(model))


@every
@given(name=st.sampled_from(["tokenizer.json", "tokenizer_config.json"]), how=damage)
def test_tokenizers(
    kvfold: Kvfold, model: Path, text_file: Path, name: str, how: tuple[str, Any, Any]
) -> None:
    path, kept = model / name, model / f"kept-{name}"
    if not kept.exists():
        shutil.copy(path, kept)
    path.write_bytes(damaged(kept.read_bytes(), how))
    evaluation = ("--text", text_file, "--context", 64, "--max-tokens", 64)
    check(kvfold, model, ("eval", model, *evaluation))
    shutil.copy(kept, path)


@every
@given(how=damage)
def test_records(kvfold: Kvfold, tmp_path: Path, how: tuple[str, Any, Any]) -> None:
    run, page = tmp_path / "run", tmp_path / "page.html"
    run.mkdir(exist_ok=True)
    page.write_text("")
    text = json.dumps(RECORD).encode()
    (run / "kvfold.json").write_bytes(damaged(text, how))
    check(kvfold, run, ("report", run, "-o", page, "--force"))


@pytest.mark.parametrize("number", range(len(RECORD["layers"])))
@pytest.mark.parametrize("key", ["captured_value", "captured_key", "drift"])
def test_a_layer_may_lack_what_is_drawn(
    kvfold: Kvfold, tmp_path: Path, number: int, key: str
) -> None:
    record = json.loads(json.dumps(RECORD))
    record["layers"][number].pop(key, None)
    (tmp_path / "kvfold.json").write_text(json.dumps(record))
    answered(kvfold, ("report", tmp_path, "-o", tmp_path / "page.html"))
