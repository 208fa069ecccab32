"""Tokens that texts begin with: which are taken, that they are run rightly, and what they gain."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvfold.arch.target import Latent
from kvfold.fold.fit import RIDGE, Damping, FitTask, _solve
from kvfold.fold.hidden import FIRST, TEXT, HiddenStates, Windows
from kvfold.fold.model import fold_model
from kvfold.fold.passes import loader
from kvfold.fold.stored_layer import StoredLayer
from kvfold.fold.stream import LayerStream
from kvfold.fold.windows import first_tokens
from kvfold.healing.local import heal_layers
from kvfold.progress import no_progress
from tests.toolbox import tiny

CPU = torch.device("cpu")


def test_half_are_of_the_text_and_half_are_spread_over_the_vocabulary() -> None:
    windows = torch.arange(90_000, 96_000).reshape(6, 1000)
    found = first_tokens(windows, 100_000)
    assert found is not None
    assert found.unique().equal(found)
    of_text = found[(found >= 90_000) & (found < 96_000)]
    assert 1000 <= len(of_text) <= 1024 + 62, "six thousand, of which every sixth is taken"
    assert 1000 + len(of_text) - 62 <= len(found) <= 2048
    gaps = found[found < 90_000].diff()
    assert (gaps == gaps[0]).all()


def test_of_a_small_vocabulary_all_are_taken() -> None:
    found = first_tokens(torch.tensor([[5, 6], [7, 8]]), 96)
    assert found is not None
    assert found.tolist() == list(range(96))


def test_none_are_needed_where_every_text_begins_alike() -> None:
    assert first_tokens(torch.tensor([[1, 6], [1, 8]]), 96) is None


@pytest.mark.parametrize("case", ["llama", "mistral", "gemma2", "smollm3", "gpt_oss"])
def test_texts_of_two_lengths_are_run_as_the_model_runs_them(case: str) -> None:
    """Masks and rotary tables are those of each length."""
    model = tiny.make(case)
    checkpoint = tiny.checkpoint_of(model)
    family = checkpoint.family
    texts = [tiny.tokens(3, 32, seed=5), torch.arange(96)[:, None]]
    states = HiddenStates([(3, 32), (96, 1)], checkpoint.geometry.hidden_size, CPU)
    stream = LayerStream(checkpoint.config, family, CPU)
    stream.start(texts, loader(checkpoint), states)
    found = [[states[Windows(text, slice(None))].clone()] for text in (TEXT, FIRST)]
    with torch.no_grad():
        for index in range(checkpoint.geometry.num_layers):
            with stream.layer(index, StoredLayer(checkpoint, index).below()) as live:
                for batch in states.batches():
                    states[batch] = live(states[batch])
            for text in (TEXT, FIRST):
                found[text].append(states[Windows(text, slice(None))].clone())
        wanted = [model(ids, output_hidden_states=True).hidden_states for ids in texts]
    for text in (TEXT, FIRST):
        # transformers puts the final norm on the last
        for ours, theirs in list(zip(found[text], wanted[text], strict=True))[:-1]:
            assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


def error_of_first_tokens(fit: str, windows: torch.Tensor, ids: torch.Tensor) -> float:
    """Of logits after one token, relative, median over ``ids``."""
    source = tiny.make("llama")
    folded = fold_model(source, Latent(12, 4, layout="youtu"), "latent", fit, windows).model
    wanted, found = (tiny.logits(model, ids[:, None])[:, 0] for model in (source, folded))
    return float(((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).median())


@pytest.mark.parametrize("fit", ["refit", "local"])
def test_what_no_text_begins_with_is_fitted_as_well(
    fit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = tiny.tokens(32, 32, seed=5) % 64
    windows[:, 0] = torch.arange(32) % 2 + 3  # two tokens begin all texts
    others = torch.arange(64, 96)  # of which the text knows nothing
    with_them = error_of_first_tokens(fit, windows, others)
    monkeypatch.setattr("kvfold.fold.loop.first_tokens", lambda *given: None)
    without = error_of_first_tokens(fit, windows, others)
    assert with_them < 0.9 * without


@pytest.mark.parametrize(
    ("target", "method"), [(1, "pca"), (Latent(12, 4, layout="youtu"), "latent")]
)
def test_what_is_fitted_is_fitted_and_healed_with_them(
    target: int | Latent, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, windows = tiny.make("llama"), tiny.tokens(8, 32, seed=5)
    seen = []

    def spy(*given: Any) -> torch.Tensor | None:
        seen.append(first_tokens(*given))
        return seen[-1]

    monkeypatch.setattr("kvfold.fold.loop.first_tokens", spy)
    folded = fold_model(source, target, method, "none", windows).model
    assert not seen
    fold_model(source, target, method, "refit", windows)
    models = (tiny.checkpoint_of(source), tiny.checkpoint_of(folded))
    heal_layers(*models, windows, tmp_path, 0, no_progress)
    assert [None if ids is None else len(ids) for ids in seen] == [tiny.VOCABULARY] * 2


def test_first_tokens_of_giant_norm_count_by_the_root_of_their_energy_less() -> None:
    """64 of 16 times the usual energy count as 16 of the text do, not as 64."""
    states = HiddenStates([(8, 8), (64, 1)], 3, CPU)
    text = torch.randn(8, 8, 3, generator=torch.Generator().manual_seed(0)).sign()
    states[Windows(TEXT, slice(None))] = text
    states[Windows(FIRST, slice(None))] = 4 * text.reshape(64, 1, 3)
    damping = Damping.of(states)
    assert damping.factors(states[Windows(TEXT, slice(None))]).equal(torch.ones(8, 8))
    assert damping.factors(states[Windows(FIRST, slice(None))]).equal(torch.full((64, 1), 0.25))

    linear = torch.nn.Linear(2, 1, bias=False).requires_grad_(False)
    linear.weight.zero_()
    live: Any = SimpleNamespace(module=torch.nn.ModuleDict({"o": linear}))
    task = FitTask(live, "o", None, states, states, states, states, 1.0, 1.0, True, 0, 1)
    inputs = torch.tensor([1.0, 0])  # one at all tokens, of which each kind wants something else
    pairs = {
        TEXT: (inputs.expand(8, 8, 2), torch.ones(8, 8, 1)),
        FIRST: (inputs.expand(64, 1, 2), torch.zeros(64, 1, 1)),
    }
    _solve(task, "o", lambda windows: pairs[windows.text])
    ridge = RIDGE * (64 + 16) / 2  # of the mean over both inputs
    assert float(linear.weight[0, 0]) == pytest.approx(64 / (64 + 16 + ridge), rel=1e-6)
