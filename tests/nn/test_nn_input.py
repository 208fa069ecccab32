"""What the attention layer refuses, in one line each."""

import math
from typing import Any

import pytest
import torch

from kvfold.errors import InputError
from kvfold.nn import GroupedQueryAttention, Rotary
from tests.toolbox.nn_cases import F32, layer, tokens


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ((24, 5, 1), {}, "num_heads=5 does not divide hidden_size=24"),
        ((24, 4, 3), {}, "num_kv_heads=3 does not divide num_heads=4"),
        ((24, 4, 2), {"rotary": Rotary(8)}, "rotary dim=8 is more than head_dim=6"),
        ((24, 4, 2), {"window": 0}, "window=0"),
        ((24, 4, 2), {"window": 3, "causal": False}, "causal"),
        ((24, 4, 2), {"sinks": 2}, "sinks=2 without a window"),
        ((24, 4, 2), {"softcap": -1.0}, "softcap=-1.0"),
        ((24, 4, 2), {"scale": math.nan}, "scale=nan"),
        ((24, 4, 2), {"dropout": 1.0}, "dropout=1.0"),
        ((24, 4, 2), {"qk_norm": 0.0}, "qk_norm=0.0"),
        ((24, 4, 2), {"kv_hidden_size": 0}, "kv_hidden_size=0"),
    ],
)
def test_bad_layers(sizes: tuple[int, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        GroupedQueryAttention(*sizes, **options)


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"x": tokens(9, 24)}, r"x has shape \[9, 24\], expected \[B, tokens, 24\]"),
        ({"x": tokens(2, 9, 20)}, r"x has shape \[2, 9, 20\]"),
        ({"x": tokens(2, 9, 24, dtype=F32)}, "x is torch.float32 on cpu, not torch.float64 on cpu"),
        ({"context": tokens(2, 9, 24)}, "context was given to a layer that is causal"),
        ({"context": tokens(1, 9, 24)}, r"context has shape .* expected \[2, tokens, 24\]"),
        ({"start": torch.tensor([1])}, r"start has shape \[1\], expected \[2\]"),
        ({"start": torch.tensor([0, 10])}, "start runs from 0 to 10"),
        ({"lengths": torch.tensor([-1, 5])}, "lengths runs from -1 to 5"),
        ({"mask": torch.ones(2, 9, dtype=torch.bool)}, r"mask has shape \[2, 9\]"),
        ({"mask": torch.ones(9, 9, dtype=torch.long)}, "mask is torch.int64"),
        ({"positions": torch.arange(8)}, r"positions has shape \[8\]"),
    ],
)
def test_bad_calls(given_: dict[str, torch.Tensor], message: str) -> None:
    exact = layer(24, 4, 2, rotary=Rotary(6))
    with pytest.raises(InputError, match=message):
        exact(**{"x": tokens(2, 9, 24), **given_})


def test_a_wide_context_is_needed() -> None:
    with pytest.raises(InputError, match="needs a context"):
        layer(24, 4, 2, kv_hidden_size=10, causal=False)(tokens(2, 9, 24))


def test_a_cache_refuses_gradients() -> None:
    single, x = layer(24, 4, 2, dtype=F32), tokens(2, 9, 24, dtype=F32)
    cache = single.new_cache(2)
    with pytest.raises(InputError, match="gradients") as error:
        single(x, cache=cache)
    assert "no_grad" in error.value.hint
    single.requires_grad_(False)
    single(x, cache=cache)  # nothing needs gradients now


@torch.inference_mode()
def test_caches_that_do_not_fit() -> None:
    single, x = layer(24, 4, 2, dtype=F32, window=4), tokens(2, 9, 24, dtype=F32)
    with pytest.raises(InputError, match=r"\(1, 2, 6, 6\), expected \(2, 2, 6, 6\)") as error:
        single(x, cache=single.new_cache(1))
    assert "new_cache(2)" in error.value.hint
    with pytest.raises(InputError, match="window=3, sinks=0, the layer with window=4"):
        single(x, cache=single.new_cache(2, kind="sliding", window=3))
    with pytest.raises(InputError, match="sliding"):
        layer(24, 4, 2).new_cache(kind="sliding")
    sinking = layer(24, 4, 2, dtype=F32, window=4, sinks=2)
    with pytest.raises(InputError, match="sinks, which start="):
        sinking(x, cache=sinking.new_cache(2, kind="sliding"), start=torch.tensor([0, 3]))
    cache = single.new_cache(2)
    single(x, cache=cache)
    for wrong in (
        {"lengths": torch.tensor([2, 9])},
        {"start": torch.tensor([0])},
        {"mask": torch.ones(9, 9, dtype=torch.bool)},
        {"positions": torch.arange(9), "mask": torch.ones(3, 1, 1, 1)},
    ):
        with pytest.raises(InputError):
            single(x, cache=cache, **wrong)
        assert cache.lengths == [9, 9]  # nothing was appended


@torch.inference_mode()
def test_caches_of_layers_that_are_not_causal() -> None:
    single = layer(24, 4, 2, dtype=F32, causal=False)
    x, cache = tokens(2, 9, 24, dtype=F32), single.new_cache(2)
    with pytest.raises(InputError, match="only a context"):
        single(x, cache=cache)
    single(x, x, cache=cache)
    with pytest.raises(InputError, match="this one has") as error:
        single(x, x[:, :5], cache=cache)
    assert "new cache" in error.value.hint
