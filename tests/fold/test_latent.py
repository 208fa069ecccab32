"""Folding to latent attention: exact where the source is one in disguise."""

import pytest
import torch

from kvfold.arch.target import Latent
from kvfold.fold.methods import all_methods
from kvfold.fold.model import fold_model
from tests.toolbox import tiny

# Rounding costs 1e-6 of logits of order one in two layers of float32; the constant in the latent
# (fold.constant) adds |c|^2 / 2 s^2 of what attention puts out: below 1e-6 for latents of length
# 50 at s = 32,768. A hundred times both, as tests of heads allow.
TOLERANCE = 1e-4
RANK, ROTARY = 20, 4
METHODS = [name for name, method in all_methods().items() if Latent in method.targets]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("calibrated", [False, True], ids=["data-free", "calibrated"])
def test_a_latent_in_disguise_folds_back_to_its_logits(method: str, calibrated: bool) -> None:
    source = tiny.hidden_mla("llama", RANK)
    windows = tiny.tokens(8, 32, seed=5) if calibrated else None
    target = Latent(RANK + 1, ROTARY, layout="youtu")
    folded = fold_model(source, target, method, "none", windows)
    ids = tiny.tokens()
    torch.testing.assert_close(
        tiny.logits(folded.model, ids), tiny.logits(source, ids), atol=TOLERANCE, rtol=0
    )
    for layer in folded.record:
        assert layer["captured_value"] > 1 - 1e-6
        assert layer["captured_key"] > 1 - 1e-6


def test_one_number_less_is_not_exact() -> None:
    source = tiny.hidden_mla("llama", RANK)
    folded = fold_model(source, Latent(RANK, ROTARY, layout="youtu"), "latent", "none").model
    ids = tiny.tokens()
    assert (tiny.logits(folded, ids) - tiny.logits(source, ids)).abs().max() > 100 * TOLERANCE
