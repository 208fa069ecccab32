"""A GQA model in disguise folds back to itself: repeated, scrambled, permuted.

The grouping is not given; it must be found from the weights. Tolerance: 1e-4 on float32 logits
of order one, about a hundred times what rounding alone costs in two layers.
"""

import pytest
import torch

from kvfold.fold.model import fold_model
from tests.toolbox import tiny

TOLERANCE = 1e-4
PHASES_ONLY = ("qwen3", "gemma3_text")


@pytest.fixture(params=list(tiny.EVERY))
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_the_disguise_is_exact(case: str) -> None:
    model = tiny.make(case)
    ids = tiny.tokens()
    hidden = tiny.hidden_mha(model)
    assert tiny.kv_heads(hidden) == model.config.num_attention_heads
    torch.testing.assert_close(
        tiny.logits(hidden, ids), tiny.logits(model, ids), atol=TOLERANCE, rtol=0
    )


@pytest.mark.parametrize("method", ["pca", "auto"])
@pytest.mark.parametrize("calibrated", [False, True], ids=["data-free", "calibrated"])
def test_folding_back_is_exact(case: str, method: str, calibrated: bool) -> None:
    model = tiny.make(case)
    hidden = tiny.hidden_mha(model)
    windows = tiny.tokens(8, 32, seed=5) if calibrated else None
    kv_heads = tiny.kv_heads(model)
    folded = fold_model(hidden, kv_heads, method=method, fit="none", windows=windows)
    ids = tiny.tokens()
    torch.testing.assert_close(
        tiny.logits(folded.model, ids), tiny.logits(model, ids), atol=TOLERANCE, rtol=0
    )
    for layer in folded.record:
        assert layer["captured_value"] > 1 - 1e-6
        assert layer["captured_key"] > 1 - 1e-6


def test_mean_pooling_fails_by_design(case: str) -> None:
    model = tiny.make(case)
    folded = fold_model(tiny.hidden_mha(model), 2 if "odd" not in case else 3, "mean", "none").model
    ids = tiny.tokens()
    assert (tiny.logits(folded, ids) - tiny.logits(model, ids)).abs().max() > 100 * TOLERANCE


def test_gpt2_folds_back_to_the_bigcode_it_came_from() -> None:
    """Without rotary the gauges of K are full matrices, and K biases cancel."""
    bigcode = tiny.make_bigcode()
    hidden = tiny.gpt2_of(bigcode)
    ids = tiny.tokens()
    expected = tiny.logits(bigcode, ids)
    torch.testing.assert_close(tiny.logits(hidden, ids), expected, atol=TOLERANCE, rtol=0)
    for windows in (None, tiny.tokens(8, 32, seed=5)):
        folded = fold_model(hidden, 1, "pca", "none", windows).model
        torch.testing.assert_close(tiny.logits(folded, ids), expected, atol=TOLERANCE, rtol=0)


def test_aligned_undoes_rotations() -> None:
    """Procrustes keeps lengths, so it is exact for orthogonal gauges and phases."""
    model = tiny.make("llama")
    heads = []
    for layer in map(tiny.repeated, tiny.all_heads(model)):
        generator = torch.Generator().manual_seed(3)
        pairs, rest = layer.pairs.split(layer.k)
        q_pairs, q_rest = layer.pairs.split(layer.q)
        turn = torch.polar(
            torch.ones(pairs.shape[:2], dtype=torch.float64),
            6.28 * torch.rand(pairs.shape[:2], generator=generator, dtype=torch.float64),
        )[..., None]
        layer.k = layer.pairs.join(turn * pairs, rest)
        layer.q = layer.pairs.join(turn[:, None] * q_pairs, q_rest)
        noise = torch.randn(len(layer.v), 8, 8, generator=generator, dtype=torch.float64)
        rotation = torch.linalg.qr(noise).Q
        layer.v, layer.o = rotation @ layer.v, layer.o @ rotation.mT[:, None]
        heads.append(layer)
    hidden = tiny.with_kv_heads(model, heads)
    folded = fold_model(hidden, 2, "aligned", "none").model
    ids = tiny.tokens()
    torch.testing.assert_close(
        tiny.logits(folded, ids), tiny.logits(model, ids), atol=TOLERANCE, rtol=0
    )


@pytest.mark.parametrize("fit", ["refit", "local"])
def test_fitting_does_not_spoil_an_exact_fold(fit: str) -> None:
    """The fold is already the minimum: a closed-form refit must leave it there."""
    model = tiny.make("llama")
    windows = tiny.tokens(16, 64, seed=5)
    folded = fold_model(tiny.hidden_mha(model), 2, "pca", fit, windows).model
    ids = tiny.tokens()
    loss = (tiny.logits(folded, ids) - tiny.logits(model, ids)).abs().max()
    assert loss < (TOLERANCE if fit == "refit" else 0.05)


@pytest.mark.parametrize("fit", ["none", "refit", "local"])
@pytest.mark.parametrize("case", ["llama", "phi3", "gemma2", "starcoder2"])
def test_the_source_stays_as_it_was(case: str, fit: str) -> None:
    """Fitting works in place on copies, not on the model's own tensors."""
    model = tiny.make(case)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fold_model(model, 1, "mean", fit, None if fit == "none" else tiny.tokens(16, 64, seed=5))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_drift_is_how_far_hidden_states_have_come() -> None:
    model = tiny.hidden_mha(tiny.make("llama"))
    windows = tiny.tokens(16, 64, seed=5)
    found = fold_model(model, 1, "mean", "refit", windows)
    with torch.no_grad():
        before, after = (
            net(windows, output_hidden_states=True).hidden_states[1] for net in (model, found.model)
        )
    expected = ((after - before).norm(dim=-1) / before.norm(dim=-1)).median()
    drifts = [layer["drift"] for layer in found.record]
    assert drifts[0] == pytest.approx(float(expected), rel=1e-4)
    assert drifts[0] > 0.01
    assert fold_model(model, 1, "mean", "none").record[0]["drift"] is None
