"""``kvfold.attention`` never repeats keys and values."""

from typing import Any

import pytest

import kvfold
from tests.toolbox.attention_cases import (
    qkv,
    slopes,
    without_kernels,
)
from tests.toolbox.largest import Largest


@pytest.mark.parametrize(
    ("dims", "options"),
    [
        ((128, 128), {}),
        ((128, 128), {"causal": False}),
        ((128, 128), {"window": 9, "sinks": 1}),
        ((128, 128), {"return_lse": True}),
        ((128, 128), {"softcap": 3.0}),
        ((128, 64), {}),
        ((128, 128), {"dropout": 0.1}),
    ],
    ids=str,
)
@pytest.mark.parametrize("gradients", [False, True])
def test_keys_and_values_are_not_repeated(
    dims: tuple[int, int], options: dict[str, Any], gradients: bool
) -> None:
    """No tensor, not even a view, is as large as repeated K or V would be."""
    q, k, v = qkv(1, (16, 2), 20, 64, dims)
    recorder = Largest()
    with recorder:
        out = kvfold.attention(*(x.requires_grad_(gradients) for x in (q, k, v)), **options)
        if gradients:
            (out[0] if isinstance(out, tuple) else out).sum().backward()
    assert recorder.numel < 16 * 64 * min(dims), recorder.operator


@pytest.mark.parametrize("dims", [(128, 128), (128, 64)], ids=str)
def test_decoding_does_not_repeat_keys_and_values(
    monkeypatch: pytest.MonkeyPatch, dims: tuple[int, int]
) -> None:
    q, k, v = qkv(1, (16, 2), 1, 64, dims)
    with Largest() as recorder:
        kvfold.attention(q, k, v, alibi_slopes=slopes(16), softcap=5.0)
        without_kernels(monkeypatch)
        kvfold.attention(q, k, v, alibi_slopes=slopes(16), softcap=5.0)
    assert recorder.numel <= k.numel(), recorder.operator
