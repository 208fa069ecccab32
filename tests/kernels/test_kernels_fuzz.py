"""Random shapes and options through the kernels, against float64.

``KVFOLD_FUZZ_EXAMPLES`` sets how many; the sanitizer's test runs this file with another library.
"""

import os
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kvfold
from kvfold.cache.kv import KVCache
from kvfold.ops.formats import FORMATS
from tests.toolbox.attention_cases import (
    DTYPES,
    ISAS,
    allowed_error,
    check_as_good_as_pytorch,
    distance,
    hidden_keys,
    naive,
    needs_kernels,
    noise,
    qkv,
    using,
)

pytestmark = needs_kernels
fuzzed = settings(
    max_examples=int(os.environ.get("KVFOLD_FUZZ_EXAMPLES", "150")),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
isas = st.sampled_from(ISAS or ["none"])
head_sizes = st.one_of(st.integers(1, 100), st.sampled_from([128, 192, 256, 576, 1024]))


@st.composite
def options(draw: st.DrawFn, batch: int, heads: int, tokens: int, keys: int) -> dict[str, Any]:
    """Any of attention's options, seldom all."""
    some: dict[str, Any] = {"causal": draw(st.booleans())}
    if some["causal"] and draw(st.booleans()):
        some |= {"window": draw(st.integers(1, keys + 2)), "sinks": draw(st.integers(0, 9))}
    if draw(st.booleans()):
        starts = st.lists(st.integers(0, keys), min_size=batch, max_size=batch)
        some["start"] = torch.tensor(draw(starts), dtype=torch.int32)
    if draw(st.booleans()):
        some["softcap"] = draw(st.sampled_from([0.5, 10.0]))
    if draw(st.booleans()):
        some["alibi_slopes"] = noise(heads, seed=3) * 0.1
    if draw(st.booleans()):
        sizes = [n if draw(st.booleans()) else 1 for n in (batch, heads, tokens, keys)]
        mask = noise(*sizes, seed=4)
        some["mask"] = mask if draw(st.booleans()) else mask > -1
    if draw(st.booleans()):
        some["scale"] = draw(st.sampled_from([0.0, -0.1, 0.3]))
    return some


@fuzzed
@given(st.data())
def test_plain_tensors(data: st.DataObject) -> None:
    draw = data.draw
    batch, kv_heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    heads, tokens = kv_heads * draw(st.integers(1, 17)), draw(st.integers(1, 16))
    keys = draw(st.integers(4 * tokens, 4 * tokens + 300))
    dims = draw(head_sizes), draw(head_sizes)
    q, k, v = qkv(batch, (heads, kv_heads), tokens, keys, dims, draw(st.sampled_from(DTYPES)))
    given = draw(options(batch, heads, tokens, keys))
    if draw(st.booleans()):
        lengths = st.lists(st.integers(0, keys), min_size=batch, max_size=batch)
        given["lengths"] = torch.tensor(draw(lengths))
    with using(draw(isas)):
        assert kvfold.explain(q, k, v, **given).name == "kernel"
        out, lse = kvfold.attention(q, k, v, **given, return_lse=True)
    # PyTorch is lucky at times where there are few numbers: a unit in the last place is free, and
    # two of float32 in what scores could be at most, |q| |k|.
    size = float(q.norm(dim=-1).max() * k.norm(dim=-1).max())
    size *= abs(given.get("scale", dims[0] ** -0.5))
    slack = (torch.finfo(q.dtype).eps + size * 2**-22) * float(v.abs().max())
    check_as_good_as_pytorch(out, q, k, v, lse=lse, slack=slack, **given)


@fuzzed
@given(st.data())
def test_caches(data: st.DataObject) -> None:
    """A cache's life: appending, forgetting, going on; then attention over what it holds.

    Held to the bound that ``allowed_error`` derives, and the cache to what it was given.
    """
    draw = data.draw
    formats = st.sampled_from(list(FORMATS))
    kind = draw(st.sampled_from(["contiguous", "paged", "sliding"]))
    kv_heads, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    heads = kv_heads * draw(st.integers(1, 9))
    own: dict[str, Any] = {}
    if kind == "sliding":
        own = {"window": draw(st.integers(1, 60)), "sinks": draw(st.integers(0, 5))}
    cache = KVCache(
        kv_heads,
        draw(head_sizes),
        v_head_dim=draw(head_sizes),
        dtype=(draw(formats), draw(formats)),
        kind=kind,
        page_size=draw(st.sampled_from([1, 3, 7, 16, 32, 64])),
        **own,
        exact_first=draw(st.sampled_from([None, 0, 16])),
        exact_recent=draw(st.sampled_from([None, 0, 7, 40])),
    )
    source = draw(st.sampled_from(DTYPES))
    given_k, given_v = (
        noise(1, kv_heads, 0, cache.head_dim),
        noise(1, kv_heads, 0, cache.v_head_dim),
    )
    with using(draw(isas)):
        for seed, count in enumerate([*draw(st.lists(st.integers(0, 150), max_size=4)), tokens]):
            k = noise(1, kv_heads, count, cache.head_dim, dtype=source, seed=seed)
            v = noise(1, kv_heads, count, cache.v_head_dim, dtype=source, seed=seed + 9)
            cache.append(k, v)
            given_k, given_v = (
                torch.cat([given_k, k.float()], 2),
                torch.cat([given_v, v.float()], 2),
            )
            if kind != "sliding" and seed == 1 and draw(st.booleans()):
                cache.truncate(draw(st.integers(0, cache.lengths[0])))
                given_k, given_v = (x[:, :, : cache.lengths[0]] for x in (given_k, given_v))
        length = cache.lengths[0]
        q = noise(1, heads, tokens, cache.head_dim, dtype=torch.bfloat16).float()
        given = draw(options(1, heads, tokens, length))
        if kind == "sliding":  # which keeps its own sinks only, and no keys before the window
            given |= {"causal": True, **own}
            given.pop("start", None)
        out, lse = cache.attend(q, **given, return_lse=True)
        k, v = (x[None] for x in cache.read())
    truth, true_lse = naive(q, k, v, **given)
    allowed = allowed_error(cache, q, k, v, given.get("scale"))
    assert distance(out, truth) <= allowed + 1e-6
    # As if values were of size one: no score is off by more. ALiBi's reach 60, of 2^-19 each.
    ones = torch.ones_like(k)
    assert distance(lse, true_lse) <= allowed_error(cache, q, k, ones, given.get("scale")) + 1e-5
    hidden = hidden_keys(0, tokens, length, **own).all(0)
    for got, original in ((k, given_k), (v, given_v)):
        # INT4 is off by half a scale, an eighth of the largest number, in the worst dimensions.
        off = (got - original).norm(dim=-1) / original.norm(dim=-1)
        assert bool((off[..., ~hidden] < 0.25).all())
