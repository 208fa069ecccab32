"""Healing end to end: it heals, stage by stage, whatever its settings."""

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvfold import heal
from kvfold.checkpoint.places import working_folder
from kvfold.healing.loop import rate_factor
from kvfold.healing.request import HealRequest
from kvfold.healing.watch import read_metrics
from kvfold.kernels.torch.trained import trained
from tests.toolbox.healing_cases import OPTIONS, same, weights


def test_healing_brings_the_folded_model_nearer_to_its_source(healed: Path) -> None:
    record = json.loads((healed / "kvfold.json").read_text())
    quality = {row["name"]: row for row in record["heal"]["quality"]}
    before, after = quality["folded"], quality["healed"]
    assert after["kl"] < 0.9 * before["kl"]
    rows = read_metrics(healed / "healing.jsonl")
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 9))
    assert [row["tokens"] for row in steps] == [256 * n for n in range(1, 9)]
    assert all(0 <= row["overhead"] < 1 and row["tokens_per_second"] > 0 for row in steps)
    # What is reported on the way is what is measured at the end.
    assert rows[-1]["kl held-out"] == pytest.approx(after["kl"], rel=1e-3)


def test_the_result_is_an_ordinary_checkpoint(healed: Path, folded: Path) -> None:
    assert (healed / "config.json").read_bytes() == (folded / "config.json").read_bytes()
    assert not working_folder(healed).exists()
    names = {path.name for path in folded.iterdir()} | {"healing.jsonl"}
    assert {path.name for path in healed.iterdir()} == names
    model = AutoModelForCausalLM.from_pretrained(healed)
    assert model.config.num_key_value_heads == 1
    assert "healed" in (healed / "README.md").read_text()


def test_attention_alone_is_trained_where_asked(
    healed: Path, folded: Path, source: Path, text: Path, tmp_path: Path
) -> None:
    def changed(folder: Path) -> set[str]:
        before, after = weights(folded), weights(folder)
        return {name for name in before if not torch.equal(before[name], after[name])}

    assert changed(healed) == set(weights(folded))
    heal(folded, tmp_path / "some", source, [text], **{**OPTIONS, "train": "attention"})
    assert changed(tmp_path / "some") == {name for name in weights(folded) if "self_attn" in name}


def test_micro_batches_add_up(source: Path, folded: Path, text: Path, tmp_path: Path) -> None:
    losses = []
    for size in (1, 4):
        out = tmp_path / str(size)
        heal(folded, out, source, [text], **{**OPTIONS, "micro_batch": size})
        losses.append([r["loss"] for r in read_metrics(out / "healing.jsonl") if "loss" in r])
    # The same sums in another order; Adam's first steps magnify rounding to parts in 1e4.
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-5)


def test_as_many_sequences_at_once_as_make_so_many_logits() -> None:
    """Whether FOLDED is there yet or not: `convert --heal` asks before it is, and on resuming."""

    def asked(context: int, **options: Any) -> HealRequest:
        return HealRequest.asked(
            folded="nowhere", teacher="source", texts=["text"], context=context, tokens=10_000,
            **options,
        )  # fmt: skip

    assert asked(512).at_once(49_152) == 2
    assert asked(256).at_once(49_152) == 5
    assert asked(2048).at_once(128_256) == 1
    assert asked(512).at_once(None) == asked(512).at_once(0) == 1
    assert asked(512, micro_batch=3).at_once(49_152) == 3


def test_rates_are_by_size_and_updates_by_tokens(folded: Path, tmp_path: Path) -> None:
    def asked(size: int | None, **options: Any) -> HealRequest:
        folder = tmp_path / str(size)
        if size is not None:
            shutil.copytree(folded, folder, dirs_exist_ok=True)
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**config, "hidden_size": size}))
        return HealRequest.asked(folded=folder, teacher="source", texts=["text"], **options)

    assert asked(4096).lr == pytest.approx(0.3 / 4096)
    assert asked(64).lr == 1e-3
    assert asked(4096).lr_rest == pytest.approx(0.06 / 4096)
    assert asked(4096, lr=1e-4).lr_rest == pytest.approx(2e-5)
    assert asked(None).lr == 5e-5
    assert [asked(64, tokens=n, context=128).batch_tokens for n in (2000, 2**20, 10**9)] == [
        1024, 2048, 4096,
    ]  # fmt: skip
    assert asked(64).train == "all"
    assert asked(64, lora_rank=2).train == "attention"


