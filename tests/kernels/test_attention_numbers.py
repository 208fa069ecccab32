"""What attention's numbers keep: the digits asked for, and nothing of what is hidden."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import kvfold
from kvfold.cache.kv import KVCache
from kvfold.kernels.torch.flex import flex
from kvfold.ops.options import Options, Scoring
from tests.toolbox.attention_cases import (
    DTYPES,
    HALF,
    ISAS,
    allowed_error,
    contents,
    distance,
    filled,
    naive,
    needs_kernels,
    noise,
    prompts_by,
    qkv,
    skip_without_kernels,
    stores,
    using,
    without_kernels,
)

PATHS = ("kernel", "prompt", "matmul", "sdpa", "gradients")
EXTRAS: list[dict[str, Any]] = [
    {},
    {"softcap": 3.0},
    {"return_lse": True},
    {"softcap": 2.0, "return_lse": True},
    {"causal": False},
]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with using(str(request.param)):
        yield str(request.param)


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "matmul":
        without_kernels(monkeypatch)
    elif request.param in ("kernel", "prompt"):
        skip_without_kernels()
    prompts_by(monkeypatch, kernels=request.param == "prompt")
    return str(request.param)


def inputs(path: str, dtype: torch.dtype = torch.float32, **sizes: Any) -> list[torch.Tensor]:
    """Inputs for which attention takes the path."""
    few = path in ("kernel", "matmul")
    q, k, v = qkv(**{"tokens": 4 if few else 20, "keys": 60, **sizes}, dtype=dtype)
    return [x.requires_grad_(path == "gradients") for x in (q, k, v)]


# -- digits -----------------------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16", "fp8", "int4, of which all is exact"])
def test_float32_queries_get_float32_arithmetic(isa: str, name: str, group: int) -> None:
    """On every instruction set, over everything that is stored as floats.

    Scores are off by D float32 roundings of |q| |k|, weights and sums by a few: `allowed_error`
    without its terms for integers and for bfloat16's instructions.
    """
    cache = filled(KVCache(2, 64, batch=2, dtype=name[:4]), 75)
    if name.startswith("int4"):
        assert stores(cache)[0].pages_in_use == 0
    k, v = contents(cache)
    q = noise(2, 2 * group, 2, 64)
    out, lse = cache.attend(q, return_lse=True)
    truth, true_lse = naive(q, k, v)
    size = 64**-0.5 * float(q.norm(dim=-1).max() * k.norm(dim=-1).max())
    allowed = (math.expm1(2 * 64 * 2**-24 * size) + 4 * 2**-20) * float(v.abs().max())
    assert distance(out, truth) <= allowed
    assert distance(lse, true_lse) <= 64 * 2**-24 * size + 4 * 2**-20
    assert allowed < 2e-3 / 4  # what queries and weights of bfloat16 were off by


@needs_kernels
@pytest.mark.parametrize("group", [1, 4, 7, 8])
@pytest.mark.parametrize("source", HALF, ids=str)
@pytest.mark.parametrize("name", ["fp16", "bf16", "fp8", "int8", "int4"])
def test_halves_get_what_is_derived_for_them(
    isa: str, name: str, source: torch.dtype, group: int
) -> None:
    """Beyond the kernels' bound, the output is rounded to q's dtype."""
    cache = filled(KVCache(2, 64, batch=2, dtype=name), 150)
    k, v = contents(cache)
    q = noise(2, 2 * group, 2, 64, dtype=source)
    truth, _ = naive(q, k, v)
    rounding = torch.finfo(source).eps / 2 * float(truth.abs().max())
    out = torch.as_tensor(cache.attend(q))
    assert distance(out, truth) <= allowed_error(cache, q, k, v) + rounding


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("kind", ["mask", "mask of one head", "slopes", "both"])
def test_biases_keep_their_digits(path: str, kind: str, dtype: torch.dtype) -> None:
    """A float32 bias of a hundred is 2^-2 off in bfloat16; every path is as good as in float32.

    The same inputs in float32 and the same bias: what halves may add is their rounding of weights
    and outputs, 2^-8 (2^-11) each, of the largest value, and of scores in float32.
    """
    q, k, v = (x.detach() for x in inputs(path, dtype))
    options: dict[str, Any] = {}
    if kind in ("mask", "both"):
        options["mask"] = noise(2, 4, q.shape[2], 60, seed=5) * 30
    if kind == "mask of one head":
        options["mask"] = noise(60, seed=5) * 30
    if kind in ("slopes", "both"):
        options["alibi_slopes"] = torch.tensor([1.01, 3.03, 0.507, 7.007], dtype=torch.float32)
    truth, true_lse = naive(q, k, v, **options)
    given = [x.clone().requires_grad_(path == "gradients") for x in (q, k, v)]
    out: Any = kvfold.attention(given[0], given[1], given[2], **options)
    allowed = 4 * torch.finfo(dtype).eps * float(v.abs().max())
    assert distance(out, truth) <= allowed
    again: Any = kvfold.attention(given[0], given[1], given[2], **options, return_lse=True)
    assert distance(again[0], truth) <= allowed
    # float32: its sums of scores, and of biases up to 150 and 60 * 7
    assert distance(again[1], true_lse) <= 600 * 2**-23


# -- what is hidden ---------------------------------------------------------------------------


def hiding(tokens: int, keys: int) -> dict[str, tuple[dict[str, Any], torch.Tensor]]:
    """Options, and the keys ``[B, S]`` that they hide from every query."""
    hidden = torch.zeros(2, keys, dtype=torch.bool)
    right, left, both, some = (hidden.clone() for _ in range(4))
    right[0, 40:] = right[1, 50:] = True
    left[0, :30], left[1, :7] = True, True
    both[:, :10] = both[:, 50:] = True
    some[:, 5], some[:, 17:33], some[1, -1] = True, True, True
    window = hidden.clone()
    window[:, 2 : keys - tokens - 6] = True
    additive = torch.zeros(2, 1, 1, keys, dtype=torch.float32)
    return {
        "lengths": ({"lengths": torch.tensor([40, 50])}, right),
        "start": ({"start": torch.tensor([30, 7])}, left),
        "both": ({"start": torch.tensor([10, 10]), "lengths": torch.tensor([50, 50])}, both),
        "boolean mask": ({"mask": ~some[:, None, None]}, some),
        "additive mask": (
            {"mask": additive.masked_fill(some[:, None, None], -torch.inf)}, some,
        ),
        "window": ({"window": 7, "sinks": 2}, window),
    }  # fmt: skip


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("extra", EXTRAS, ids=str)
@pytest.mark.parametrize("name", list(hiding(4, 60)))
def test_hidden_keys_may_hold_anything(
    path: str, name: str, extra: dict[str, Any], value: float
) -> None:
    q, k, v = (x.detach() for x in inputs(path))
    options, hidden = hiding(q.shape[2], 60)[name]
    if "window" in options and extra.get("causal") is False:
        options = {**options, "window": (6, None)}
    where = hidden[:, None, :, None]
    found = []
    for fill in (0.0, value):
        given = [x.clone() for x in (q, k.masked_fill(where, fill), v.masked_fill(where, fill))]
        given = [x.requires_grad_(path == "gradients") for x in given]
        result: Any = kvfold.attention(given[0], given[1], given[2], **options, **extra)
        out = result if isinstance(result, tuple) else (result,)
        if path == "gradients":
            total = sum(x.nan_to_num(neginf=0).square().sum() for x in out)
            out += torch.autograd.grad(total, given)
        found.append([x.detach() for x in out])
    for clean, dirty in zip(*found, strict=True):
        assert torch.equal(clean, dirty)


@needs_kernels
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp8", "int8", "int4"])
@pytest.mark.parametrize("page_size", [7, 16])
def test_hidden_tokens_of_caches_may_hold_anything(isa: str, dtype: str, page_size: int) -> None:
    """Tokens whose keys and values are NaN, which a mask or the left padding hides."""
    bad = torch.tensor([0, 1, 20, 21, 35, 59])
    k, v, q = noise(1, 2, 60, 32), noise(1, 2, 60, 32, seed=1), noise(1, 4, 2, 32, seed=2)
    shown = torch.ones(60, dtype=torch.bool)
    shown[bad] = False
    additive = torch.zeros(60, dtype=torch.float32).masked_fill(~shown, -torch.inf)
    found = []
    for fill in (0.0, math.nan):
        k[:, :, bad], v[:, :, bad] = fill, fill
        cache = KVCache(2, 32, dtype=dtype, kind="paged", page_size=page_size)
        cache.append(k, v)
        outs = [cache.attend(q, mask=mask, return_lse=True) for mask in (shown, additive)]
        found.append([x for out in outs for x in out])
    for clean, dirty in zip(*found, strict=True):
        assert bool(clean.isfinite().all())
        assert torch.equal(clean, dirty)


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("extra", EXTRAS, ids=str)
@pytest.mark.parametrize("tokens", [4, 20])
def test_rows_that_see_nothing_have_finite_gradients(
    tokens: int, extra: dict[str, Any], dtype: torch.dtype, additive: bool
) -> None:
    """Zeros, -inf, and gradients of zero: as if the queries were not there."""
    q, k, v = (x.requires_grad_() for x in qkv(2, (4, 2), tokens, 60, dtype=dtype))
    mask = noise(2, 1, tokens, 60, seed=9) > 0
    mask[0, :, 1:3] = False
    given = torch.zeros(mask.shape, dtype=torch.float32).masked_fill(~mask, -torch.inf)
    given = given if additive else mask
    result: Any = kvfold.attention(q, k, v, mask=given, **{"causal": False, **extra})
    out, lse = result if isinstance(result, tuple) else (result, None)
    assert torch.equal(out[0, :, 1:3], torch.zeros_like(out[0, :, 1:3]))
    if lse is not None:
        assert bool(lse[0, :, 1:3].isneginf().all())
        assert int(lse.isneginf().sum()) == 8
    total = out.square().sum() + (0 if lse is None else lse.nan_to_num(neginf=0).sum())
    gradients = torch.autograd.grad(total, (q, k, v))
    assert all(bool(x.isfinite().all()) for x in gradients)
    assert torch.equal(gradients[0][0, :, 1:3], torch.zeros_like(gradients[0][0, :, 1:3]))
    assert float(gradients[0][0, :, 0].abs().max()) > 0


# -- ALiBi ------------------------------------------------------------------------------------


def test_later_keys_lose_as_earlier_ones_do(path: str) -> None:
    """With equal keys, weights fall with the distance on both sides: reversing changes nothing."""
    q, k, v = inputs(path)
    slopes = torch.tensor([0.5, 0.1, 0.03, 1.0], dtype=torch.float32)
    truth, _ = naive(q, k, v, causal=False, alibi_slopes=slopes)
    out: Any = kvfold.attention(q, k, v, causal=False, alibi_slopes=slopes)
    assert distance(out, truth) < 1e-5
    lengths = torch.tensor([33, 60])
    truth, _ = naive(q, k, v, causal=False, alibi_slopes=slopes, lengths=lengths)
    out = kvfold.attention(q, k, v, causal=False, alibi_slopes=slopes, lengths=lengths)
    assert distance(out, truth) < 1e-5


@pytest.mark.parametrize("tokens", [20, 60])
def test_alibi_of_both_sides_is_symmetric(tokens: int) -> None:
    q, k, v = (x.double() for x in qkv(2, (4, 2), 60, 60))
    slopes = torch.tensor([0.5, 0.1, 0.03, 1.0], dtype=torch.float64)
    out: Any = kvfold.attention(q, k, v, causal=False, alibi_slopes=slopes)
    back: Any = kvfold.attention(q.flip(2), k.flip(2), v.flip(2), causal=False, alibi_slopes=slopes)
    torch.testing.assert_close(back.flip(2), out, rtol=0, atol=1e-12)
    truth, _ = naive(q, k, v, causal=False, alibi_slopes=slopes)
    found, _ = flex(
        q.float(), k.float(), v.float(), Options(scoring=Scoring(alibi_slopes=slopes.float()))
    )
    assert distance(found, truth) < 1e-5


# -- shapes at the edge -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("dims", [(1, 1), (1, 5), (5, 1)], ids=str)
def test_heads_of_one_dimension_however_they_lie(dims: tuple[int, int], dtype: str) -> None:
    """Transposed views of one number per row have any stride in the last dimension."""
    for tokens in (1, 9):
        k, v = (noise(2, 2, d, tokens, seed=d).mT for d in dims)
        q = noise(2, 4, dims[0], 1, seed=7).mT
        sizes: dict[str, Any] = {"v_head_dim": dims[1], "batch": 2, "dtype": dtype}
        views, copies = (KVCache(2, dims[0], **sizes) for _ in range(2))
        views.append(k, v)
        copies.append(k.clone(memory_format=torch.contiguous_format), v.contiguous())
        for x, y in zip(contents(views), contents(copies), strict=True):
            assert torch.equal(x, y)
        found = torch.as_tensor(views.attend(q))
        assert torch.equal(found, torch.as_tensor(copies.attend(q.contiguous())))
        out: Any = kvfold.attention(q, k, v)
        assert distance(out, naive(q, k, v)[0]) < 1e-6


def test_a_mask_has_one_meaning_whatever_its_dimensions(path: str) -> None:
    """``[S]`` is one for all queries, on every path, as ``[1, 1, 1, S]`` is."""
    q, k, v = inputs(path)
    bools = noise(60, seed=3) > 0
    for mask in (bools, noise(60, seed=3), torch.tensor(True), torch.tensor(0.5)):
        for shape in (mask.shape, (1, *mask.shape), (1, 1, 1, *mask.shape)[-4:]):
            given = mask.view(shape)
            for extra in EXTRAS[:2]:
                out: Any = kvfold.attention(q, k, v, mask=given, **extra)
                truth, _ = naive(q, k, v, mask=given, **extra)
                assert distance(out, truth) < 1e-5
