"""What models are run on, when they are run at all, and that both begin with their own weights."""

from pathlib import Path
from typing import Any

import pytest
import torch

from kvfold import convert
from kvfold.checkpoint.source import Checkpoint, TensorDict
from kvfold.fold import hidden
from kvfold.fold.hidden import HiddenStates, Windows
from kvfold.fold.model import fold_model
from kvfold.fold.stream import AttentionCall, _attention
from kvfold.healing.local import heal_layers
from kvfold.progress import no_progress
from tests.toolbox import tiny

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"calibration_tokens": 1024, "context": 64}


def test_more_steps_fit_better() -> None:
    model, windows = tiny.make("llama"), tiny.tokens(16, 32, seed=5)

    def error(steps: int) -> float:
        folded = fold_model(model, 1, "pca", "local", windows, dtype="float32", fit_steps=steps)
        stage = folded.record[0]["stages"][0]
        assert stage["stage"] == "fit_attention"
        return float(stage["error_after"])

    errors = [error(steps) for steps in (1, 10, 100)]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.9 * errors[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_states_are_the_same_in_a_file(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hidden, "SPILL_BYTES", 100)
    shapes, size = [(5, 4), (9, 1)], 3
    in_file = HiddenStates(shapes, size, CPU, tmp_path / "below" / "states", dtype)
    in_memory = HiddenStates(shapes, size, CPU, None, dtype)
    small = HiddenStates([(1, 4)], size, CPU, tmp_path / "small", dtype)
    assert (tmp_path / "below" / "states").stat().st_size == (60 + 27) * dtype.itemsize
    assert not (tmp_path / "small").exists(), "what is small stays in memory"
    assert small.shapes == ((1, 4),)
    in_file.room.tokens = in_memory.room.tokens = 8
    texts = [torch.randn(*shape, size).to(dtype) for shape in shapes]
    for states in (in_file, in_memory):
        batches = list(states.batches())
        assert [(batch.text, batch.which) for batch in batches] == [
            *((0, slice(*ends)) for ends in ((0, 2), (2, 4), (4, 5))),
            *((1, slice(*ends)) for ends in ((0, 8), (8, 9))),
        ]
        for batch in batches:
            states[batch] = texts[batch.text][batch.which]
        for text, values in enumerate(texts):
            assert torch.equal(states[Windows(text, torch.tensor([4, 0]))], values[[4, 0]])
            assert torch.equal(states[Windows(text, slice(None))], values)


@pytest.mark.parametrize("fit", ["none", "refit"])
def test_nothing_is_run_for_layers_that_are_done(
    llama_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fit: str
) -> None:
    """Killed while it writes, a run is taken up without its text."""

    class Stop(BaseException):
        pass

    def stop(label: str, done: int, total: int) -> None:
        if label == "writing":
            raise Stop

    arguments: dict[str, Any] = {"fit": fit, "calibration": [text_file], **SMALL}
    with pytest.raises(Stop):
        convert(llama_folder, tmp_path / "out", 2, progress=stop, **arguments)
    monkeypatch.setattr("kvfold.fold.loop.SourcePass", None)  # calling it would fail
    convert(llama_folder, tmp_path / "out", 2, resume=True, **arguments)


def test_healing_runs_the_folded_model_on_its_own_embeddings(tmp_path: Path) -> None:
    """Those of a model that was healed as a whole are not its source's any more."""
    model = tiny.make("llama")
    windows = tiny.tokens(8, 32, seed=5)
    found = []
    for scale in (1.0, 1.5):
        state = dict(model.state_dict())
        state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"] * scale
        student = Checkpoint("folded", model.config.to_dict(), TensorDict(state))
        folder = tmp_path / str(scale)
        _, reports = heal_layers(
            tiny.checkpoint_of(model), student, windows, folder, 0, no_progress
        )
        found.append(reports[0]["stages"][0]["error_before"])
    assert found[0] == pytest.approx(0, abs=1e-9)
    assert found[1] > 0.01


@pytest.mark.parametrize("masked", [None, "window", "added"])
@pytest.mark.parametrize("value_dim", [8, 16])
def test_sinks_take_attention_away(masked: str | None, value_dim: int) -> None:
    """As a further logit of each head, whose value is zero; from weights and from outputs alike."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, heads, 12, dim, generator=generator, dtype=torch.float64)
        for heads, dim in ((6, 16), (2, 16), (2, value_dim))
    )
    sinks = torch.randn(6, generator=generator, dtype=torch.float64)
    seen = torch.ones(12, 12, dtype=torch.bool).tril()
    mask = None
    if masked:
        seen = seen.triu(-4)
        mask = seen[None, None]
    if masked == "added":
        mask = torch.zeros(1, 1, 12, 12, dtype=torch.float64).masked_fill(~seen, -torch.inf)
    scores = (query @ key.repeat_interleave(3, 1).mT * 0.25).masked_fill(~seen, -torch.inf).exp()
    weights = scores / (scores.sum(-1, keepdim=True) + sinks.exp()[:, None, None])
    call = AttentionCall(query, key, value, mask, 0.25, None, sinks)
    assert (call.probabilities() - weights).abs().max() < 1e-14
    module = torch.nn.Module()
    module.num_key_value_groups = 3  # type: ignore[assignment]
    found, _ = _attention(module, query, key, value, mask, 0.25, s_aux=sinks)
    wanted = (weights @ value.repeat_interleave(3, 1)).transpose(1, 2)
    assert (found - wanted).abs().max() < 1e-14 * 12 * value.abs().max()


@pytest.mark.parametrize("value_dim", [8, 16, 24])
def test_narrow_values_are_attended_alike(value_dim: int) -> None:
    """Without gradients values narrower than keys, as a latent's are, are padded."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, heads, 12, dim, generator=generator, dtype=torch.float64)
        for heads, dim in ((6, 16), (2, 16), (2, value_dim))
    )
    module = torch.nn.Module()
    module.num_key_value_groups = 3  # type: ignore[assignment]
    call = AttentionCall(query, key, value, None, 0.25, None)
    groups = call.probabilities().unflatten(1, (2, 3))
    wanted = (groups @ value[:, :, None]).flatten(1, 2).transpose(1, 2)
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            found, _ = _attention(module, query, key, value, None, 0.25, is_causal=True)
        assert found.shape == (2, 12, 6, value_dim)
        assert (found - wanted).abs().max() < 1e-14 * 12 * value.abs().max()
