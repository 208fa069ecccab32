"""``kvfold.attention_varlen``: each sequence gets what it gets alone."""

from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvfold
from kvfold.errors import InputError
from kvfold.kernels import varlen
from tests.toolbox.attention_cases import (
    DTYPES,
    check_as_good_as_pytorch,
    distance,
    naive,
    noise,
    without_kernels,
)

# Longer and shorter than its keys, equal ones in a row, and empty on either side or both.
QUERIES = (5, 5, 0, 37, 1, 1, 0, 20, 3)
KEYS = (5, 5, 9, 40, 65, 7, 0, 11, 0)


def begins(lengths: tuple[int, ...] | list[int]) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def packed(
    queries: tuple[int, ...] | list[int],
    keys: tuple[int, ...] | list[int],
    dtype: torch.dtype = torch.float32,
    dims: tuple[int, int] = (16, 24),
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shapes = (sum(queries), 6, dims[0]), (sum(keys), 2, dims[0]), (sum(keys), 2, dims[1])
    q, k, v = (noise(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes))
    return q, k, v


def alone(x: torch.Tensor, lengths: tuple[int, ...] | list[int]) -> list[torch.Tensor]:
    """``[1, H, T, dim]`` for each sequence."""
    return [one.transpose(0, 1)[None] for one in x.split(list(lengths))]


OPTIONS: list[dict[str, Any]] = [
    {"causal": True},
    {"causal": False},
    {"causal": True, "window": 4, "sinks": 1},
    {"causal": False, "window": (4, 2)},
    {"causal": True, "softcap": 2.0, "scale": 0.4},
    {"causal": True, "alibi_slopes": torch.tensor([0.5, 0.3, 0.2, 0.1, 0.05, 0.01])},
    {"causal": True, "sink_logits": noise(6, seed=7)},
]


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_against_float64(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], dtype: torch.dtype, kernels: bool
) -> None:
    if not kernels:
        without_kernels(monkeypatch)
    q, k, v = packed(QUERIES, KEYS, dtype)
    begins_q, begins_k = begins(QUERIES), begins(KEYS)
    out, lse = kvfold.attention_varlen(q, k, v, begins_q, begins_k, return_lse=True, **options)
    assert out.dtype == dtype
    assert out.shape == (len(q), 6, 24)
    assert lse.shape == (len(q), 6)
    again = kvfold.attention_varlen(q, k, v, begins_q, begins_k, **options)
    lses = [one.T[None] for one in lse.split(list(QUERIES))]
    sides = alone(q, QUERIES), alone(k, KEYS), alone(v, KEYS), lses
    for found in (out, torch.as_tensor(again)):
        for one, *side, its_lse in zip(alone(found, QUERIES), *sides, strict=True):
            check_as_good_as_pytorch(one, side[0], side[1], side[2], lse=its_lse, **options)


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=6),
    st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_any_lengths(pairs: list[tuple[int, int]], causal: bool) -> None:
    queries, keys = [a for a, _ in pairs], [b for _, b in pairs]
    q, k, v = packed(queries, keys)
    out = kvfold.attention_varlen(
        q, k, v, begins(queries), begins(keys), max(queries, default=0), 9, causal=causal
    )
    wanted = [
        naive(*one, causal=causal)[0][0].transpose(0, 1)
        for one in zip(alone(q, queries), alone(k, keys), alone(v, keys), strict=True)
    ]
    wanted = wanted or [q.new_zeros(0, 6, 24)]
    assert distance(torch.as_tensor(out), torch.cat(wanted)) < 1e-5


