"""Every causal model can be evaluated and looked at, whether it can be folded or not."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Kvfold
from tests.toolbox import tiny

HEARD = ["gpt_neox", "opt", "deepseek_v3"]
# Numbers of a token in both layers' cache, in 16 bits.
CACHED = {
    "gpt_neox": 2 * 6 * 16,
    "opt": 2 * 6 * 16,
    "gptj": 2 * 6 * 16,
    "falcon": 2 * 1 * 16,
    "deepseek_v3": 2 * (16 + 8),
    "mamba": 0,
}
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    top = tmp_path_factory.mktemp("unfoldable")
    return {
        name: tiny.save_with_tokenizer(tiny.build(name, config), top / name)
        for name, config in tiny.UNFOLDABLE.items()
    }


@pytest.mark.parametrize("model_type", tiny.UNFOLDABLE)
def test_eval(model_type: str, kvfold: Kvfold, folders: dict[str, Path], text_file: Path) -> None:
    folder = folders[model_type]
    arguments = ["--text", text_file, "--context", 32, "--max-tokens", 128, "--json"]
    run = kvfold("eval", folder, folder, *arguments)
    assert run.code == 0, run.err
    found: Any = run.json()
    source, same = found
    assert source["perplexity"] > 1
    assert same["kl"] == 0
    assert source["kv_bytes_per_token"] == 2 * CACHED[model_type]


@pytest.mark.parametrize("model_type", HEARD)
def test_look(model_type: str, kvfold: Kvfold, folders: dict[str, Path], tmp_path: Path) -> None:
    run = kvfold("look", folders[model_type], "w3 w4 w5 w6", "--png", tmp_path / "maps.png")
    assert run.code == 0, run.err
    assert (tmp_path / "maps.png").stat().st_size > 1000


def test_plan_and_bench(kvfold: Kvfold, folders: dict[str, Path]) -> None:
    folder = folders["gpt_neox"]
    assert kvfold("plan", folder, "--gpu", "h100").code == 0
    arguments = ["--context", 16, "--rounds", 1, "--tokens", 1, "--working-set", "1M", "--json"]
    run = kvfold("bench", "model", folder, *arguments)
    assert run.code == 0, run.err
    rows: Any = run.json()
    assert rows[0]["case"]["num_kv_heads"] == 6


@pytest.mark.parametrize("model_type", ["falcon", "gptj"])
def test_attention_that_cannot_be_replaced_is_told_in_one_line(
    model_type: str, kvfold: Kvfold, folders: dict[str, Path]
) -> None:
    run = kvfold(
        "bench", "model", folders[model_type], "--context", 16, "--rounds", 3, "--tokens", 8
    )
    assert run.code == 2
    assert "takes no attention implementation" in run.err


@pytest.mark.parametrize("command", ["inspect", "convert"])
def test_only_folding_refuses(
    command: str, kvfold: Kvfold, folders: dict[str, Path], tmp_path: Path
) -> None:
    rest = [tmp_path / "out", "--kv-heads", 1] if command == "convert" else []
    run = kvfold(command, folders["gpt_neox"], *rest)
    assert run.code == 2
    assert "cannot be folded" in run.err


@pytest.mark.parametrize(
    ("model_type", "name", "message"),
    [
        ("gpt_neox", "gpt_neox.layers.1.mlp.dense_h_to_4h.weight", "missing from the weights"),
        ("deepseek_v3", EXPERT, f"{EXPERT} is missing"),
    ],
)
def test_missing_weights_are_told(
    model_type: str,
    name: str,
    message: str,
    kvfold: Kvfold,
    folders: dict[str, Path],
    text_file: Path,
    tmp_path: Path,
) -> None:
    """Nothing is filled with random numbers, whoever knows the architecture."""
    run = kvfold("eval", without(name, folders[model_type], tmp_path), "--text", text_file)
    assert run.code == 2
    assert message in run.err


def without(name: str, folder: Path, tmp_path: Path) -> Path:
    """A copy of a model's folder that lacks a tensor."""
    from safetensors.torch import load_file, save_file

    copy = tmp_path / "damaged"
    shutil.copytree(folder, copy)
    tensors = load_file(copy / "model.safetensors")
    del tensors[name]
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    return copy


def test_encoders_are_refused(kvfold: Kvfold, text_file: Path, tmp_path: Path) -> None:
    config = tiny.COMMON | {"is_decoder": False}
    folder = tiny.save_with_tokenizer(tiny.build("bert", config), tmp_path / "bert")
    run = kvfold("eval", folder, "--text", text_file, "--context", 32)
    assert run.code == 2
    assert "is an encoder" in run.err
