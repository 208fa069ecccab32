"""Bad input: exit code 2, one line that says what is wrong, one hint, nothing left behind."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import Kvfold
from tests.toolbox.commands import complaint


@pytest.fixture
def broken(llama_folder: Path, sharded_folder: Path, tmp_path: Path) -> Callable[[str], Path]:
    def copy(kind: str = "single") -> Path:
        target = tmp_path / "broken"
        shutil.copytree(sharded_folder if kind == "sharded" else llama_folder, target)
        return target

    return copy


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("heads", "words"), [(4, "does not divide"), (12, "more than"), (0, "at least 1"), (-1, "-1")]
)
def test_kv_heads(
    kvfold: Kvfold, llama_folder: Path, tmp_path: Path, heads: int, words: str
) -> None:
    run = kvfold("convert", llama_folder, tmp_path / "out", "--kv-heads", heads)
    complaint(run, words, "1, 2, 3, 6")
    assert not list(tmp_path.iterdir())


def test_missing_source(kvfold: Kvfold, tmp_path: Path) -> None:
    complaint(kvfold("convert", "nowhere", tmp_path / "out", "--kv-heads", 2), "nowhere")


@pytest.mark.parametrize("command", ["inspect", "convert"])
def test_hub_name_offline(
    kvfold: Kvfold, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    more = (tmp_path / "out", "--kv-heads", 2) if command == "convert" else ()
    run = kvfold(command, "some-org/some-model-that-is-not-here", *more)
    complaint(run, "some-org/some-model", "hub")


def test_missing_shard(kvfold: Kvfold, broken: Callable[[str], Path]) -> None:
    folder = broken("sharded")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    complaint(kvfold("inspect", folder), shard.name, "missing")


@pytest.mark.parametrize("keep", [0.6, 0.0])
def test_truncated_shard(kvfold: Kvfold, broken: Callable[[str], Path], keep: float) -> None:
    folder = broken("sharded")
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[: int(shard.stat().st_size * keep)])
    complaint(kvfold("inspect", folder), shard.name)


def test_corrupt_header(kvfold: Kvfold, broken: Callable[[str], Path]) -> None:
    folder = broken("single")
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[20:40] = b"\xff" * 20
    path.write_bytes(data)
    complaint(kvfold("inspect", folder), "model.safetensors", "header")


def test_index_names_an_absent_tensor(kvfold: Kvfold, broken: Callable[[str], Path]) -> None:
    folder = broken("sharded")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.9.ghost"] = sorted(folder.glob("*.safetensors"))[0].name
    path.write_text(json.dumps(index))
    complaint(kvfold("inspect", folder), "model.layers.9.ghost")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.self_attn.v_proj.weight", "model.norm.weight"])
def test_nan_weights(
    kvfold: Kvfold, broken: Callable[[str], Path], tmp_path: Path, name: str, value: float
) -> None:
    folder = broken("single")
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[3] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    run = kvfold("convert", folder, tmp_path / "out", "--kv-heads", 2, "--no-calibration")
    complaint(run, name, "NaN")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 3},
        {"head_dim": 4},
        {"hidden_size": 64},
        {"num_hidden_layers": 3},
        {"num_hidden_layers": 1},
        {"num_attention_heads": "six"},
    ],
)
def test_config_contradicts_tensors(
    kvfold: Kvfold, broken: Callable[[str], Path], changes: dict[str, object]
) -> None:
    folder = broken("single")
    edit_config(folder, **changes)
    complaint(kvfold("inspect", folder))


def test_config_is_not_json(kvfold: Kvfold, broken: Callable[[str], Path]) -> None:
    folder = broken("single")
    (folder / "config.json").write_text("{")
    run = kvfold("inspect", folder)
    assert run.code == 2
    assert "config.json" in run.err


def test_unknown_family(kvfold: Kvfold, broken: Callable[[str], Path]) -> None:
    folder = broken("single")
    edit_config(folder, model_type="llamma")
    complaint(kvfold("inspect", folder), "llamma", "did you mean llama")


def test_family_without_kv_heads(kvfold: Kvfold, broken: Callable[[str], Path]) -> None:
    folder = broken("single")
    edit_config(folder, model_type="gpt_neox")
    complaint(kvfold("inspect", folder), "gpt_neox", "KV-head")


def test_quantized_source(kvfold: Kvfold, broken: Callable[[str], Path]) -> None:
    folder = broken("single")
    edit_config(folder, quantization_config={"quant_method": "gptq"})
    complaint(kvfold("inspect", folder), "gptq", "dequantize")


def test_integer_weights(kvfold: Kvfold, broken: Callable[[str], Path]) -> None:
    folder = broken("single")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj.weight"
    tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    complaint(kvfold("inspect", folder), name, "dequantize")


def test_pickled_weights(kvfold: Kvfold, broken: Callable[[str], Path]) -> None:
    folder = broken("single")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    complaint(kvfold("inspect", folder), "pickled", "safetensors")


def test_out_exists(kvfold: Kvfold, llama_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    run = kvfold("convert", llama_folder, tmp_path / "out", "--kv-heads", 2)
    complaint(run, "exists", "--force")


def test_out_inside_source(kvfold: Kvfold, broken: Callable[[str], Path]) -> None:
    folder = broken("single")
    for out in (folder / "out", folder, folder / ".." / folder.name / "x"):
        complaint(kvfold("convert", folder, out, "--kv-heads", 2, "--force"), "inside")


def test_source_inside_out(kvfold: Kvfold, broken: Callable[[str], Path], tmp_path: Path) -> None:
    run = kvfold("convert", broken("single"), tmp_path, "--kv-heads", 2, "--force")
    complaint(run, "inside OUT")


def test_no_disk_space(
    kvfold: Kvfold, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    run = kvfold("convert", llama_folder, tmp_path / "out", "--kv-heads", 2)
    complaint(run, "disk space", "MB needed")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "empty"), (b"w3 w4 w5", "1024 tokens"), (b"caf\xe9 " * 2000, "UTF-8")],
)
def test_calibration_text(
    kvfold: Kvfold, llama_folder: Path, tmp_path: Path, content: bytes, words: str
) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(content)
    run = kvfold("convert", llama_folder, tmp_path / "out", "--kv-heads", 2, "--calibration", text)
    complaint(run, "text.txt", words)
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_calibration_text_missing(kvfold: Kvfold, llama_folder: Path, tmp_path: Path) -> None:
    run = kvfold(
        "convert", llama_folder, tmp_path / "out", "--kv-heads", 2, "--calibration", "no.txt"
    )
    complaint(run, "no.txt")


def test_calibration_text_of_too_few_tokens(
    kvfold: Kvfold, llama_folder: Path, tmp_path: Path
) -> None:
    """Long enough in bytes, but not in tokens: only the tokenizer can tell."""
    text = tmp_path / "text.txt"
    text.write_text("w3 " * 800)
    run = kvfold(
        "convert", llama_folder, tmp_path / "out", "--kv-heads", 2, "--calibration", text,
        "--context", 64,
    )  # fmt: skip
    complaint(run, "tokens")
    assert not (tmp_path / "out").exists()


def test_unknown_method(kvfold: Kvfold, llama_folder: Path, tmp_path: Path) -> None:
    run = kvfold("convert", llama_folder, tmp_path / "o", "--kv-heads", 2, "--method", "pcaa")
    complaint(run, "pcaa", "did you mean pca?")


def test_fit_without_calibration(kvfold: Kvfold, llama_folder: Path, tmp_path: Path) -> None:
    run = kvfold(
        "convert", llama_folder, tmp_path / "o", "--kv-heads", 2, "--fit", "local",
        "--no-calibration",
    )  # fmt: skip
    complaint(run, "calibration")


@pytest.mark.parametrize(
    "options",
    [
        ("--calibration-tokens", 10),
        ("--context", 3),
        ("--fit", "locl"),
        ("--fit-steps", 0),
        ("--fit-steps", 9, "--fit", "refit"),
        ("--fit-steps", 9, "--method", "mean"),
        ("--calibration", "a.txt", "--no-calibration"),
    ],
)
def test_options_out_of_range(
    kvfold: Kvfold, llama_folder: Path, tmp_path: Path, options: tuple[object, ...]
) -> None:
    complaint(kvfold("convert", llama_folder, tmp_path / "o", "--kv-heads", 2, *options))


def test_fit_names_are_the_fits_there_are() -> None:
    from kvfold.fold.fit import FITS
    from kvfold.fold.request import FIT_NAMES

    assert tuple(FITS) == FIT_NAMES


def test_typo_in_a_command_and_in_an_option(kvfold: Kvfold, llama_folder: Path) -> None:
    complaint(kvfold("inspct", llama_folder), "did you mean inspect?")
    complaint(kvfold("convert", llama_folder, "out", "--kv-head", "2"), "--kv-heads")
    complaint(kvfold("convert", llama_folder, "out"), "--kv-heads")


def test_gpt2_to_more_than_one_head(kvfold: Kvfold, tmp_path: Path) -> None:
    from tests.toolbox import tiny

    tiny.save_with_tokenizer(tiny.build("gpt2", tiny.GPT2), tmp_path / "gpt2")
    run = kvfold("convert", tmp_path / "gpt2", tmp_path / "out", "--kv-heads", 2)
    complaint(run, "GPTBigCode", "--kv-heads 1")


def test_not_a_gguf(kvfold: Kvfold, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF but not really" * 10)
    complaint(kvfold("convert", path, tmp_path / "out", "--kv-heads", 1), "model.gguf")


@pytest.mark.parametrize("text", ["missing.txt", "short.txt"])
def test_eval_text(kvfold: Kvfold, llama_folder: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "short.txt").write_text("w3 w4")
    complaint(kvfold("eval", llama_folder, "--text", tmp_path / text), text)


def test_eval_of_a_folder_without_tokenizer(
    kvfold: Kvfold, broken: Callable[[str], Path], text_file: Path
) -> None:
    folder = broken("single")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    complaint(kvfold("eval", folder, "--text", text_file), "tokenizer")


def test_no_traceback_for_a_bug_but_with_debug(
    kvfold: Kvfold, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug() -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("kvfold.fold.methods.all_methods", bug)
    run = kvfold("methods")
    assert run.code == 1
    assert "ZeroDivisionError: oops" in run.err
    assert "Traceback" not in run.err
    assert "Traceback" in kvfold("--debug", "methods").err


def test_ctrl_c(kvfold: Kvfold, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kvfold.fold.methods.all_methods", interrupt)
    run = kvfold("methods")
    assert run.code == 130
    assert "interrupted" in run.err


def test_text_of_one_token_is_no_bug(kvfold: Kvfold, llama_folder: Path, tmp_path: Path) -> None:
    """All words unknown to the tokenizer: nothing can be fitted on them, or too little."""
    text = tmp_path / "text.txt"
    text.write_text("x " * 3000)
    run = kvfold("convert", llama_folder, tmp_path / "out", "--kv-heads", 2, "--calibration", text)
    assert run.code in (0, 1), run.err
    assert "this is a bug" not in run.err
