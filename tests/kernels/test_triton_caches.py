"""Caches and plain tensors through the Triton kernels, interpreted on a CPU."""

from typing import Any

import pytest
import torch

import kvfold
from kvfold import KVCache
from kvfold.cache.fixed import FixedKVCache
from kvfold.errors import InputError
from kvfold.kernels.registry import home
from kvfold.ops.rope import Rotary
from tests.toolbox.attention_cases import contents, naive, noise, qkv
from tests.toolbox.triton_cases import CLOSE, DEVICE, check

pytestmark = pytest.mark.usefixtures("triton")


@pytest.mark.parametrize("dtype", ["bf16", "int8", "int4", ("int8", "int4"), "fp8"], ids=str)
@pytest.mark.parametrize(
    "kind",
    [{}, {"kind": "paged", "page_size": 5}, {"kind": "sliding", "window": 12, "sinks": 2}],
    ids=["contiguous", "paged", "sliding"],
)
def test_caches(dtype: Any, kind: dict[str, Any]) -> None:
    """Filled, extended by a token, attended: float64 on what the cache holds."""
    ends: dict[str, Any] = {"exact_first": 2, "exact_recent": 4} if "int4" in dtype else {}
    cache = KVCache(2, 32, batch=2, dtype=dtype, device=DEVICE, **kind, **ends)
    for tokens, seed in ((41, 1), (1, 2)):
        k, v = (noise(2, 2, tokens, 32, seed=seed + i).to(DEVICE) for i in (0, 7))
        cache.append(k, v)
    q = noise(2, 6, 1, 32)
    out, lse = cache.attend(q.to(DEVICE), return_lse=True)
    window: dict[str, Any] = {"window": 12, "sinks": 2} if kind.get("kind") == "sliding" else {}
    keys, values = contents(cache)
    truth, true_lse = naive(q, keys.cpu(), values.cpu(), **window)
    check((out.cpu(), lse.cpu(), truth, true_lse))


def test_ragged_forked_and_shortened_sequences() -> None:
    cache = KVCache(1, 16, batch=2, dtype="int8", kind="paged", page_size=4, device=DEVICE)
    for rows, tokens in (([0], 9), ([1], 3)):
        k, v = (noise(1, 1, tokens, 16, seed=tokens + i).to(DEVICE) for i in (0, 1))
        cache.append(k, v, rows)
    cache.fork(0, 1)
    cache.truncate(6, [1])
    q = noise(2, 3, 1, 16)
    out = cache.attend(q.to(DEVICE))
    keys, values = (x.cpu() for x in cache.tensors(torch.float32))
    lengths = torch.tensor(cache.lengths)
    assert cache.lengths == [9, 6]
    truth, _ = naive(q, keys, values, lengths=lengths)
    assert isinstance(out, torch.Tensor)
    torch.testing.assert_close(out.cpu().double(), truth.double(), rtol=0, atol=CLOSE)


def test_plain_tensors_go_through_the_kernel_and_explain_says_so() -> None:
    q, k, v = (noise(2, h, n, 24, seed=h).to(DEVICE) for h, n in ((6, 2), (3, 40), (3, 40)))
    assert home(DEVICE).name == "triton"
    assert "Triton" in str(kvfold.explain(q, k, v))
    out, lse = kvfold.attention(q, k.mT.contiguous().mT, v, window=9, return_lse=True)
    check((out.cpu(), lse.cpu(), *naive(q.cpu(), k.cpu(), v.cpu(), window=9)))
    # What the kernel does not do goes another way.
    wide = noise(1, 1, 1, 512).to(DEVICE)
    assert "Triton" not in str(kvfold.explain(wide, *[noise(1, 1, 9, 512).to(DEVICE)] * 2))


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("shape", [(10,), (2, 1, 1, 10), (1, 4, 2, 10), (2, 4, 2, 1)], ids=str)
def test_masks(additive: bool, shape: tuple[int, ...]) -> None:
    cache = KVCache(2, 16, batch=2, dtype="int8", device=DEVICE)
    cache.append(noise(2, 2, 10, 16, seed=1).to(DEVICE), noise(2, 2, 10, 16, seed=2).to(DEVICE))
    mask = noise(*shape, seed=3) if additive else noise(*shape, seed=3) > -0.5
    q = noise(2, 4, 2, 16)
    out, lse = cache.attend(q.to(DEVICE), mask=mask.to(DEVICE), return_lse=True)
    keys, values = contents(cache)
    check((out.cpu(), lse.cpu(), *naive(q, keys.cpu(), values.cpu(), mask=mask)))


def test_another_device_is_refused() -> None:
    cache = KVCache(1, 16, device=DEVICE, kind="paged")
    with pytest.raises(InputError, match="but this cache is on"):
        cache.append(noise(1, 1, 1, 16).to("meta"), noise(1, 1, 1, 16).to("meta"))


