"""The attention layer in training."""

import pytest
import torch

from kvfold.nn import Rotary
from tests.toolbox.nn_cases import F32, close, layer, repeated, tokens


def test_gradients_are_those_of_repeat_kv_attention() -> None:
    gqa = layer(24, 6, 2, rotary=Rotary(4))
    mha, x, y = repeated(gqa), tokens(2, 7, 24), tokens(2, 7, 24, seed=3)
    for one in (gqa, mha):
        torch.autograd.backward((one(x) * y).sum())
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        mine, theirs = (getattr(one, name).weight.grad for one in (gqa, mha))
        if name in ("k_proj", "v_proj"):  # a shared head's gradient is the sum of its copies'
            theirs = theirs.unflatten(0, (2, 3, 4)).sum(1).flatten(0, 1)
        close(mine, theirs, 24 * 14)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradients_are_numerical_derivatives(softcap: float | None) -> None:
    exact = layer(
        4, 2, 1, head_dim=4, rotary=Rotary(2), qk_norm=1e-3, qkv_bias=True, softcap=softcap
    )
    names, values = zip(*exact.named_parameters(), strict=True)

    def call(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        named = dict(zip(names, weights, strict=True))
        out = torch.func.functional_call(exact, named, (x,))
        assert isinstance(out, torch.Tensor)
        return out

    x = tokens(1, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(call, (x, *values), fast_mode=True)


def test_low_precision_gradients_are_near_the_exact_ones() -> None:
    exact, x = layer(32, 4, 2, rotary=Rotary(8)), tokens(2, 9, 32)
    single = layer(32, 4, 2, rotary=Rotary(8)).float()
    torch.autograd.backward([exact(x).square().sum(), single(x.float()).square().sum()])
    for mine, truth in zip(single.parameters(), exact.parameters(), strict=True):
        close(mine.grad, truth.grad, 32 * 18, F32)


def test_dropout_only_in_training() -> None:
    dropping, x = layer(24, 4, 2, dropout=0.5), tokens(2, 9, 24)
    same = layer(24, 4, 2)(x)
    assert torch.equal(dropping(x), same)
    dropping.train()
    assert not torch.allclose(dropping(x), same)
    with torch.inference_mode():
        single = dropping.float()
        cached = single(x.float(), cache=single.new_cache(2))
    close(cached, same, 24, F32)
