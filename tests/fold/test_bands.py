"""Low frequencies folded together, and the sample of inputs that says whether that is better."""

import math
from dataclasses import replace

import pytest
import torch

from kvfold.fold import sample as module
from kvfold.fold.bands import lowest, shared_band, widths
from kvfold.fold.heads import HeadGroup
from kvfold.fold.methods.pca import principal_keys
from kvfold.fold.pairs import Pairs
from kvfold.fold.sample import Projected, Sample
from kvfold.fold.subspace import centred

SIZE, KV_HEADS, TIMES, FREQUENCIES, TOKENS = 20, 2, 2, 16, 24
PAIRS = Pairs(2 * FREQUENCIES)
FAST = torch.logspace(0, -1, FREQUENCIES, dtype=torch.float64)
SLOW = torch.cat([FAST[:12], torch.full((4,), 1e-7, dtype=torch.float64)])


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def inputs() -> torch.Tensor:
    return torch.cat([random(2, TOKENS, SIZE, seed=3), torch.ones(2, TOKENS, 1).double()], -1)


def sample(frequencies: torch.Tensor) -> Sample:
    return Sample(inputs().float(), frequencies, 0.2)


def group(keys: torch.Tensor, frequencies: torch.Tensor) -> HeadGroup:
    x = inputs().flatten(0, 1)
    moment = x.T @ x / len(x)
    dim, columns = PAIRS.rotary_dim, SIZE + 1
    return HeadGroup(
        q=random(KV_HEADS, TIMES, dim, columns, seed=1) / dim,
        k=keys,
        v=random(KV_HEADS, dim, columns, seed=4),
        o=random(KV_HEADS, TIMES, SIZE, dim, seed=5),
        moment=moment,
        value_moment=moment,
        pairs=PAIRS,
        covariance=centred(moment),
        sample=sample(frequencies),
    )


def rows(count: int, seed: int) -> torch.Tensor:
    """Complex rows ``[count, X]``."""
    return torch.complex(
        random(count, SIZE + 1, seed=seed), random(count, SIZE + 1, seed=seed + 50)
    )


def mixtures(common: torch.Tensor, seed: int) -> torch.Tensor:
    """For each head as many rows, all of them mixtures of the common ones: ``[g, b, X]``."""
    count = len(common)
    mix = torch.complex(
        random(KV_HEADS, count, count, seed=seed), random(KV_HEADS, count, count, seed=seed + 1)
    )
    return mix @ common


def with_band(band: torch.Tensor) -> torch.Tensor:
    """Keys of two heads that are alike but for their lowest frequencies."""
    alike = rows(FREQUENCIES - band.shape[1], seed=6).expand(KV_HEADS, -1, -1)
    none = torch.zeros(KV_HEADS, 0, SIZE + 1).double()
    return PAIRS.join(torch.cat([alike, band], 1), none)


def scores(q: torch.Tensor, k: torch.Tensor, turns: torch.Tensor, apart: int) -> torch.Tensor:
    """``[g, R, N, T, T]`` in float64, pair by pair."""
    x = inputs()
    places = torch.arange(TOKENS).double()
    qs, ks = (PAIRS.split(torch.einsum("...dx,ntx->...ndt", each, x))[0] for each in (q, k))
    turn = torch.polar(torch.ones(FREQUENCIES, TOKENS).double(), turns[:, None] * places)
    far = torch.polar(torch.ones(FREQUENCIES, TOKENS).double(), turns[:, None] * (places + apart))
    ks = ks if ks.dim() == 3 else ks[:, None]
    return 0.2 * ((far * qs).conj().mT @ (turn * ks)).real


def test_a_sample_finds_how_keys_turn() -> None:
    k = random(KV_HEADS, PAIRS.rotary_dim, SIZE + 1, seed=2)
    turn = torch.polar(
        torch.ones(FREQUENCIES, TOKENS).double(), FAST[:, None] * torch.arange(TOKENS)
    )
    still = PAIRS.split(torch.einsum("hdx,ntx->nhdt", k, inputs()))[0]
    none = torch.zeros(2, KV_HEADS, 0, TOKENS).double()
    keys = PAIRS.join(turn * still, none).mT.float()
    found = Sample.of(inputs().float(), keys, k, PAIRS, 0.2)
    torch.testing.assert_close(found.frequencies, FAST, rtol=1e-5, atol=1e-6)
    assert found.scale == 0.2
    assert found.inputs.shape == (2, TOKENS, SIZE + 1)