@pytest.mark.parametrize("dtype", ["bf16", "int4"])
def test_a_fixed_cache_is_a_cache(dtype: str) -> None:
    """Rotary on the way in, lengths on the device; the truth is a cache of turned keys."""
    cache = FixedKVCache(2, 32, max_length=24, batch=2, dtype=dtype, device=DEVICE)
    plain = KVCache(2, 32, batch=2, dtype=dtype, device=DEVICE, exact_first=0, exact_recent=0)
    rotary = Rotary(16)
    for start, tokens in ((0, 9), (9, 1), (10, 2)):
        k, v = (noise(2, 2, tokens, 32, seed=start + i) for i in (0, 50))
        cache.append(k.to(DEVICE), v.to(DEVICE), rotary=rotary)
        turned = rotary.apply(k, *rotary.cos_sin(torch.arange(start, start + tokens)))
        plain.append(turned.to(DEVICE), v.to(DEVICE))
    q = noise(2, 6, 2, 32).to(DEVICE)
    wanted = plain.attend(q)
    assert isinstance(wanted, torch.Tensor)
    # Rotary in another order of operations moves a code by one here and there.
    torch.testing.assert_close(cache.attend(q), wanted, rtol=0, atol=0.02)
    assert cache.lengths.tolist() == [12, 12]


def test_a_full_fixed_cache_drops_tokens_and_says_so() -> None:
    cache = FixedKVCache(1, 16, max_length=4, dtype="fp32", device=DEVICE)
    k, v = noise(1, 1, 6, 16), noise(1, 1, 6, 16, seed=1)
    cache.append(k[:, :, :3].to(DEVICE), v[:, :, :3].to(DEVICE))
    assert not cache.overfull()
    cache.append(k[:, :, 3:].to(DEVICE), v[:, :, 3:].to(DEVICE))
    assert cache.overfull()
    assert cache.lengths.tolist() == [4]
    q, sink_logits = noise(1, 2, 1, 16), noise(2, seed=5)
    out = cache.attend(q.to(DEVICE), sink_logits=sink_logits.to(DEVICE)).cpu()
    truth, _ = naive(q, k[:, :, :4], v[:, :, :4], sink_logits=sink_logits)
    torch.testing.assert_close(out.double(), truth.double(), rtol=0, atol=CLOSE)
    cache.reset()
    assert cache.lengths.tolist() == [0]


def test_a_step_compiles_as_one_graph() -> None:
    """``torch.compile`` sees operators and nothing that breaks the graph."""
    cache = FixedKVCache(2, 32, max_length=16, batch=2, dtype="int8", device=DEVICE)
    plain = FixedKVCache(2, 32, max_length=16, batch=2, dtype="int8", device=DEVICE)
    rotary = Rotary(32)
    k, v = noise(2, 2, 1, 32).to(DEVICE), noise(2, 2, 1, 32, seed=1).to(DEVICE)
    plain.append(k, v, rotary=rotary)  # makes the table of turns, as a first step does
    cache.append(k, v, rotary=rotary)

    def step(k: torch.Tensor, v: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        cache.append(k, v, rotary=rotary)
        out: torch.Tensor = cache.attend(q)
        return out

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for i in range(3):
        q, k, v = (noise(2, heads, 1, 32, seed=9 * i + heads).to(DEVICE) for heads in (4, 2, 2))
        plain.append(k, v, rotary=rotary)
        torch.testing.assert_close(compiled(k, v, q), plain.attend(q))
    assert cache.lengths.tolist() == [4, 4]


@pytest.mark.gpu
def test_a_step_is_captured_and_replayed_as_the_cache_grows() -> None:
    cache = FixedKVCache(2, 64, max_length=64, batch=2, dtype="int8", device="cuda")
    plain = KVCache(2, 64, batch=2, dtype="int8", device="cuda")
    q, k, v = (noise(2, heads, 1, 64).cuda().bfloat16() for heads in (8, 2, 2))

    def step() -> torch.Tensor:
        cache.append(k, v)
        out: torch.Tensor = cache.attend(q)
        return out

    step()  # compiles
    cache.reset()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    cache.reset()
    for i in range(20):
        for x, heads, seed in ((q, 8, 100 + i), (k, 2, 200 + i), (v, 2, 300 + i)):
            x.copy_(noise(2, heads, 1, 64, seed=seed))
        graph.replay()
        plain.append(k, v)
        wanted = plain.attend(q)
        assert isinstance(wanted, torch.Tensor)
        torch.testing.assert_close(out, wanted, rtol=0.02, atol=0.01)


def test_a_fixed_cache_takes_every_option_but_its_own() -> None:
    q, k, v = (x.to(DEVICE) for x in qkv(2, (4, 2), 2, 20, (16, 16)))
    cache = FixedKVCache(2, 16, max_length=32, batch=2, dtype="fp32", device=DEVICE)
    cache.append(k, v)
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.2])
    truth, _ = naive(q.cpu(), k.cpu(), v.cpu(), alibi_slopes=slopes)
    out = cache.attend(q, alibi_slopes=slopes.to(DEVICE))
    torch.testing.assert_close(out.cpu().double(), truth, rtol=0, atol=CLOSE)
    for own in ("window", "sinks", "lengths"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{own}'"):
            cache.attend(q, **{own: 3})  # type: ignore[arg-type]
