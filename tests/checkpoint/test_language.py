"""Checkpoints of which a language model is a part: it is folded, all else is as it was."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from kvfold import convert, evaluate, heal, inspect
from kvfold.checkpoint.pretrained import load_model, load_tokenizer
from kvfold.checkpoint.source import open_checkpoint
from kvfold.errors import CheckpointError, UnsupportedError
from kvfold.files import write_json
from kvfold.plan.source import open_model
from tests.toolbox import tiny, wrapped
from tests.toolbox.healing_cases import OPTIONS, weights

SEEN = ("vision", "visual", "projector", "connector")


@pytest.fixture(params=sorted(wrapped.CASES))
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def saved(case: str, folder: Path, **text: Any) -> Path:
    return tiny.save_with_tokenizer(wrapped.make(case, **text), folder)


def opened(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def _json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def text_file(folder: Path) -> Path:
    path = folder / "text.txt"
    path.write_text("\n\n".join(tiny.words(300, seed) for seed in range(40)))
    return path


def test_the_language_model_alone_computes_the_same(case: str, tmp_path: Path) -> None:
    folder = saved(case, tmp_path / "source")
    ids = tiny.tokens()
    alone = load_model(folder, torch.float32)
    assert torch.equal(tiny.logits(alone, ids), tiny.logits(opened(folder), ids))


def test_it_is_folded_as_if_it_were_alone(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With statistics and a fit; what transformers opens computes what folding in memory does."""
    folder, text = saved(case, tmp_path / "source"), text_file(tmp_path)
    options: Any = {"calibration": [text], "calibration_tokens": 1024, "context": 64}
    record = convert(folder, tmp_path / "out", 2, method="pca", fit="refit", **options)
    assert record["geometry"]["num_kv_heads"] == {"source": 4, "folded": 2}
    alone = load_model(folder, torch.float32)
    tiny.save_with_tokenizer(alone, tmp_path / "alone")
    # For some architectures transformers takes their own kind of tokenizer whatever is there.
    monkeypatch.setattr("kvfold.fold.windows.load_tokenizer", lambda _: load_tokenizer(folder))
    convert(tmp_path / "alone", tmp_path / "text", 2, method="pca", fit="refit", **options)
    ids, whole = tiny.tokens(), opened(tmp_path / "out")
    assert whole.config.text_config.num_key_value_heads == 2
    assert torch.equal(
        tiny.logits(whole, ids), tiny.logits(load_model(tmp_path / "text", torch.float32), ids)
    )


def test_all_else_is_as_it_was(case: str, tmp_path: Path) -> None:
    folder = saved(case, tmp_path / "source")
    convert(folder, tmp_path / "out", 1, method="mean", calibrate=False)
    before, after = weights(folder), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {
        name for name in before if "layers." in name and not any(s in name for s in SEEN)
        and name.rpartition(".")[0].endswith(("k_proj", "v_proj"))
    }  # fmt: skip
    old, new = (_json(each / "config.json") for each in (folder, tmp_path / "out"))
    assert old["text_config"].pop("num_key_value_heads") == 4
    assert new["text_config"].pop("num_key_value_heads") == 1
    new["text_config"].pop("rope_theta", None)  # for older engines
    assert old == new


def test_names_of_either_kind_are_read(case: str, tmp_path: Path) -> None:
    """And written as they came: today's modules', and those that transformers writes."""
    model = wrapped.make(case)
    folder = tiny.save_with_tokenizer(model, tmp_path / "source")
    own = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    if not model.config.tie_word_embeddings:
        own = dict(model.state_dict())
    other = tmp_path / "other"
    tiny.save_with_tokenizer(model, other)
    save_file(own, other / "model.safetensors", {"format": "pt"})
    assert case in ("smolvlm", "qwen3_vl") or weights(folder).keys() != own.keys()
    for each in (folder, other):
        convert(each, tmp_path / f"{each.name}-out", 2, method="first", calibrate=False)
    assert weights(tmp_path / "other-out").keys() == own.keys()
    ids = tiny.tokens()
    results = [tiny.logits(opened(tmp_path / f"{name}-out"), ids) for name in ("source", "other")]
    assert torch.equal(*results)


