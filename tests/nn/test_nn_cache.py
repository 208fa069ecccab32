"""The attention layer with caches, padding and contexts that are projected once."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.nn import Rotary
from tests.toolbox.nn_cases import F32, close, layer, tokens


@settings(max_examples=20, deadline=None)
@given(
    kv_heads=st.integers(1, 3),
    group_size=st.integers(1, 4),
    length=st.integers(1, 40),
    prefill=st.integers(0, 20),
    window=st.none() | st.integers(1, 12),
    kind=st.sampled_from(["contiguous", "paged", "sliding"]),
    batch=st.integers(1, 3),
)
def test_step_by_step_equals_all_at_once(
    kv_heads: int,
    group_size: int,
    length: int,
    prefill: int,
    window: int | None,
    kind: str,
    batch: int,
) -> None:
    kind = "paged" if window is None and kind == "sliding" else kind
    options: dict[str, Any] = {"window": window, "sinks": 0 if window is None else 2}
    exact = layer(
        24, kv_heads * group_size, kv_heads, head_dim=8, v_head_dim=6, rotary=Rotary(6),
        qk_norm=1e-6, qkv_bias=True, **options,
    )  # fmt: skip
    x = tokens(batch, length, 24)
    truth = exact(x).detach()
    single = exact.float()
    with torch.inference_mode():
        cache = single.new_cache(batch, dtype="fp32", kind=kind, page_size=4)
        cuts = [0, *range(min(prefill, length), length + 1)]
        steps = [single(x[:, i:j].float(), cache=cache) for i, j in pairwise(cuts)]
    assert cache.lengths == [length] * batch
    close(torch.cat(steps, 1), truth, max(48, length), F32)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp8", "int8", "int4", ("int8", "int4")])
def test_a_first_prefill_never_reads_the_cache(dtype: Any) -> None:
    single = layer(64, 4, 2, dtype=F32, rotary=Rotary(16))
    x = tokens(2, 20, 64, dtype=F32)
    assert torch.equal(single(x, cache=single.new_cache(2, dtype=dtype)), single(x))


@torch.inference_mode()
def test_right_padding_does_not_enter_the_cache() -> None:
    single = layer(24, 4, 2, dtype=F32, rotary=Rotary(6))
    x, lengths = tokens(3, 9, 24, dtype=F32), [9, 4, 0]
    step = tokens(3, 1, 24, seed=5, dtype=F32)
    cache = single.new_cache(3, dtype="fp32")
    first = single(x, cache=cache, lengths=torch.tensor(lengths))
    assert cache.lengths == lengths
    second, weights = single(step, cache=cache, need_weights=True)
    for b, n in enumerate(lengths):
        alone = single(torch.cat([x[b : b + 1, :n], step[b : b + 1]], 1))
        close(torch.cat([first[b, :n], second[b]]), alone[0], 24, F32)
        assert weights[b, :, :, n + 1 :].count_nonzero() == 0


@torch.inference_mode()
def test_left_padding_is_never_seen() -> None:
    single = layer(24, 4, 2, dtype=F32, rotary=Rotary(6))
    x, start = tokens(3, 9, 24, dtype=F32), torch.tensor([0, 5, 8])
    step, cache = tokens(3, 1, 24, seed=5, dtype=F32), single.new_cache(3, dtype="fp32")
    first = single(x, cache=cache, start=start)
    both = torch.cat([first, single(step, cache=cache, start=start)], 1)
    for b, s in enumerate(start.tolist()):
        alone = single(torch.cat([x[b : b + 1, s:], step[b : b + 1]], 1))
        close(both[b, s:], alone[0], 24, F32)  # whatever the position: rotary is relative


@torch.inference_mode()
def test_a_context_is_projected_once() -> None:
    exact = layer(24, 4, 2, kv_hidden_size=10, causal=False)
    x, context, lengths = tokens(2, 6, 24), tokens(2, 7, 10), torch.tensor([5, 3])
    mask = tokens(2, 1, 1, 7, seed=9) > -1
    truth = exact(x, context, lengths=lengths, mask=mask)
    single = exact.float()
    cache = single.new_cache(2, dtype="fp32")
    hide = {"lengths": lengths, "mask": mask, "cache": cache}
    steps = [single(x[:, t : t + 1].float(), context.float(), **hide) for t in range(3)]
    single.k_proj = single.v_proj = None  # not needed any more
    steps.append(single(x[:, 3:].float(), context.float(), **hide))
    close(torch.cat(steps, 1), truth, 24, F32)
    assert cache.lengths == [5, 3]


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["contiguous", "paged", "sliding"])
def test_weights_from_a_cache_reproduce_the_output(kind: str) -> None:
    single = layer(24, 4, 2, dtype=F32, rotary=Rotary(6), window=5, sinks=1)
    cache, x = single.new_cache(2, dtype="fp32", kind=kind), tokens(2, 12, 24, dtype=F32)
    full, all_weights = single(x, need_weights=True)
    single(x[:, :9], cache=cache)
    out, weights = single(x[:, 9:], cache=cache, need_weights=True)
    close(weights, all_weights[:, :, 9:], 24, F32)
    close(out, full[:, 9:], 24, F32)
