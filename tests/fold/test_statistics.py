"""What is gathered of a layer, against sums over every query and every key in float64."""

from dataclasses import replace

import pytest
import torch

from kvfold.fold.pairs import Pairs
from kvfold.fold.statistics import StatisticsCollector
from kvfold.fold.stream import AttentionCall

WINDOWS, TOKENS, SIZE, HEADS, KV_HEADS, FREQUENCIES = 2, 7, 6, 4, 2, 3
PAIRS = Pairs(2 * FREQUENCIES)
# Inputs and attention are float32: sums over 14 tokens of products of order one.
TOLERANCE = 1e-5


def layer() -> tuple[torch.Tensor, torch.Tensor, AttentionCall]:
    """Inputs ``[B, T, C]``, rows ``[Hkv, D, C + 1]``, and the attention they lead to."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    inputs, rows = random(WINDOWS, TOKENS, SIZE), random(KV_HEADS, PAIRS.rotary_dim, SIZE + 1)
    ones = torch.ones(WINDOWS, TOKENS, 1)
    keys = torch.einsum("btx,gdx->bgtd", torch.cat([inputs, ones], -1), rows)
    pairs, rest = PAIRS.split(keys.mT)
    turned = PAIRS.join(turns().mT.to(pairs.dtype) * pairs, rest).mT
    queries = random(WINDOWS, HEADS, TOKENS, PAIRS.rotary_dim)
    return inputs, rows.double(), AttentionCall(queries, turned, turned, None, 0.4, None)


def turns() -> torch.Tensor:
    """``[T, F]``, e^(i w t)."""
    angles = torch.arange(TOKENS)[:, None] * torch.tensor([1.0, 0.3, 0.05], dtype=torch.float64)
    return torch.polar(torch.ones_like(angles), angles)


def within(a: torch.Tensor, b: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The covariance ``[F, Hkv, Hkv]`` of keys ``[Hkv, F, T]`` within one query's attention."""
    a = a - (a * weights).sum(-1, keepdim=True)
    b = b - (b * weights).sum(-1, keepdim=True)
    return torch.einsum("aft,bft,t->fab", a, b.conj(), weights.to(a.dtype))


def test_keys_are_weighed_by_the_energy_of_queries() -> None:
    inputs, _, call = layer()
    collector = StatisticsCollector(SIZE, PAIRS, torch.device("cpu"))
    collector.attention_input(inputs)
    collector.call(call)
    found = collector.result().key_moments
    assert found is not None
    k = PAIRS.split(call.key.mT)[0].to(torch.complex128)
    energy = PAIRS.split(call.query.mT)[0].abs().square().double()  # [B, Hq, F, T]
    p = call.probabilities().double()
    wanted = torch.zeros_like(found)
    for b in range(WINDOWS):
        for t in range(TOKENS):
            for head in range(HEADS):
                covariance = within(k[b], k[b], p[b, head, t])
                weight = energy[b, head, :, t, None, None]
                wanted[head * KV_HEADS // HEADS] += weight * covariance
    wanted /= WINDOWS * TOKENS
    torch.testing.assert_close(found, wanted, rtol=TOLERANCE, atol=TOLERANCE)


def test_attended_keys_are_covariances_within_attention() -> None:
    inputs, rows, call = layer()
    collector = StatisticsCollector(SIZE, PAIRS, torch.device("cpu"), rows)
    collector.attention_input(inputs)
    collector.call(call)
    result = collector.result()
    found = result.attended
    assert found is not None
    assert result.covariance is not None
    x = torch.cat([inputs, torch.ones(WINDOWS, TOKENS, 1)], -1).double()
    k = PAIRS.split(torch.einsum("btx,gdx->bgdt", x, rows))[0]  # [B, Hkv, F, T]
    p = call.probabilities().double()
    u = turns()
    turned = torch.zeros(HEADS, FREQUENCIES, KV_HEADS, KV_HEADS, dtype=torch.complex128)
    still, covariance = torch.zeros_like(turned), torch.zeros(SIZE + 1, SIZE + 1).double()
    for b in range(WINDOWS):
        for t in range(TOKENS):
            seen = k[b] * (u[t].conj() * u).mT  # as query t sees them, [Hkv, F, T]
            for head in range(HEADS):
                weights = p[b, head, t]

                turned[head] += within(seen, k[b], weights)
                still[head] += within(k[b], k[b], weights)
                if head == (t + b) % HEADS:
                    apart = x[b] - weights @ x[b]
                    covariance += apart.T @ (weights[:, None] * apart)
    count = WINDOWS * TOKENS
    torch.testing.assert_close(found.turned, turned / count, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(found.still, still / count, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(
        result.covariance, covariance / count, rtol=TOLERANCE, atol=TOLERANCE
    )


def test_windows_are_heard_apart_as_they_are_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a mask for each of them, too."""
    inputs, rows, call = layer()
    mask = torch.ones(WINDOWS, 1, TOKENS, TOKENS, dtype=torch.bool).tril()
    mask[1, :, 3:, 1] = False
    results = []
    for scores in (1, 10**9):
        monkeypatch.setattr("kvfold.fold.statistics._SCORES", scores)
        collector = StatisticsCollector(SIZE, PAIRS, torch.device("cpu"), rows)
        collector.attention_input(inputs)
        collector.call(replace(call, mask=mask))
        results.append(collector.result())
    apart, together = results
    assert apart.attended is not None
    assert together.attended is not None
    for one, other in (
        (apart.moment, together.moment),
        (apart.value_moment, together.value_moment),
        (apart.covariance, together.covariance),
        (apart.key_moments, together.key_moments),
        (apart.attended.turned, together.attended.turned),
        (apart.attended.still, together.attended.still),
    ):
        torch.testing.assert_close(one, other, rtol=TOLERANCE, atol=TOLERANCE)


def test_nothing_is_gathered_that_nobody_asked_for() -> None:
    inputs, _, call = layer()
    collector = StatisticsCollector(SIZE, PAIRS, torch.device("cpu"))
    collector.attention_input(inputs)
    collector.call(call)
    assert collector.result().attended is None


def test_a_layer_without_rotary_has_no_frequencies() -> None:
    inputs, rows, call = layer()
    collector = StatisticsCollector(SIZE, Pairs(0), torch.device("cpu"), rows)
    collector.attention_input(inputs)
    collector.call(call)
    attended = collector.result().attended
    assert attended is not None
    assert attended.turned.shape == attended.still.shape == (HEADS, 0, KV_HEADS, KV_HEADS)