def test_sizes_that_a_config_leaves_out_are_transformers_own(tmp_path: Path) -> None:
    """As published Gemma 3 leaves out how many heads there are."""
    folder = saved("gemma3", tmp_path / "source", num_attention_heads=8, num_key_value_heads=4)
    config = dict(_json(folder / "config.json"))
    text = dict(config["text_config"])
    for name in ("num_attention_heads", "num_key_value_heads", "vocab_size"):
        del text[name]
    config["text_config"] = text | {"vocab_size": tiny.VOCABULARY}
    write_json(folder / "config.json", config)
    assert inspect(folder).geometry.num_heads == 8
    convert(folder, tmp_path / "out", 2, method="mean", calibrate=False)
    assert _json(tmp_path / "out" / "config.json")["text_config"] == (
        text | {"vocab_size": tiny.VOCABULARY, "num_key_value_heads": 2}
    )
    assert opened(tmp_path / "out").config.text_config.num_attention_heads == 8


def test_a_config_without_parts(tmp_path: Path) -> None:
    """As Qwen 2.5 VL was published: the language model's sizes lie beside the other parts."""
    folder = saved("qwen2_5_vl", tmp_path / "source")
    config = dict(_json(folder / "config.json"))
    text = {k: v for k, v in config.pop("text_config").items() if k not in ("model_type", "dtype")}
    write_json(folder / "config.json", text | config)
    ids, before = tiny.tokens(), opened(folder)
    convert(folder, tmp_path / "out", 4, method="mean", calibrate=False)
    assert _json(tmp_path / "out" / "config.json") == text | config
    assert torch.equal(tiny.logits(before, ids), tiny.logits(opened(tmp_path / "out"), ids))
    convert(folder, tmp_path / "half", 2, method="mean", calibrate=False)
    assert _json(tmp_path / "half" / "config.json")["num_key_value_heads"] == 2
    assert opened(tmp_path / "half").config.text_config.num_key_value_heads == 2


def test_it_is_scored_and_healed(tmp_path: Path) -> None:
    folder, text = saved("gemma3", tmp_path / "source"), text_file(tmp_path)
    convert(folder, tmp_path / "folded", 1, method="mean", calibrate=False)
    heal(tmp_path / "folded", tmp_path / "healed", folder, [text], **OPTIONS)
    models = [folder, tmp_path / "folded", tmp_path / "healed"]
    source, folded, healed = evaluate(models, [text], context=64, max_tokens=1024)
    assert healed.kl < folded.kl
    assert source.kl == 0
    before, after = weights(folder), weights(tmp_path / "healed")
    assert before.keys() == after.keys()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if any(seen in name for seen in SEEN)} <= same
    assert opened(tmp_path / "healed").config.text_config.num_key_value_heads == 1


def test_a_latent_has_no_place(tmp_path: Path) -> None:
    folder = saved("llava", tmp_path / "source")
    for latent in ("16+4", "20"):
        with pytest.raises(UnsupportedError, match="reads more than text"):
            convert(folder, tmp_path / "out", latent=latent)
    assert not (tmp_path / "out").exists()


def test_planned_as_its_language_model(tmp_path: Path) -> None:
    folder = saved("mistral3", tmp_path / "source")
    assert open_checkpoint(folder).family.name == "llama"
    assert [layer.num_kv_heads for layer in open_model(folder).layers] == [4, 4]


def test_a_language_model_that_is_not_there(tmp_path: Path) -> None:
    folder = saved("llava", tmp_path / "source")
    others = {n: t for n, t in load_file(folder / "model.safetensors").items() if "vision" in n}
    save_file(others, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="holds no language model"):
        open_checkpoint(folder)


def test_a_language_model_that_cannot_be_folded_is_named(tmp_path: Path) -> None:
    folder = saved("llava", tmp_path / "source")
    config = dict(_json(folder / "config.json"))
    for kind, says in (("mamba", "it has no attention"), ("idefics_text", "unknown model_type")):
        write_json(folder / "config.json", config | {"text_config": {"model_type": kind}})
        with pytest.raises(UnsupportedError, match=says) as error:
            open_checkpoint(folder)
        assert kind in str(error.value)
