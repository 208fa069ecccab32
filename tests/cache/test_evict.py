"""Caches that forget tokens of single KV heads: which, what is left, and what memory it takes."""

import copy
import pickle
from typing import Any

import pytest
import torch

from kvfold import Select
from kvfold.cache.kv import KVCache
from kvfold.errors import InputError
from kvfold.ops.evict import Evict, best, in_whole_pages, pooled, shared_out
from kvfold.ops.select import summarised
from tests.toolbox.attention_cases import (
    check_as_good_as_pytorch,
    naive,
    noise,
    one_byte_weights,
    use_backend,
)
from tests.toolbox.cache_cases import DTYPES

HEADS, GROUP, DIM, V_DIM, PAGE = 3, 2, 40, 24, 32
SINKS, RECENT = 16, 40


def make(dtype: Any = "bf16", batch: int = 1, **more: Any) -> KVCache:
    more = {"page_size": 64 if "4" in str(dtype) and "select" in more else PAGE} | more
    return KVCache(HEADS, DIM, v_head_dim=V_DIM, batch=batch, dtype=dtype, kind="paged", **more)


def append(cache: KVCache, count: int, seed: int = 0, step: int | None = None) -> KVCache:
    """``count`` tokens, ``step`` at a time."""
    k = noise(cache.batch, HEADS, count, DIM, dtype=torch.bfloat16, seed=seed)
    v = noise(cache.batch, HEADS, count, V_DIM, dtype=torch.bfloat16, seed=seed + 1)
    for low in range(0, count, step or count):
        cut = slice(low, low + (step or count))
        cache.append(k[:, :, cut], v[:, :, cut])
    return cache


def queries(batch: int = 1, tokens: int = 1, seed: int = 50) -> torch.Tensor:
    drawn = noise(batch, HEADS * GROUP, tokens, DIM, dtype=torch.bfloat16, seed=seed)
    return drawn.float()


def scores_of(cache: KVCache, seed: int = 9) -> torch.Tensor:
    """Every number another, and of each head another size."""
    drawn = noise(cache.batch, HEADS, max(cache.lengths), seed=seed).exp()
    return drawn * torch.tensor([1.0, 1.5, 0.5])[:, None]


def evict(cache: KVCache, budget: float = 0.5, **more: Any) -> torch.Tensor:
    given: dict[str, Any] = {"sinks": SINKS, "recent": RECENT, "by": scores_of(cache)}
    return cache.evict(budget, **given | more)


def held(cache: KVCache, b: int) -> torch.Tensor:
    """Which positions hold something, bool ``[Hkv, S]``: noise is never all zeros."""
    return cache.read(b)[0].abs().sum(-1) > 0


