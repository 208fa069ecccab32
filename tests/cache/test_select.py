"""Caches that read some of their pages: which, and that attention is over exactly those."""

from typing import Any

import pytest
import torch

from kvfold import Select
from kvfold.cache.kv import KVCache
from kvfold.errors import InputError
from kvfold.kernels.cpu.library import library
from kvfold.kernels.cpu.select import choose
from kvfold.kernels.selection import Question, choose_by_pytorch, decoded_summaries
from kvfold.ops.select import estimates
from tests.toolbox.attention_cases import (
    check_as_good_as_pytorch,
    needs_kernels,
    noise,
    one_byte_weights,
    use_backend,
)
from tests.toolbox.cache_cases import DTYPES

SMALL = Select(budget=0.25, sinks=16, recent=40, dense_below=128)
HEADS, GROUP, DIM, V_DIM = 2, 3, 40, 24


def make(
    dtype: Any = "bf16", select: Select | None = SMALL, batch: int = 1, **more: Any
) -> KVCache:
    more = {"page_size": 64 if "4" in str(dtype) else 32} | more
    return KVCache(
        HEADS, DIM, v_head_dim=V_DIM, batch=batch, dtype=dtype, kind="paged", select=select, **more
    )


def fill(cache: KVCache, count: int, *, seed: int = 0, one_by_one: int = 0) -> KVCache:
    """``count`` tokens, the last of them one by one; bfloat16 numbers, which some caches keep."""
    k = noise(cache.batch, HEADS, count, DIM, dtype=torch.bfloat16, seed=seed)
    v = noise(cache.batch, HEADS, count, V_DIM, dtype=torch.bfloat16, seed=seed + 1)
    cache.append(k[:, :, : count - one_by_one], v[:, :, : count - one_by_one])
    for t in range(count - one_by_one, count):
        cache.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
    return cache


def queries(batch: int = 1, tokens: int = 1, seed: int = 50) -> torch.Tensor:
    drawn = noise(batch, HEADS * GROUP, tokens, DIM, dtype=torch.bfloat16, seed=seed)
    return drawn.float()


def attend(cache: KVCache, q: torch.Tensor, **options: Any) -> torch.Tensor:
    out = cache.attend(q, **options)
    assert isinstance(out, torch.Tensor)
    return out


def check_attends(cache: KVCache, q: torch.Tensor, **options: Any) -> torch.Tensor:
    """Attention is that over the tokens that ``selected`` names, each sequence by itself."""
    read = cache.selected(q, **options)
    out, lse = cache.attend(q, return_lse=True, **options)
    for b in range(cache.batch):
        k, v = (x[None] for x in cache.read(b))
        own = read[b : b + 1, :, : k.shape[2]].repeat_interleave(GROUP, 1)[:, :, None]
        given = {name: x[b : b + 1] if name == "start" else x for name, x in options.items()}
        check_as_good_as_pytorch(
            out[b : b + 1], q[b : b + 1], k, v, torch.bfloat16, lse[b : b + 1], mask=own,
            slack=one_byte_weights(cache, v), **given,
        )  # fmt: skip
    return read


