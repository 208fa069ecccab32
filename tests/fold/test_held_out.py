"""Text that is held out of a conversion: it is measured as `eval` would, and changes nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch

from kvfold import convert
from kvfold.arch.target import Grouped, Latent, Target
from kvfold.checkpoint.source import Checkpoint, TensorDict
from kvfold.fold.layer import FoldedLayer, FoldPlan
from kvfold.fold.loop import fold_all
from kvfold.fold.model import fold_model
from kvfold.fold.passes import Calibration
from kvfold.fold.windows import cut
from kvfold.quality.scores import compare
from tests.toolbox import tiny

WINDOWS, HELD_OUT = tiny.tokens(16, 64, seed=3), tiny.tokens(5, 64, seed=4)


def folded_layers(model: Any, target: Target, held_out: torch.Tensor | None) -> list[FoldedLayer]:
    checkpoint = Checkpoint("tiny", model.config.to_dict(), TensorDict(model.state_dict()))
    plan = FoldPlan(target, "auto", "refit", 0)
    return list(fold_all(checkpoint, plan, Calibration(WINDOWS, held_out=held_out)))


ONE = Grouped(1)
LATENT = Latent(20, 4, layout="youtu")


@pytest.mark.parametrize(
    ("case", "target"),
    [
        *(
            (case, ONE)
            for case in ("llama", "llama-wide-tied", "gemma2", "granite", "cohere", "phi")
        ),
        ("llama", LATENT),
        ("granite", LATENT),
    ],
)
def test_it_is_measured_as_whole_models_are(case: str, target: Any) -> None:
    """Behind the last layer: norms, factors and softcaps of the logits, tied embeddings."""
    model = tiny.make(case)
    last = folded_layers(model, target, HELD_OUT)[-1]
    assert last.held_out is not None
    asked = 1 if target is ONE else target
    made = fold_model(model, asked, "auto", "refit", WINDOWS).model
    _, whole = compare([("source", model), ("folded", made)], HELD_OUT)
    for name in ("nats_lost", "nats_lost_error", "kl", "kl_error", "top1"):
        wanted = getattr(whole, name)
        # Sums of float32 logits in another order.
        assert last.held_out[name] == pytest.approx(wanted, rel=1e-3, abs=2e-5), name
    assert last.held_out["tokens"] == whole.tokens
    assert last.held_out["source_nll"] == pytest.approx(whole.nll - whole.nats_lost, abs=1e-5)


@pytest.mark.parametrize("target", [ONE, LATENT])
def test_it_changes_nothing(target: Any) -> None:
    model = tiny.make("llama")
    for plain, beside in zip(
        folded_layers(model, target, None), folded_layers(model, target, HELD_OUT), strict=True
    ):
        assert plain.held_out is None
        assert (plain.drift, plain.stages) == (beside.drift, beside.stages)
        for name, tensor in plain.tensors.items():
            assert torch.equal(tensor, beside.tensors[name]), name


@pytest.mark.parametrize(
    ("count", "tokens", "used", "held_out"),
    [(100, 640, 10, 8), (12, 640, 10, 2), (64, 640 * 64, 60, 4), (9, 640 * 9, 9, 0)],
)
def test_no_window_is_both(count: int, tokens: int, used: int, held_out: int) -> None:
    windows = torch.arange(count)[:, None].expand(-1, 64)
    found = cut(windows, tokens)
    chosen, others = set(found.calibration[:, 0].tolist()), set(found.held_out[:, 0].tolist())
    assert (len(found.calibration), len(found.held_out)) == (used, held_out)
    assert (len(chosen), len(others)) == (used, held_out)
    assert not chosen & others


def test_the_record_and_the_command_say_it(
    kvfold: Any, llama_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    small: list[object] = [
        "--calibration",
        text_file,
        "--calibration-tokens",
        1024,
        "--context",
        64,
    ]
    run = kvfold(
        "convert", llama_folder, tmp_path / "out", "--kv-heads", 1, "--fit", "refit", *small
    )
    assert run.code == 0, run.err
    assert "next: kvfold heal" in run.err
    record = convert(llama_folder, tmp_path / "again", 1, fit="refit", calibration=[text_file],
                     calibration_tokens=1024, context=64)  # fmt: skip
    assert f"{record['held_out']['nats_lost']:.3f}" in run.out
    assert f"nats lost, {record['held_out']['tokens']:,} held-out tokens" in run.out