def test_sequences_of_one_length_are_one_call_and_nothing_is_padded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shapes = []

    def seen(q: torch.Tensor, k: torch.Tensor, *others: Any, **options: Any) -> Any:
        shapes.append((q.shape[0], q.shape[2], k.shape[2]))
        return kvfold.attention(q, k, *others, **options)

    monkeypatch.setattr(varlen, "attention", seen)
    queries, keys = [4] * 5 + [30], [4] * 5 + [32]
    q, k, v = packed(queries, keys)
    kvfold.attention_varlen(q, k, v, begins(queries), begins(keys), causal=True)
    assert shapes == [(5, 4, 4), (1, 30, 32)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients(options: dict[str, Any]) -> None:
    queries, keys = (2, 2, 0, 3, 1), (2, 2, 1, 1, 4)
    q, k, v = (x.requires_grad_() for x in packed(queries, keys, torch.float64, (3, 2)))
    where = begins(queries), begins(keys)

    def call(*x: torch.Tensor) -> Any:
        return kvfold.attention_varlen(x[0], x[1], x[2], *where, **options)

    assert torch.autograd.gradcheck(call, (q, k, v))
    nothing = kvfold.attention_varlen(q[:0], k[:0], v[:0], begins([]), begins([]), causal=True)
    assert torch.as_tensor(nothing).requires_grad  # and can be part of a loss


def test_merge_takes_its_log_sum_exp() -> None:
    q, k, v = packed((3, 4), (8, 8))

    def attend(low: int, high: int) -> Any:
        side = [torch.cat([x[low:high], x[8 + low : 8 + high]]) for x in (k, v)]
        where = begins((3, 4)), begins([high - low] * 2)
        return kvfold.attention_varlen(q, side[0], side[1], *where, causal=False, return_lse=True)

    whole, halves = attend(0, 8), [attend(0, 5), attend(5, 8)]
    torch.testing.assert_close(kvfold.merge(halves), whole, rtol=0, atol=1e-5)


GOOD: dict[str, Any] = {
    **dict(zip("qkv", packed((3, 4), (5, 6)), strict=True)),
    "cu_seqlens_q": begins((3, 4)), "cu_seqlens_k": begins((5, 6)), "causal": True,
}  # fmt: skip
BAD: list[tuple[dict[str, Any], str]] = [
    ({"q": GOOD["q"][None]}, r"\[1, 7, 6, 16\]"),
    ({"q": "rows"}, "q is a str"),
    ({"v": GOOD["v"][1:]}, r"\[10, 2, 24\]"),
    ({"q": GOOD["q"][:, :5]}, "5 query heads cannot share 2"),
    ({"k": GOOD["k"].half()}, "float16"),
    ({"cu_seqlens_q": [0, 3, 7]}, "cu_seqlens_q is a list"),
    ({"cu_seqlens_q": torch.tensor([0.0, 3, 7])}, "cu_seqlens_q is torch.float32"),
    ({"cu_seqlens_q": torch.tensor([[0, 3, 7]])}, r"cu_seqlens_q is torch.int64 \[1, 3\]"),
    ({"cu_seqlens_q": torch.tensor([0, 3, 8])}, "cu_seqlens_q runs from 0 to 8, of 7 tokens"),
    ({"cu_seqlens_k": torch.tensor([1, 3, 11])}, "cu_seqlens_k runs from 1"),
    ({"cu_seqlens_k": torch.tensor([0, 12, 11])}, "cu_seqlens_k runs from 0 to 11"),
    ({"cu_seqlens_k": torch.tensor([0, 11])}, "has 2 sequences, cu_seqlens_k has 1"),
    ({"max_seqlen_q": 3}, "max_seqlen_q=3, but a sequence of cu_seqlens_q has 4"),
    ({"max_seqlen_k": 5}, "max_seqlen_k=5"),
    ({"window": 0}, "window=0"),
    ({"window": (2, 2)}, "causal=True hides"),
]


@pytest.mark.parametrize(("change", "words"), BAD, ids=[words for _, words in BAD])
def test_bad_input(change: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        kvfold.attention_varlen(**(GOOD | change))


def test_causal_has_no_default() -> None:
    with pytest.raises(TypeError, match="causal"):
        kvfold.attention_varlen(**{k: x for k, x in GOOD.items() if k != "causal"})
