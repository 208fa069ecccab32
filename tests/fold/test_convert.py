"""Converting on disk: what is written, that it loads, and that nothing is lost on the way."""

import errno
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvfold import convert, fold_model
from kvfold.checkpoint.places import working_folder
from kvfold.checkpoint.source import open_checkpoint
from kvfold.checkpoint.tensors import read_header
from kvfold.errors import InputError, RunError
from kvfold.fold import convert as convert_module
from kvfold.quality.text import token_windows
from tests.conftest import Kvfold
from tests.toolbox import tiny
from tests.toolbox.runs import CALIBRATION, Stop, digests


def greedy(model: Any, prompt: list[int], steps: int = 12) -> list[int]:
    out = model.generate(
        torch.tensor([prompt]), max_new_tokens=steps, do_sample=False, eos_token_id=None
    )
    return [int(token) for token in out[0]]


def test_output_is_an_ordinary_folder(llama_folder: Path, tmp_path: Path) -> None:
    before = digests_of_source(llama_folder)
    convert(llama_folder, tmp_path / "out", 2, calibrate=False)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
        "README.md",
        "kvfold.json",
    } <= names
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_key_value_heads"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert digests_of_source(llama_folder) == before, "the source was touched"


def digests_of_source(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


@pytest.mark.parametrize("fit", ["none", "refit", "local"])
def test_loaded_output_equals_the_in_memory_fold(
    llama_folder: Path, text_file: Path, tmp_path: Path, fit: str
) -> None:
    convert(llama_folder, tmp_path / "out", 2, fit=fit, calibration=[text_file], **CALIBRATION)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    source = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    windows = token_windows(tokenizer, text_file.read_text(), 64, 1024)
    folded = fold_model(source, 2, fit=fit, windows=windows).model
    for name, tensor in folded.state_dict().items():
        torch.testing.assert_close(tensor, loaded.state_dict()[name], atol=1e-6, rtol=1e-5)
    assert greedy(loaded, [5, 6, 7]) == greedy(folded, [5, 6, 7])


@pytest.mark.parametrize("case", [c for c in tiny.EVERY if c not in ("llama-odd",)])
def test_every_family_loads_from_disk(case: str, tmp_path: Path) -> None:
    model = tiny.make(case, num_key_value_heads=6)
    folder = tiny.save_with_tokenizer(model, tmp_path / "source")
    convert(folder, tmp_path / "out", 3, calibrate=False)
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    folded = fold_model(model, 3, fit="none").model
    ids = tiny.tokens()
    torch.testing.assert_close(
        tiny.logits(loaded.eval(), ids), tiny.logits(folded, ids), atol=1e-5, rtol=1e-5
    )


def test_older_engines_find_the_rotary_embedding(tmp_path: Path) -> None:
    """Where transformers 4 had it too; transformers 5 reads the same from both."""
    source = tiny.save_with_tokenizer(tiny.make("phi", num_key_value_heads=6), tmp_path / "source")
    convert(source, tmp_path / "out", 2, calibrate=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    rotary = config["rope_parameters"]
    assert config["rope_theta"] == rotary["rope_theta"]
    assert config["partial_rotary_factor"] == rotary["partial_rotary_factor"] < 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for key in ("rope_theta", "partial_rotary_factor"):
        del config[key]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    newer = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(tiny.logits(model, tiny.tokens()), tiny.logits(newer, tiny.tokens()))


@pytest.mark.parametrize("bare", [False, True], ids=["prefixed", "old names"])
def test_gpt2_loads_as_gpt_bigcode(tmp_path: Path, bare: bool) -> None:
    """Old GPT-2 checkpoints name tensors without ``transformer.`` and store causal masks."""
    model = tiny.build("gpt2", tiny.GPT2)
    folder = tiny.save_with_tokenizer(model, tmp_path / "source")
    if bare:
        from safetensors.torch import save_file

        path = folder / "model.safetensors"
        tensors = {n.removeprefix("transformer."): t for n, t in load_file(path).items()}
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 8, 8).tril()
        save_file(tensors, path, metadata={"format": "pt"})
    text = tmp_path / "text.txt"
    text.write_text(tiny.words(1500))
    convert(folder, tmp_path / "out", 1, fit="refit", calibration=[text], **CALIBRATION)
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert type(loaded).__name__ == "GPTBigCodeForCausalLM"
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    greedy(loaded, [5, 6, 7])


def test_same_heads_copies_every_tensor_bit_for_bit(sharded_folder: Path, tmp_path: Path) -> None:
    convert(sharded_folder, tmp_path / "out", 6)
    source, out = open_checkpoint(sharded_folder), open_checkpoint(tmp_path / "out")
    assert source.names == out.names
    for name in source.names:
        assert torch.equal(source.tensor(name), out.tensor(name))


def test_sharded_in_sharded_out(sharded_folder: Path, llama_folder: Path, tmp_path: Path) -> None:
    convert(sharded_folder, tmp_path / "many", 2, calibrate=False, max_shard_bytes=50_000)
    convert(llama_folder, tmp_path / "one", 2, calibrate=False)
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 2
    assert all(path.stat().st_size < 60_000 for path in shards)
    assert sum(len(read_header(path)) for path in shards) == len(
        read_header(tmp_path / "one" / "model.safetensors")
    )
    one = AutoModelForCausalLM.from_pretrained(tmp_path / "one").state_dict()
    many = AutoModelForCausalLM.from_pretrained(tmp_path / "many").state_dict()
    assert all(torch.equal(one[name], many[name]) for name in one)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_is_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = tiny.save_with_tokenizer(tiny.make("llama").to(dtype), tmp_path / "source")
    convert(folder, tmp_path / "out", 1, calibrate=False)
    out = open_checkpoint(tmp_path / "out")
    assert {out.tensor(name).dtype for name in out.names} == {dtype}


def test_kv_cache_is_as_small_as_promised(llama_folder: Path, tmp_path: Path) -> None:
    record = convert(llama_folder, tmp_path / "out", 2, calibrate=False)
    promised = record["geometry"]["kv_bytes_per_token_16bit"]
    measured = []
    for folder in (llama_folder, tmp_path / "out"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        prompt = torch.arange(3, 23)[None]
        result = model.generate(
            prompt, max_new_tokens=12, min_new_tokens=12, return_dict_in_generate=True
        )
        layers = result.past_key_values.layers
        size = sum(t.nbytes for layer in layers for t in (layer.keys, layer.values))
        measured.append(size / (result.sequences.shape[1] - 1))
    assert measured == pytest.approx([promised["source"], promised["folded"]], rel=0.01)


def test_the_record_says_what_was_done(llama_folder: Path, text_file: Path, tmp_path: Path) -> None:
    record = convert(
        llama_folder, tmp_path / "out", 2, calibration=[text_file], seed=4, **CALIBRATION
    )
    assert record == json.loads((tmp_path / "out" / "kvfold.json").read_text())
    assert record["calibration"]["tokens"] == 1024
    assert record["source"]["sha256"].keys() == {"model.safetensors"}
    assert record["warnings"] == []
    assert record["run"]["peak_memory_bytes"] > 10**7
    for layer in record["layers"]:
        assert sorted(sum(layer["groups"], [])) == list(range(6))
        stages = [stage["stage"] for stage in layer["stages"]]
        assert stages == ["fit_attention", "refit_output", "refit_mlp"]
        first, last = layer["stages"][0], layer["stages"][-1]
        assert last["error_after"] < first["error_before"], "fitting gained nothing"


def test_only_the_builtin_text_leaves_a_warning(llama_folder: Path, tmp_path: Path) -> None:
    record = convert(llama_folder, tmp_path / "out", 2, fit="none", **CALIBRATION)
    assert "built-in" in record["warnings"][0]
    assert "built-in" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("fit", ["none", "local"])
@pytest.mark.parametrize("moment", ["first layer done", "while writing"])
def test_interrupt_and_resume_is_byte_identical(
    sharded_folder: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fit: str,
    moment: str,
) -> None:
    arguments: dict[str, Any] = {
        "fit": fit, "calibration": [text_file], "max_shard_bytes": 50_000, **CALIBRATION,
    }  # fmt: skip
    convert(sharded_folder, tmp_path / "whole", 2, **arguments)

    def stop(label: str, done: int, total: int) -> None:
        if (label, done) == (("folding layers", 1) if moment[0] == "f" else ("writing", 2)):
            raise Stop

    out = tmp_path / "out"
    with pytest.raises(Stop):
        convert(sharded_folder, out, 2, progress=stop, **arguments)
    assert not out.exists(), "a half-written folder has the name of a whole one"
    with pytest.raises(InputError, match="interrupted") as error:
        convert(sharded_folder, out, 2, **arguments)
    assert "--resume" in error.value.hint
    with pytest.raises(InputError, match="belongs to another run"):
        convert(sharded_folder, out, 3, resume=True, **arguments)
    convert(sharded_folder, out, 2, resume=True, **arguments)
    assert digests(out) == digests(tmp_path / "whole")


def test_resume_goes_on_instead_of_starting_over(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(label: str, done: int, total: int) -> None:
        if label == "writing":
            raise Stop

    with pytest.raises(Stop):
        convert(llama_folder, tmp_path / "out", 2, calibrate=False, progress=stop)
    monkeypatch.setattr("kvfold.fold.loop.fold_layer", None)  # calling it would fail
    convert(llama_folder, tmp_path / "out", 2, calibrate=False, resume=True)


def test_a_full_disk_midway_leaves_source_and_older_output_whole(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    convert(llama_folder, out, 3, calibrate=False)
    before = digests(out), digests_of_source(llama_folder)

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(convert_module, "write_shards", full)
        with pytest.raises(RunError, match="disk is full") as error:
            convert(llama_folder, out, 2, calibrate=False, force=True)
    assert "--resume" in error.value.hint
    assert (digests(out), digests_of_source(llama_folder)) == before
    record = convert(llama_folder, out, 2, calibrate=False, force=True, resume=True)
    assert record["geometry"]["num_kv_heads"]["folded"] == 2


def test_force_replaces_only_checkpoints(llama_folder: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="not a checkpoint"):
        convert(llama_folder, precious, 2, calibrate=False, force=True)
    assert (precious / "thesis.txt").read_text() == "years of work"


def test_equal_seeds_give_equal_random_heads(llama_folder: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        convert(llama_folder, tmp_path / name, 2, method="random", seed=seed)
    a, b, c = (open_checkpoint(tmp_path / name) for name in "abc")
    name = a.attention_prefix(0) + ".k_proj.weight"
    assert torch.equal(a.tensor(name), b.tensor(name))
    assert not torch.equal(a.tensor(name), c.tensor(name))


def test_dry_run_writes_nothing(kvfold: Kvfold, llama_folder: Path, tmp_path: Path) -> None:
    run = kvfold("convert", llama_folder, tmp_path / "out", "--kv-heads", 2, "--dry-run", "--json")
    assert run.code == 0
    preview: Any = run.json()
    assert preview["geometry"]["num_kv_heads"] == {"source": 6, "folded": 2}
    assert not list(tmp_path.iterdir())
    convert(llama_folder, tmp_path / "out", 2, calibrate=False)
    assert preview["output_bytes"] == sum(
        entry.nbytes for entry in read_header(tmp_path / "out" / "model.safetensors").values()
    )


def test_a_large_run_spills_its_hidden_states(
    llama_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files or memory, the numbers are the same."""
    arguments: dict[str, Any] = {"fit": "refit", "calibration": [text_file], **CALIBRATION}
    convert(llama_folder, tmp_path / "memory", 2, **arguments)
    monkeypatch.setattr("kvfold.fold.hidden.SPILL_BYTES", 1)
    seen: list[Path] = []

    def look(label: str, done: int, total: int) -> None:
        seen.extend((working_folder(tmp_path / "files") / "hidden").glob("*"))

    convert(llama_folder, tmp_path / "files", 2, progress=look, **arguments)
    assert seen
    assert digests(tmp_path / "files") == digests(tmp_path / "memory")