@pytest.fixture(params=["cpu", "torch", "triton"])
def _every_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    use_backend(request.param, monkeypatch)


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("by", ["spread", "box", "exact"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_is_over_what_is_selected(dtype: Any, by: str) -> None:
    cache = fill(make(dtype, Select(**{**vars(SMALL), "by": by}), batch=2), 700, one_by_one=70)
    cache.truncate(650, [1])
    for tokens in (1, 3):
        q = queries(2, tokens)
        read = check_attends(cache, q, softcap=5.0 if tokens == 3 else None)
        assert read[0].sum(-1).tolist() == read[0].sum(-1)[:1].tolist() * HEADS
        assert read.float().mean() < 0.5
        for b, length in enumerate(cache.lengths):
            assert read[b, :, : SMALL.sinks].all()
            assert read[b, :, length - SMALL.recent : length].all()
            assert not read[b, :, length:].any()


@pytest.mark.usefixtures("_every_backend")
def test_every_backend() -> None:
    cache = fill(make("bf16", batch=2), 400)
    check_attends(cache, queries(2, 2))


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_whole_budget_is_dense_bit_for_bit(dtype: Any) -> None:
    q = queries(2, 2)
    whole = fill(make(dtype, Select(budget=1.0, dense_below=0), batch=2), 500)
    dense = fill(make(dtype, None, batch=2), 500)
    assert torch.equal(attend(whole, q), attend(dense, q))
    assert whole.selected(q).all()


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("budget", [0.5, 0.25, 200, 10])
@pytest.mark.parametrize("length", [129, 256, 257, 300, 511, 640])
def test_the_budget_holds(length: int, budget: float) -> None:
    select = Select(budget=budget, sinks=16, recent=40, dense_below=0)
    cache = fill(make("bf16", select), length)
    read = check_attends(cache, queries())
    counts = read.sum(-1)
    least = 32 + 40 + 31  # a page of sinks, recent tokens, and what fills their page
    assert int(counts.max()) <= max(select.tokens(length), least)
    if select.tokens(length) > least + 32:  # all but a page of it is used
        assert int(counts.min()) > select.tokens(length) - 32


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("budget", [1.0, 0.5])
def test_a_share_of_the_weight_reads_fewer(budget: float) -> None:
    """Whatever the budget is, which is the most that is read."""
    select = Select(budget=budget, top_p=0.3, sinks=16, recent=40, dense_below=0)
    cache, most = fill(make("bf16", select), 700), select.tokens(700)
    counts = check_attends(cache, queries()).sum(-1)
    assert 32 + 40 < int(counts.min()) <= int(counts.max()) < most - 32


@pytest.mark.usefixtures("_backend")
def test_exact_first_tokens_may_fill_pages() -> None:
    """Nothing of the main store's first pages is there then; no other page's summary suffers."""
    cache = fill(make("int4", exact_first=128, exact_recent=16), 700, one_by_one=100)
    read = check_attends(cache, queries())
    assert read[..., :128].all()
    assert not read.all()


@pytest.mark.usefixtures("_backend")
def test_padding_is_neither_read_nor_counted() -> None:
    cache = fill(make("int8", batch=2), 640)
    start = torch.tensor([0, 200])
    read = check_attends(cache, queries(2), start=start)
    assert not read[1, :, :200].any()
    assert read[1, :, 200 : 200 + SMALL.sinks].all()
    assert int(read[1].sum(-1).max()) <= SMALL.tokens(440)


@pytest.mark.usefixtures("_backend")
def test_what_needs_places_reads_everything() -> None:
    cache, dense = fill(make(), 400), fill(make(select=None), 400)
    q = queries()
    for options in (
        {"mask": torch.ones(400, dtype=torch.bool)},
        {"window": 300},
        {"alibi_slopes": torch.ones(HEADS * GROUP)},
    ):
        assert torch.equal(attend(cache, q, **options), attend(dense, q, **options))
    long = queries(tokens=17)
    assert torch.equal(attend(cache, long), attend(dense, long))


@needs_kernels
@pytest.mark.parametrize("summary", ["bf16", "int8"])
@pytest.mark.parametrize("by", ["spread", "box"])
@pytest.mark.parametrize("top_p", [None, 0.3, 0.9])
def test_kernels_choose_as_pytorch_does(by: str, summary: str, top_p: float | None) -> None:
    dtype, page = ("fp32", 32) if summary == "bf16" else ("int8", 32)
    select = Select(budget=0.4, sinks=16, recent=40, dense_below=0, by=by)
    lib = library()
    assert lib is not None
    for seed, dim in enumerate((40, 64, 21)):
        cache = KVCache(2, dim, batch=2, dtype=dtype, kind="paged", page_size=page, select=select)
        k = noise(2, 2, 900, dim, seed=seed)
        cache.append(k, k)
        cache.truncate(700, [1])
        store = cache._storage.main
        assert store.summaries is not None
        assert store.summaries.layout.fmt.name == summary
        assert cache._selection is not None
        readings = [cache._selection.readings(b, n, 2)[0] for b, n in enumerate(cache.lengths)]
        q = noise(2, 6, 2, dim, seed=seed + 9)
        for softcap in (None, 30.0):
            asked = Question(
                q, store.summaries.rows(), store.table, readings, by, 0.3, softcap, top_p
            )
            weights = torch.zeros(2, 2, readings[0].last - readings[0].always)
            ours, theirs = choose(lib, asked, weights), choose_by_pytorch(asked)
            assert torch.equal(ours.counts, theirs.counts)
            for b, head in ((b, h) for b in range(2) for h in range(2)):
                count = int(ours.counts[b, head])
                assert torch.equal(ours.table[b, head, :count], theirs.table[b, head, :count])
            # Weights of each sequence sum to one: exp, sums and products in float32.
            torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2), atol=2**-18, rtol=0)
            if top_p is not None:
                assert int(ours.counts.max()) <= readings[0].always + readings[0].keep


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8", "int4", "fp8"])
def test_no_score_exceeds_its_box(dtype: str) -> None:
    """So the log-sum-exp of what is left out is at most that of its pages' estimates, plus log P.

    Of keys as they were given; sums of D products in float32 are off by less than D 2^-24 of the
    sum of their sizes, which centre and spread bound.
    """
    select = Select(budget=0.25, dense_below=0, by="box", sinks=16, recent=40)
    cache = make(dtype, select, exact_first=0, exact_recent=0)
    k = noise(1, HEADS, 512, DIM, seed=3) * torch.logspace(-2, 2, DIM)
    cache.append(k, noise(1, HEADS, 512, V_DIM))
    store, size = cache._storage.main, cache._storage.main.page_size
    assert store.summaries is not None
    rows = store.summaries.rows()
    found = decoded_summaries(rows, store.table[0].long()[: 512 // size]).double()
    q = noise(1, HEADS * GROUP, 1, DIM, seed=7).double().view(HEADS, GROUP, DIM)
    bounds = estimates(q, found, "box")
    scores = (q @ k[0].double().mT).unflatten(-1, (-1, size))
    assert (scores.amax(-1) <= bounds * (1 + 2**-20) + 2**-20).all()
    left_out = ~cache.selected(q.float().view(1, HEADS * GROUP, 1, DIM))[0]
    for head in range(HEADS):
        pages = left_out[head].unflatten(0, (-1, size)).all(-1)
        true = scores[head][:, pages].flatten(1).logsumexp(-1)
        bound = bounds[head][:, pages].logsumexp(-1) + torch.tensor(float(size)).double().log()
        assert (true <= bound + 2**-16).all()


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("by", ["spread", "box"])
@pytest.mark.parametrize("dtype", ["bf16", "int8", "int4"])
def test_a_key_that_stands_out_is_found(dtype: str, by: str) -> None:
    """One key in 2,048 that the query looks for: its page is read, whatever the budget."""
    select = Select(budget=0.15, sinks=16, recent=40, dense_below=0, by=by)
    for at in (100, 777, 1500):
        cache = make(dtype, select)
        k = noise(1, HEADS, 2048, DIM, seed=1)
        q = queries(seed=at)[:, :, 0].view(HEADS, GROUP, DIM).mean(1)
        k[0, :, at] = 6 * q / q.norm(dim=-1, keepdim=True) * DIM**0.5 / 2
        cache.append(k, noise(1, HEADS, 2048, V_DIM))
        asked = q.repeat_interleave(GROUP, 0).view(1, HEADS * GROUP, 1, DIM)
        assert cache.selected(asked)[0, :, at].all()


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int4"])
def test_summaries_follow_the_sequence(dtype: str) -> None:
    """Whatever happened to a sequence, it reads what one made at once reads."""
    q = queries(seed=8)
    cache = fill(make(dtype, batch=3), 300)
    cache.truncate(210, [1])
    cache.fork(0, 2)
    k, v = (noise(3, HEADS, 200, d, dtype=torch.bfloat16, seed=4) for d in (DIM, V_DIM))
    for t in range(200):
        cache.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
    cache.reorder([2, 1, 0])
    cache.clear([2])
    check_attends(cache, queries(3))
    first = fill(make(dtype, batch=1), 300)
    first.append(k[2:], v[2:])
    same = cache.selected(q, sequences=[0])
    if dtype != "int4":  # its summaries are of what is stored, where keys came in parts
        assert torch.equal(same, first.selected(q))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_it_costs(dtype: Any) -> None:
    cache, dense = fill(make(dtype), 640), fill(make(dtype, None), 640)
    assert dense.nbytes < cache.nbytes <= 1.05 * dense.nbytes
    read = cache.selected(queries())
    share = float(read.float().mean())
    # Exact ends are larger than the share that they are; summaries are beside what is read.
    ends = 0.25 if "4" in str(dtype) else 0.0
    assert share <= cache.bytes_per_step / dense.bytes_per_step <= share + 0.05 + ends


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"budget": 0}, "budget 0: expected a whole number"),
        ({"budget": 0.0}, r"budget 0\.0: expected a number, above 0, at most 1"),
        ({"budget": 1.5}, r"budget 1\.5: expected a number, above 0, at most 1"),
        ({"budget": -4}, "budget -4: expected a whole number"),
        ({"budget": float("nan")}, "budget nan: expected a number"),
        ({"budget": True}, "budget True: expected a number"),
        ({"budget": "half"}, "budget half: expected a number"),
        ({"top_p": 0.0}, r"top_p 0\.0: expected a number"),
        ({"top_p": 2}, "top_p 2: expected a number"),
        ({"sinks": -1}, "sinks -1: expected a whole number"),
        ({"recent": 1.5}, r"recent 1\.5: expected a whole number"),
        ({"by": "magic"}, "by magic: no such choice"),
    ],
)
def test_what_cannot_be_asked(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Select(**options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kind": "sliding", "window": 64}, "select reads some pages of a whole sequence"),
        ({"kind": "contiguous"}, "kind='contiguous' does not keep"),
        ({"kind": "paged", "page_size": 8}, "pages of 8 tokens"),
        ({"kind": "paged", "page_size": 128}, "pages of 128 tokens"),
        ({"kind": "paged", "page_size": 16, "dtype": "int4"}, "more than 5% of a cache of int4"),
        ({"kind": "paged", "select": 0.25}, r"expected kvfold\.Select"),
    ],
)
def test_caches_that_cannot_select(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        KVCache(2, 64, **{"select": SMALL, **options})


def test_a_cache_that_reads_everything_selects_nothing() -> None:
    with pytest.raises(InputError, match="this cache reads everything"):
        make(select=None).selected(queries())
