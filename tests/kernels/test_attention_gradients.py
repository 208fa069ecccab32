"""``kvfold.attention`` in training: gradients against numerical derivatives, and dropout."""

import math
from typing import Any

import pytest
import torch

import kvfold
from tests.toolbox.attention_cases import (
    distance,
    noise,
    qkv,
    slopes,
)


@pytest.mark.parametrize(
    "options",
    [
        {}, {"causal": False}, {"window": 3, "sinks": 1}, {"softcap": 2.0}, {"return_lse": True},
        {"start": torch.tensor([2, 5]), "lengths": torch.tensor([6, 5])},
        {"window": (1, 1), "causal": False},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("tokens", [1, 4])
def test_gradients(options: dict[str, Any], tokens: int) -> None:
    q, k, v = (x.double().requires_grad_() for x in qkv(2, (4, 2), tokens, 6, (3, 2)))

    def call(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = kvfold.attention(given[0], given[1], given[2], **options)
        if isinstance(found, torch.Tensor):
            return (found,)
        return found[0], found[1].nan_to_num(neginf=0)

    assert torch.autograd.gradcheck(call, (q, k, v))


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize(
    "options",
    [
        {}, {"causal": False}, {"window": 2}, {"softcap": 2.0}, {"return_lse": True},
        {"start": torch.tensor([2, 6])}, {"start": torch.tensor([2, 6]), "return_lse": True},
        {"scale": 1e-4},
    ],
    ids=str,
)  # fmt: skip
def test_gradients_reach_sink_logits(options: dict[str, Any], tokens: int) -> None:
    """Those of q, k, v and the logits, also where a query sees nothing but the sink."""
    q, k, v = (x.double().requires_grad_() for x in qkv(2, (4, 2), tokens, 6, (3, 2)))
    logits = noise(4, seed=7).double().requires_grad_()

    def call(*given: torch.Tensor) -> Any:
        return kvfold.attention(*given[:3], sink_logits=given[3], **options)

    assert torch.autograd.gradcheck(call, (q, k, v, logits))
    frozen = [x.detach() for x in (q, k, v)]
    out = call(*frozen, logits)
    assert (out[0] if isinstance(out, tuple) else out).requires_grad


@pytest.mark.parametrize(
    "options", [{}, {"alibi": True}, {"mask": True}, {"softcap": 3.0}], ids=str
)
def test_gradients_of_invisible_keys_are_zero(options: dict[str, Any]) -> None:
    """Left padding longer than the first queries: no NaN, nothing flows to what is hidden."""
    q, k, v = (x.requires_grad_() for x in qkv(1, (4, 2), 12, 12))
    extra: dict[str, Any] = {key: value for key, value in options.items() if key == "softcap"}
    if "alibi" in options:
        extra["alibi_slopes"] = slopes(4).requires_grad_()
    if "mask" in options:
        extra["mask"] = noise(12, 12, seed=5).requires_grad_()
    out = torch.as_tensor(kvfold.attention(q, k, v, start=torch.tensor([7]), **extra))
    out.square().sum().backward()
    for x in (q, k, v):
        assert x.grad is not None
        assert bool(x.grad.isfinite().all())
        assert torch.equal(x.grad[:, :, :7], torch.zeros_like(x.grad[:, :, :7]))
        assert float(x.grad[:, :, 7:].abs().max()) > 0


@pytest.mark.parametrize("tokens", [1, 40])
def test_dropout_keeps_the_mean(tokens: int) -> None:
    """The average over draws nears the output without dropout; its spread is that of weights.

    With p = 1/n for n keys and values of size one, a draw's variance is about
    rate / (1 - rate) * sum p^2 = 0.25 / n for scores this small; 5 standard errors are allowed.
    """
    q, k, v = qkv(1, (2, 1), tokens, 64, (16, 16))
    q = q * 0.1
    torch.manual_seed(0)
    given: dict[str, Any] = {"causal": False}
    exact = torch.as_tensor(kvfold.attention(q, k, v, **given))
    draws = torch.stack(
        [torch.as_tensor(kvfold.attention(q, k, v, **given, dropout=0.2)) for _ in range(400)]
    )
    spread = float(draws.std(0).mean())
    assert 0.5 * math.sqrt(0.25 / 64) < spread < 2 * math.sqrt(0.25 / 64)
    assert distance(draws.mean(0), exact) < 5 * float(draws.std(0).max()) / math.sqrt(400)