def rows_of(cache: KVCache, b: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values that each KV head holds, in order."""
    k, v = cache.read(b)
    return [(k[h, own], v[h, own]) for h, own in enumerate(held(cache, b))]


def check_same(ours: Any, theirs: Any) -> None:
    for (k, v), (other_k, other_v) in zip(ours, theirs, strict=True):
        assert torch.equal(k, other_k)
        assert torch.equal(v, other_v)


def check_attends(cache: KVCache, tokens: int = 1, **options: Any) -> None:
    """Attention is that over exactly what is held, in float64; each sequence by itself."""
    q = queries(cache.batch, tokens)
    out, lse = cache.attend(q, return_lse=True, **options)
    for b, length in enumerate(cache.lengths):
        if not length:
            continue
        k, v = (x[None] for x in cache.read(b))
        own = held(cache, b)[None].repeat_interleave(GROUP, 1)[:, :, None]
        assert own.sum((2, 3))[0, ::GROUP].tolist() == cache.held[b].tolist()
        given = {name: x[b : b + 1] if name == "start" else x for name, x in options.items()}
        check_as_good_as_pytorch(
            out[b : b + 1], q[b : b + 1], k, v, torch.bfloat16, lse[b : b + 1], mask=own,
            slack=one_byte_weights(cache, v), **given,
        )  # fmt: skip


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_best_are_kept_bit_for_bit(dtype: Any) -> None:
    cache = append(make(dtype, batch=2), 700)
    cache.truncate(600, [1])
    before = [cache.read(b) for b in range(2)]
    scores = scores_of(cache)
    kept = evict(cache, by=scores)
    for b, length in enumerate(cache.lengths):
        k, v = before[b]
        own = kept[b, :, :length]
        check_same(rows_of(cache, b), [(k[h, own[h]], v[h, own[h]]) for h in range(HEADS)])
        assert not kept[b, :, length:].any()
        # The sum fills the budget but for a page, and what the exact ends leave no page for.
        assert HEADS * length // 2 - 2 * PAGE * HEADS < int(own.sum()) <= HEADS * length // 2
        assert own[:, :SINKS].all()
        assert own[:, length - RECENT :].all()
        for h in range(HEADS):
            middle = slice(SINKS, int((~own[h]).nonzero().max()) + 1)
            chosen, worth = own[h, middle], scores[b, h, middle]
            assert float(worth[chosen].min()) > float(worth[~chosen].max())
    check_attends(cache)
    check_attends(cache, 3, softcap=5.0, sink_logits=torch.arange(float(HEADS * GROUP)))


@pytest.mark.parametrize("backend", ["cpu", "torch", "triton"])
def test_every_backend(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_backend(backend, monkeypatch)
    cache = append(make("int8", batch=2), 240)
    evict(cache)
    append(cache, 40, seed=5)
    evict(cache)
    check_attends(cache, 2)


@pytest.mark.usefixtures("_backend")
def test_heads_share_their_budget() -> None:
    counts = {}
    for floor in (0.0, 0.5, 1.0):
        cache = append(make(), 1024)
        evict(cache, floor=floor)
        counts[floor] = cache.held[0].tolist()
        least = int(floor * (512 - SINKS - RECENT)) + SINKS + RECENT
        assert min(counts[floor]) > least - PAGE
        assert 3 * 512 - PAGE < sum(counts[floor]) <= 3 * 512
    assert max(counts[1.0]) - min(counts[1.0]) <= PAGE
    assert counts[0.0][1] > counts[0.0][0] > counts[0.0][2]


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_falls_by_what_is_forgotten(dtype: Any) -> None:
    """Tables, the page that is not full and exact ends are all that is beside it."""
    cache = append(make(dtype), 4096)
    whole = 4096 * cache.bytes_per_token
    ends = cache._storage.stores[1:]
    evict(cache, 0.5)
    exact = sum(store.nbytes for store in ends)
    main = cache.nbytes - exact
    tokens = float(cache.held.float().mean()) - (RECENT if ends else 0)
    assert main == pytest.approx(cache.bytes_per_token * tokens, rel=0.03 if ends else 0.01)
    assert cache.nbytes <= 0.505 * whole + exact
    assert cache.bytes_per_step == pytest.approx(cache.nbytes, rel=0.05)
    cache.evict(0.25, by=scores_of(cache), sinks=SINKS, recent=RECENT)
    assert cache.nbytes <= 0.255 * whole + exact


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8", "int4", ("nl4", "int4")], ids=str)
def test_whatever_happens_to_it_afterwards(dtype: Any) -> None:
    cache = append(make(dtype, batch=3), 300)
    evict(cache)
    check_attends(cache)
    append(cache, 90, seed=3, step=1)
    check_attends(cache, 2)
    whole = [rows_of(cache, b) for b in range(3)]
    cache.truncate(385, [1])
    shorter = [tuple(x[:-5] for x in pair) for pair in whole[1]]
    check_same(rows_of(cache, 1), shorter)
    cache.fork(0, 2)
    check_same(rows_of(cache, 2), whole[0])
    cache.evict(0.4, by=scores_of(cache)[:1], sinks=SINKS, recent=RECENT, sequences=[2])
    check_same(rows_of(cache, 0), whole[0])  # which shared all of its pages with it
    assert int(cache.held[2].sum()) < int(cache.held[0].sum())
    check_attends(cache)
    moved = [rows_of(cache, b) for b in (2, 2, 1)]
    cache.reorder([2, 2, 1])
    for b in range(3):
        check_same(rows_of(cache, b), moved[b])
    append(cache, 20, seed=6)
    evict(cache, 0.5)
    check_attends(cache)
    for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        append(other, 3, seed=7)
        check_attends(other)
    cache.clear([1])
    cache.truncate(0, [2])
    assert cache.lengths[1:] == [0, 0]
    assert cache.held[1:].sum() == 0
    append(cache, 64, seed=8)
    assert cache.held[1:].tolist() == [[64] * HEADS] * 2
    check_attends(cache)


@pytest.mark.usefixtures("_backend")
def test_a_prompt_over_what_is_left() -> None:
    cache = append(make("int8"), 500)
    evict(cache)
    append(cache, 40, seed=2)
    check_attends(cache, 40)


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("dtype", ["bf16", "int4"])
def test_padding_goes_first(dtype: str) -> None:
    cache = append(make(dtype, batch=2), 640)
    start = torch.tensor([0, 200])
    kept = evict(cache, start=start)
    exact = cache._storage.first
    assert not kept[1, :, exact:200].any()
    assert kept[1, :, 200 : 200 + SINKS].all()
    assert int(kept[1, :, exact:].sum()) <= HEADS * 220
    out = cache.attend(queries(2), start=start)
    alone = append(make(dtype, batch=2), 640)
    k, v = alone.read(1)
    own = kept[1:].repeat_interleave(GROUP, 1)[:, :, None]
    truth, _ = naive(queries(2)[1:], k[None], v[None], mask=own, start=start[1:])
    allowed = 2**-7 + one_byte_weights(cache, v)
    assert (out[1:] - truth).abs().max() <= allowed  # type: ignore[operator]


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("dtype", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("by", ["spread", "box", "exact"])
def test_selecting_from_what_is_left(dtype: str, by: str) -> None:
    select = Select(budget=0.25, sinks=16, recent=40, dense_below=128, by=by)
    cache = append(make(dtype, batch=2, select=select), 900)
    evict(cache)
    append(cache, 70, seed=2, step=1)
    for b in range(2):
        whole = cache.held[b]
        read = cache.selected(queries(2))[b, :, : cache.lengths[b]]
        there = held(cache, b)
        size = cache._storage.main.page_size
        assert ((read & there).sum(-1) <= whole // 4 + 2 * size).all()
        assert ((read & there).sum(-1) >= whole // 4 - 2 * size).all()
    q = queries(2)
    read, out = cache.selected(q), cache.attend(q)
    assert isinstance(out, torch.Tensor)
    for b in range(2):
        k, v = (x[None] for x in cache.read(b))
        own = (read[b] & held(cache, b)).repeat_interleave(GROUP, 0)[None, :, None]
        check_as_good_as_pytorch(
            out[b : b + 1], q[b : b + 1], k, v, torch.bfloat16, mask=own,
            slack=one_byte_weights(cache, v),
        )  # fmt: skip
    assert cache.bytes_per_step < 0.75 * append(make(dtype, batch=2), 970).bytes_per_step


@pytest.mark.usefixtures("_backend")
def test_summaries_follow_what_is_kept() -> None:
    """Of whole pages; in float32 rounded to bfloat16, whose unit is 2^-8 of a number."""
    select = Select(budget=0.25, sinks=16, recent=40, dense_below=0)
    cache = append(make("fp32", select=select, page_size=PAGE), 640)
    evict(cache)
    store = cache._storage.main
    rows = store.told.data.float()
    for h, begin in enumerate(store.begins_of(0)):
        keys = cache.read(0)[0][h, begin:640].unflatten(0, (-1, PAGE))
        told = rows[store.table[h, begin // PAGE : 640 // PAGE].long(), 0]
        torch.testing.assert_close(told, summarised(keys, "spread"), rtol=2**-8, atol=0)


@pytest.mark.usefixtures("_backend")
def test_heads_that_have_nothing_left_to_give() -> None:
    """A head may be down to its sinks, or to nothing, when others still have much."""
    select = Select(budget=0.5, sinks=0, recent=40, dense_below=0)
    for sinks, chooses in ((0, None), (SINKS, None), (0, select)):
        cache = append(make(select=chooses, page_size=PAGE), 512)
        scores = noise(1, HEADS, 512).exp() * torch.tensor([1.0, 1e3, 1e-3])[:, None]
        evict(cache, 0.4, by=scores, floor=0.0, sinks=sinks)
        least = int(cache.held.min())
        assert least < RECENT + PAGE + SINKS
        evict(cache, 0.25, by=torch.ones(1, HEADS, 512), floor=0.0, sinks=sinks)
        assert int(cache.held.sum()) <= HEADS * 128
        if chooses is not None:
            assert cache.selected(queries()).any()
            continue
        check_attends(cache)
        cache.truncate(512 - RECENT)
        assert evict(cache, 0.9).sum() == cache.held.sum()
        check_attends(cache)


@pytest.mark.usefixtures("_backend")
def test_nothing_to_forget_changes_nothing() -> None:
    cache, dense = (append(make("int8"), 300) for _ in range(2))
    assert evict(cache, 1.0).all()
    assert evict(cache, 4000).all()
    assert torch.equal(cache.attend(queries()), dense.attend(queries()))  # type: ignore[arg-type]
    assert torch.equal(cache.attend(queries(), window=50), dense.attend(queries(), window=50))  # type: ignore[arg-type]
    cache.truncate(3)
    assert cache.held.tolist() == [[3] * HEADS]
    assert make().evict(1.0).shape == (1, HEADS, 0)
    assert make(batch=0).held.shape == (0, HEADS)


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("dtype", ["fp32", "int4"])
def test_scores_are_what_queries_attend_to(dtype: str) -> None:
    cache, start = append(make(dtype, batch=2), 200), torch.tensor([0, 30])
    q = queries(2, 5)
    found = cache.scores(q, pool=1, softcap=8.0, start=start)
    for b in range(2):
        k = cache.read(b)[0].double().repeat_interleave(GROUP, 0)
        s = 8 * torch.tanh(q[b].double() @ k.mT * DIM**-0.5 / 8)
        j, t = torch.arange(200), torch.arange(195, 200)[:, None]
        s = s.masked_fill((j > t) | (j < start[b]), -torch.inf)
        mean = s.softmax(-1).unflatten(0, (HEADS, GROUP)).mean(1)
        truth = (mean[:, -1] + mean[:, -4:].mean(1) + mean.mean(1)) / 3
        # exp and sums of 200 in float32
        torch.testing.assert_close(found[b].double(), truth, rtol=2**-15, atol=2**-24)
    wide = cache.scores(q, pool=3, start=start, softcap=8.0)
    torch.testing.assert_close(wide[:, :, 1:-1], found.unfold(2, 3, 1).mean(-1))
    torch.testing.assert_close(wide[..., 0], found[..., :2].mean(-1))


@pytest.mark.usefixtures("_backend")
def test_a_policy_holds_its_budget() -> None:
    cache = append(make("bf16"), 600)
    how = Evict(budget=200, sinks=SINKS, recent=RECENT, every=64, window=8)
    for by in ("attention", "recent"):
        kept = cache.evict_as(Evict(**{**vars(how), "by": by}), queries(tokens=8))
        assert int(kept.sum()) <= 3 * 200
        append(cache, 100, seed=2, step=1)
        check_attends(cache)
    assert int(cache.evict_as(how, queries(tokens=8)).sum()) <= 3 * 200
    tiny = append(make("bf16"), 50)
    assert tiny.evict_as(Evict(budget=0.1), queries()).all()  # sinks and recent tokens are more


def test_recent_tokens_are_a_window() -> None:
    cache = append(make(), 512)
    kept = evict(cache, 0.5, by="recent", sinks=32)
    assert (kept == kept[:, :1]).all()
    assert kept[0, 0, :32].all()
    assert kept[0, 0, 512 - 224 :].all()
    assert int(kept[0, 0].sum()) == 256


@pytest.mark.parametrize("seed", range(5))
def test_shares_are_the_best_of_all_heads(seed: int) -> None:
    scores = noise(4, 30, seed=seed)
    lows, keep = [0, 3, 29, 10], 12
    for floor in (0.0, 0.4, 1.0):
        counts = shared_out(scores, lows, keep, floor)
        least = [min(int(floor * keep), 30 - low) for low in lows]
        assert all(n >= m for n, m in zip(counts, least, strict=True))
        assert sum(counts) == min(48, sum(30 - low for low in lows))
        if not floor:
            pool = torch.cat([scores[h, low:] for h, low in enumerate(lows)]).sort().values[-48:]
            own = [int((scores[h, low:] >= pool[0]).sum()) for h, low in enumerate(lows)]
            assert counts == own


def test_pages_are_whole() -> None:
    assert in_whole_pages([100, 90, 34], [500] * 3, 32) == [96, 96, 32]
    assert in_whole_pages([100, 33], [100, 500], 32) == [100, 32]
    assert in_whole_pages([5, 5], [500] * 2, 32) == [0, 0]
    assert best(torch.tensor([9.0, 1.0, 3.0, 3.0, 0.0]), 1, 2).tolist() == [2, 3]
    assert best(torch.tensor([9.0, 1.0, 3.0, 3.0, 0.0]), 1, 1).tolist() == [3]
    ones = torch.ones(2, 7)
    assert torch.equal(pooled(ones, 5), ones)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"budget": 0.0}, r"budget 0\.0: expected a number"),
        ({"budget": 300}, r"budget=300 tokens, less than sinks \+ recent: 320"),
        ({"by": "magic"}, "by magic: no such choice"),
        ({"window": 0}, "window 0: expected a whole number"),
        ({"pool": 4}, "pool=4: expected an odd number"),
        ({"floor": 1.5}, r"floor 1\.5: expected a number"),
        ({"every": -1}, "every -1: expected a whole number"),
    ],
)
def test_what_cannot_be_asked(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Evict(**options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"budget": 0.05}, r"budget=0.05 of 400 tokens is 20, less than sinks \+ recent: 56"),
        ({"by": "newest"}, r"by='newest': expected scores \[1, 3, 400\]"),
        ({"by": torch.zeros(1, 2, 400)}, r"by is torch.float32 \[1, 2, 400\]: expected"),
        ({"by": torch.full((1, 3, 400), torch.nan)}, "with NaN"),
        ({"by": [0.1]}, "by is .*expected a tensor"),
        ({"start": torch.tensor([401])}, r"start=\[401\] for sequences of \[400\] tokens"),
        ({"start": torch.tensor([1, 2])}, r"start is torch.int64 \[2\]: int \[1\]"),
        ({"sequences": [0, 0]}, "each can be named once"),
        ({"sequences": [1]}, "sequence 1: the cache has"),
        ({"spare": -1}, "spare=-1: expected a whole number"),
    ],
)
def test_calls_that_are_refused(options: dict[str, Any], said: str) -> None:
    cache = append(make(), 400)
    with pytest.raises(InputError, match=said):
        evict(cache, **options)
    assert cache.held.tolist() == [[400] * HEADS]


def test_what_an_evicting_cache_cannot() -> None:
    kinds: list[dict[str, Any]] = [{"kind": "contiguous"}, {"kind": "sliding", "window": 64}]
    for options in kinds:
        with pytest.raises(InputError, match="evict frees pages, which kind="):
            KVCache(2, 64, **options).evict(0.5)
    cache = append(make(), 400)
    evict(cache)
    places: list[dict[str, Any]] = [
        {"window": 300},
        {"mask": torch.ones(400, dtype=torch.bool)},
        {"alibi_slopes": torch.ones(HEADS * GROUP)},
    ]
    for given in places:
        with pytest.raises(InputError, match="does not know where"):
            cache.attend(queries(), **given)
    with pytest.raises(InputError, match="of these some were evicted"):
        cache.truncate(100)
    with pytest.raises(InputError, match="window: a cache that evicts"):
        append(make(), 40).scores(queries(), window=3)
    with pytest.raises(InputError, match=r"expected kvfold\.Evict"):
        cache.evict_as(0.5, queries())  # type: ignore[arg-type]