def test_on_cpus_the_student_attends_as_kvfold_does(
    source: Path, folded: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose gradients in bfloat16 are made of products; other tokens than without, as few as
    rounding explains."""
    calls = []

    def spy(*given: Any) -> torch.Tensor:
        calls.append(given)
        return trained(*given)

    monkeypatch.setattr("kvfold.kernels.torch.sdpa.trained", spy)
    losses = []
    for kvfold in (True, False):
        if not kvfold:
            monkeypatch.setattr("kvfold.healing.run.use_kvfold", lambda model: None)
        out = tmp_path / str(kvfold)
        heal(folded, out, source, [text], **{**OPTIONS, "dtype": "bfloat16"})
        assert bool(calls) == kvfold
        calls.clear()
        losses.append([r["loss"] for r in read_metrics(out / "healing.jsonl") if "loss" in r])
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_the_local_stage_fits_layers_and_is_taken_up(
    source: Path, folded: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**OPTIONS, "stages": ["local", "kl"], "local_tokens": 1024}

    class Stopped(Exception):
        pass

    def stop(row: dict[str, Any]) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        heal(folded, tmp_path / "out", source, [text], watch=stop, **options)
    monkeypatch.setattr("kvfold.fold.loop.SourcePass", None)  # calling it would fail
    record = heal(folded, tmp_path / "out", source, [text], resume=True, **options)
    stages = record["heal"]["local"]["summary"]
    assert stages["fit_attention"]["error_after"] < stages["fit_attention"]["error_before"]
    assert [layer["layer"] for layer in record["heal"]["local"]["layers"]] == [0, 1]


def test_the_local_stage_alone_keeps_what_it_fitted(
    source: Path, folded: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = {**OPTIONS, "stages": ["local"], "local_tokens": 1024}
    record = heal(folded, out, source, [text], **options)
    before, after = (r for r in record["heal"]["quality"] if r["name"] != "source")
    assert after["kl"] < before["kl"]
    assert not (out / "healing.jsonl").exists()


def test_stages_by_default_follow_the_folds_record(
    source: Path, folded: Path, text: Path, tmp_path: Path
) -> None:
    from kvfold.healing.request import HealRequest

    assert HealRequest.asked(folded=folded, teacher=source, texts=[text]).stages == ("local", "kl")
    fitted = tmp_path / "fitted"
    shutil.copytree(folded, fitted)
    (fitted / "kvfold.json").write_text('{"fit": "local"}')
    assert HealRequest.asked(folded=fitted, teacher=source, texts=[text]).stages == ("kl",)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden": 0.1},
        {"temperature": 2.0, "cross_entropy": 0.3},
        {"gradient_checkpointing": True},
        {"dtype": "bfloat16"},
        {"clip": 0.0, "warm_up": 0.0},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_setting_heals(
    changes: dict[str, Any], source: Path, folded: Path, text: Path, tmp_path: Path
) -> None:
    record = heal(folded, tmp_path / "out", source, [text], **{**OPTIONS, **changes})
    before, after = (r for r in record["heal"]["quality"] if r["name"] != "source")
    assert after["kl"] < before["kl"]


def test_gradient_checkpointing_changes_no_bit(
    healed: Path, source: Path, folded: Path, text: Path, tmp_path: Path
) -> None:
    heal(folded, tmp_path / "out", source, [text], **OPTIONS, gradient_checkpointing=True)
    assert same(tmp_path / "out", healed)


def test_lora_is_merged(source: Path, folded: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    options = {**OPTIONS, "lora_rank": 4}
    record = heal(folded, tmp_path / "out", source, [text], **options)
    before, after = (r for r in record["heal"]["quality"] if r["name"] != "source")
    assert after["kl"] < before["kl"]
    old, new = weights(folded), weights(tmp_path / "out")
    assert old.keys() == new.keys()
    # Apart from balancing, what was added to q has the rank of LoRA.
    name = "model.layers.0.self_attn.q_proj.weight"
    rows = old[name].shape[0]
    scale = (new[name] * old[name]).sum() / old[name].square().sum()
    power = 2.0 ** torch.log2(scale).round()
    assert torch.linalg.matrix_rank(new[name] - power * old[name], rtol=1e-4) <= 4 < rows


def test_the_rate_rises_then_falls_to_nothing() -> None:
    rates = [rate_factor(step, 100, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert all(a > b for a, b in pairwise(rates[9:]))
    assert 0 < rates[-1] < 1e-3