def test_divergence_and_errors_are_those_of_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, of scores of order one: 24 terms each."""
    monkeypatch.setattr(module, "DISTANCES", (0, 7))
    heads = group(random(KV_HEADS, PAIRS.rotary_dim, SIZE + 1, seed=2), FAST)
    q, k = heads.q + 0.1 * random(*heads.q.shape, seed=8), random(*heads.k.shape[1:], seed=9)
    old, new = Projected(heads.q, heads.k), Projected(q, k)
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    kl = []
    for apart in (0, 7):
        a, b = (
            scores(each.q, each.k, FAST, apart).masked_fill(~mask, -math.inf) for each in (old, new)
        )
        p = a.softmax(-1)
        logs = (a.log_softmax(-1) - b.log_softmax(-1)).masked_fill(~mask, 0.0)
        kl.append((p * logs).sum(-1).mean())
    found = heads.sample
    assert found is not None
    own = found.attention(old, PAIRS)
    assert found.divergence(own, new, PAIRS) == pytest.approx(float(sum(kl) / 2), rel=1e-4)
    assert found.divergence(own, old, PAIRS) == 0
    a, b = (scores(each.q, each.k, FAST, 0) for each in (old, new))
    p = a.masked_fill(~mask, -math.inf).softmax(-1)
    wanted = [(p * (x - (p * x).sum(-1, keepdim=True)).square()).sum() for x in (a, b - a)]
    assert found.errors(old, new, PAIRS) == pytest.approx([float(x) for x in wanted], rel=1e-4)


def test_rows_of_one_space_are_shared_exactly() -> None:
    """Frequency by frequency they could not be."""
    common = rows(4, seed=10)
    k = mixtures(common, seed=11)
    q = rows(KV_HEADS * TIMES * 4, seed=13).unflatten(0, (KV_HEADS, TIMES, 4))
    heads = group(with_band(k), SLOW)
    assert heads.covariance is not None
    new, shared = shared_band(q, k, heads.moment, heads.covariance, SLOW[12:])
    wanted = torch.einsum("hrjx,hjy->hrxy", q.conj(), k)
    found = torch.einsum("hrjx,jy->hrxy", new.conj(), shared)
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)


def test_components_turn_as_fast_as_what_they_are_of() -> None:
    """Heads that are alike lose nothing in a band either, however fast it turns."""
    k = rows(4, seed=10).expand(KV_HEADS, -1, -1)
    q = torch.zeros(KV_HEADS, TIMES, 4, SIZE + 1, dtype=torch.complex128)
    for j in range(4):  # what is asked of one frequency says nothing of another
        q[:, :, j, j] = rows(KV_HEADS * TIMES, seed=20 + j)[:, 0].unflatten(0, (KV_HEADS, TIMES))
    moment = torch.eye(SIZE + 1).double()
    frequencies = torch.tensor([0.9, 0.5, 0.2, 0.1]).double()
    new, shared = shared_band(q, k, moment, moment, frequencies)
    for distance in (0.0, 3.0, 11.0):
        turn = torch.polar(torch.ones(4).double(), frequencies * distance)[:, None]
        wanted = torch.einsum("hrjx,hjy->hrxy", (turn * q).conj(), k)
        found = torch.einsum("hrjx,jy->hrxy", (turn * new).conj(), shared)
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)


def _divergence(heads: HeadGroup) -> float:
    assert heads.sample is not None
    q, k = principal_keys(heads)
    own = heads.sample.attention(Projected(heads.q, heads.k), PAIRS)
    return heads.sample.divergence(own, Projected(q, k), PAIRS)


def test_a_band_is_taken_where_it_hardly_turns() -> None:
    keys = with_band(mixtures(rows(4, seed=10), seed=11))
    still, turning = group(keys, SLOW), group(keys, FAST)
    apart = [replace(heads, covariance=None) for heads in (still, turning)]  # no band is tried
    assert _divergence(still) < 1e-6 < 1e-2 < _divergence(apart[0])
    for one, other in zip(principal_keys(turning), principal_keys(apart[1]), strict=True):
        assert torch.equal(one, other)


def test_heads_that_are_alike_need_none() -> None:
    keys = with_band(rows(4, seed=10).expand(KV_HEADS, -1, -1))
    heads = group(keys, SLOW)
    assert _divergence(heads) < 1e-6
    alone = principal_keys(replace(heads, covariance=None))
    assert torch.equal(principal_keys(heads)[1], alone[1])


@pytest.mark.parametrize(
    ("count", "wanted"), [(0, []), (4, [2, 3]), (32, [4, 6, 8, 10, 12, 16, 20, 24])]
)
def test_widths(count: int, wanted: list[int]) -> None:
    assert widths(count) == wanted


def test_the_lowest_frequencies() -> None:
    assert lowest(torch.tensor([1.0, 0.1, -0.5, 0.0]), 3).tolist() == [2, 1, 3]
