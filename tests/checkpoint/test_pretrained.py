"""Models come from their files alone: no code of theirs runs, no weight is made up."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvfold.checkpoint.pretrained import check_complete, load_model, load_tokenizer
from kvfold.checkpoint.source import open_checkpoint
from kvfold.errors import CheckpointError, KVFoldError
from tests.conftest import Kvfold
from tests.toolbox import tiny

WEIGHTS = "model.safetensors"
Change = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


@pytest.fixture
def copy(llama_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama_folder, tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(found | changes))


def edit_weights(folder: Path, change: Change) -> None:
    tensors = change(load_file(folder / WEIGHTS))
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


# -- code -----------------------------------------------------------------------------------

PLANTED = "from pathlib import Path\nPath({marker!r}).touch()\n"
CLASSES = "class C:\n    @classmethod\n    def from_pretrained(cls, *a, **k): return cls()\n"


@pytest.fixture
def planted(copy: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A model that offers code of its own at every place, and the file that running it makes."""
    marker = tmp_path / "ran"
    (copy / "evil.py").write_text(PLANTED.format(marker=str(marker)) + CLASSES)
    (copy / "custom_generate").mkdir()
    shutil.copy(copy / "evil.py", copy / "custom_generate" / "generate.py")
    names = ("AutoConfig", "AutoModelForCausalLM", "AutoModel")
    edit(copy / "config.json", auto_map=dict.fromkeys(names, "evil.C"))
    edit(copy / "config.json", attn_implementation="some-org/kernels")
    edit(copy / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.C", "evil.C"]})
    return copy, marker


def test_code_that_a_model_offers_neither_runs_nor_asks(
    kvfold: Kvfold,
    planted: tuple[Path, Path],
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where the model can be opened without its code, it is."""
    folder, marker = planted

    def asked(*words: object) -> str:
        pytest.fail(f"the terminal was asked: {words}")

    monkeypatch.setattr("builtins.input", asked)
    out, folded = tmp_path / "healed", tmp_path / "out"
    for command in (
        ("inspect", folder, "--json"),
        ("eval", folder, "--text", text_file, "--context", 64, "--max-tokens", 128, "--json"),
        ("eval", folder, "--needle", 96, "--json"),
        ("look", folder, "w3 w4 w5", "--png", tmp_path / "a.png"),
        ("convert", folder, folded, "--kv-heads", 2, "--calibration", text_file,
         "--calibration-tokens", 1024, "--context", 64, "--fit", "none", "--json"),
        ("heal", folded, out, "--teacher", folder, "--text", text_file, "--tokens", 256,
         "--context", 64, "--batch-tokens", 128, "--held-out-tokens", 64, "--stages", "kl",
         "--json"),
    ):  # fmt: skip
        run = kvfold(*command)
        assert run.code == 0, run.err
        if "--json" in command:
            json.loads(run.out)
        assert not marker.exists(), command[0]


def test_a_tokenizer_that_needs_its_code_is_refused_in_one_line(
    kvfold: Kvfold, planted: tuple[Path, Path], text_file: Path
) -> None:
    folder, marker = planted
    edit(folder / "tokenizer_config.json", tokenizer_class="OwnTokenizer")
    (folder / "tokenizer.json").unlink()
    run = kvfold("eval", folder, "--text", text_file)
    assert run.code == 2
    assert len(run.err.strip().splitlines()) == 2
    assert not marker.exists()
    assert not any("evil" in name for name in sys.modules)


def test_a_model_that_needs_its_code_is_refused(
    kvfold: Kvfold, planted: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, marker = planted
    edit(folder / "config.json", model_type="own_model")
    run = kvfold("look", folder, "w3 w4", "--png", tmp_path / "a.png")
    assert run.code == 2
    assert "runs no code" in run.err
    assert not marker.exists()


def test_adapters_and_other_weights_are_refused(copy: Path) -> None:
    """transformers would put them in place of what kvfold has checked."""
    (copy / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="adapter"):
        open_checkpoint(copy)
    (copy / "adapter_config.json").unlink()
    edit(copy / "config.json", transformers_weights="other.safetensors")
    with pytest.raises(KVFoldError, match="other weights"):
        open_checkpoint(copy)


# -- completeness ---------------------------------------------------------------------------


@pytest.mark.parametrize("case", [*tiny.CASES, "gpt2"])
def test_every_family_is_whole_until_a_tensor_goes(case: str, tmp_path: Path) -> None:
    """Each tensor in turn is missing, of another shape, or of whole numbers."""
    model = tiny.build("gpt2", tiny.GPT2) if case == "gpt2" else tiny.make(case)
    model.save_pretrained(tmp_path)
    check_complete(open_checkpoint(tmp_path))
    whole = load_file(tmp_path / WEIGHTS)
    one_of_each = {name.replace(".1.", ".0."): name for name in whole}.values()
    changes: list[Change] = [
        lambda tensors: {},
        lambda tensors: {name: tensor[..., None] for name, tensor in tensors.items()},
        lambda tensors: {name: tensor.to(torch.int32) for name, tensor in tensors.items()},
    ]
    for index, name in enumerate(one_of_each):
        changed = changes[index % 3]({name: whole[name]})
        rest = {other: tensor for other, tensor in whole.items() if other != name}
        save_file(rest | changed, tmp_path / WEIGHTS, metadata={"format": "pt"})
        with pytest.raises(KVFoldError) as caught:
            check_complete(open_checkpoint(tmp_path))
        assert name in caught.value.message


def test_old_gpt2_files_without_the_base_models_name_are_whole(tmp_path: Path) -> None:
    tiny.build("gpt2", tiny.GPT2).save_pretrained(tmp_path)
    edit_weights(
        tmp_path,
        lambda tensors: {
            **{name.removeprefix("transformer."): t for name, t in tensors.items()},
            "h.0.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8),
        },
    )
    check_complete(open_checkpoint(tmp_path))
    load_model(tmp_path, torch.float32)


def test_what_a_model_has_no_place_for_is_let_be_but_not_in_attention(copy: Path) -> None:
    extra = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_weights(copy, lambda tensors: {**tensors, extra: torch.ones(4)})
    check_complete(open_checkpoint(copy))
    bias = "model.layers.0.self_attn.k_proj.bias"
    edit_weights(copy, lambda tensors: {**tensors, bias: torch.ones(48)})
    with pytest.raises(CheckpointError, match=bias):
        check_complete(open_checkpoint(copy))


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
def test_no_command_starts_with_an_incomplete_model(
    kvfold: Kvfold, copy: Path, llama_folder: Path, text_file: Path, tmp_path: Path, name: str
) -> None:
    edit_weights(copy, lambda tensors: {n: t for n, t in tensors.items() if n != name})
    before = sorted(path.name for path in tmp_path.iterdir())
    out = tmp_path / "out"
    for command in (
        ("eval", llama_folder, copy, "--text", text_file),
        ("eval", copy, "--needle", 96),
        ("look", copy, "w3 w4", "--png", tmp_path / "a.png"),
        ("convert", copy, out, "--kv-heads", 2, "--no-calibration"),
        ("convert", copy, out, "--kv-heads", 2, "--dry-run"),
        ("heal", llama_folder, out, "--teacher", copy, "--text", text_file, "--tokens", 1024),
        ("heal", copy, out, "--teacher", llama_folder, "--text", text_file, "--tokens", 1024),
        ("bench", "model", copy, "--context", 16),
    ):
        run = kvfold(*command)
        assert run.code == 2, (command, run.err)
        assert name in run.err
        assert len(run.err.strip().splitlines()) == 2
        assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_what_transformers_would_make_up_is_refused_too(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second line of defence, without the first."""
    monkeypatch.setattr("kvfold.checkpoint.pretrained.check_complete", lambda checkpoint: None)
    edit_weights(copy, lambda tensors: {n: t for n, t in tensors.items() if "lm_head" not in n})
    with pytest.raises(CheckpointError, match="lm_head"):
        load_model(copy, torch.float32)


# -- tokenizers and files that wait ----------------------------------------------------------


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"null", b'{"model": 3}', b"[" * 100_000, b"\xff\xfe", b"{}"]
)
def test_broken_tokenizers_are_refused_before_a_working_folder(
    kvfold: Kvfold, copy: Path, text_file: Path, tmp_path: Path, text: bytes
) -> None:
    (copy / "tokenizer.json").write_bytes(text)
    run = kvfold("convert", copy, tmp_path / "out", "--kv-heads", 2, "--calibration", text_file)
    assert run.code == 2, run.err
    assert "tokenizer" in run.err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_tokens_beyond_the_vocabulary_are_refused(
    kvfold: Kvfold, copy: Path, text_file: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(copy)
    tokenizer.add_tokens([f"w{index}" for index in range(90, 200)])
    tokenizer.save_pretrained(copy)
    text_file = tmp_path / "text.txt"
    text_file.write_text("w3 w150 " * 2000)
    for command in (
        ("eval", copy, "--text", text_file),
        ("convert", copy, tmp_path / "out", "--kv-heads", 2, "--calibration", text_file),
        ("heal", copy, tmp_path / "out", "--teacher", copy, "--text", text_file),
        ("look", copy, "w3 w150", "--png", tmp_path / "a.png"),
    ):
        run = kvfold(*command)
        assert run.code == 2, run.err
        assert "vocabulary has 96" in run.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "text.txt"]


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "generation_config.json", WEIGHTS, "kvfold.json"]
)
def test_no_file_of_a_model_is_waited_for(
    kvfold: Kvfold, copy: Path, text_file: Path, name: str
) -> None:
    (copy / name).unlink(missing_ok=True)
    os.mkfifo(copy / name)
    run = kvfold("eval", copy, "--text", text_file)
    assert run.code == 2
    assert name in run.err


def test_an_index_that_leaves_its_folder_is_refused(
    kvfold: Kvfold, sharded_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(sharded_folder, tmp_path / "model"))
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.rename(tmp_path / shard.name)
    index = folder / "model.safetensors.index.json"
    whole = index.read_text()
    for name in (f"../{shard.name}", str(tmp_path / shard.name)):
        index.write_text(whole.replace(shard.name, name))
        for command in ("inspect", "plan"):
            run = kvfold(command, folder)
            assert run.code == 2
            assert "expected a file below it" in run.err
    index.write_text(whole)
    shard.symlink_to(tmp_path / shard.name)
    run = kvfold("inspect", folder)
    assert run.code == 2
    assert "a link to" in run.err
