"""Fixed caches on a CPU: what growing ones give, bit by bit, compiled or not.

Triton's, on a GPU or interpreted, are in ``tests/kernels/test_triton_caches.py``.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import kvfold
from kvfold.errors import InputError
from kvfold.kernels.cpu import fixed
from kvfold.ops.formats import FORMATS
from kvfold.ops.options import check_options
from kvfold.ops.rope import Rotary
from tests.toolbox.attention_cases import needs_kernels, noise

pytestmark = needs_kernels
Outputs = tuple[torch.Tensor, ...]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def new(**options: Any) -> kvfold.FixedKVCache:
    given: dict[str, Any] = {"max_length": 50, "batch": 3, "device": "cpu"}
    return kvfold.FixedKVCache(2, 16, **{**given, **options})


def step(cache: Any, q: torch.Tensor, k: torch.Tensor, **options: Any) -> Outputs:
    cache.append(k, k)
    found: Outputs = cache.attend(q, return_lse=True, softcap=3.0, **options)
    return found


def check(found: Outputs, wanted: Outputs) -> None:
    assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


@pytest.mark.parametrize(("name", "window"), [*((name, None) for name in FORMATS), ("int8", 9)])
def test_a_fixed_cache_is_a_cache(name: str, window: int | None) -> None:
    """50 tokens are no whole number of blocks; compiled once for prompts, once for steps."""
    ours, compiled = (new(dtype=name, window=window) for _ in range(2))
    grown = kvfold.KVCache(2, 16, batch=3, dtype=name, exact_first=0, exact_recent=0)
    once = torch.compile(step, fullgraph=True, dynamic=True, backend="eager")
    asked = {} if window is None else {"window": window}
    for index, tokens in enumerate((20, 5, 1, 1, 6)):
        q, k = noise(3, 4, tokens, 16, seed=index), noise(3, 2, tokens, 16, seed=index + 9)
        wanted = step(grown, q, k, **asked)
        check(step(ours, q, k), wanted)
        with torch._dynamo.config.patch(error_on_recompile=index > 2):
            check(once(compiled, q, k), wanted)
    assert ours.lengths.tolist() == [33] * 3
    for one, other in zip(ours.tensors(torch.float32), grown.tensors(torch.float32), strict=True):
        assert torch.equal(one[:, :, :33], other)
        assert not one[:, :, 33:].any()


def test_rotary_on_the_way_in() -> None:
    ours, turned, rotary = new(dtype="fp32"), new(dtype="fp32"), Rotary(16)
    for start, tokens in ((0, 9), (9, 1)):
        k = noise(3, 2, tokens, 16, seed=start)
        ours.append(k, k, rotary=rotary)
        turns = rotary.cos_sin(torch.arange(start, start + tokens))
        turned.append(rotary.apply(k, *turns), k)
    assert torch.equal(ours.attend(noise(3, 4, 1, 16)), turned.attend(noise(3, 4, 1, 16)))


def test_a_mask_is_of_all_positions() -> None:
    ours, grown = new(dtype="fp32"), kvfold.KVCache(2, 16, batch=3, dtype="fp32")
    q, k, mask = noise(3, 4, 2, 16), noise(3, 2, 12, 16), noise(3, 1, 2, 50) > -1
    for cache in (ours, grown):
        cache.append(k, k)
    wanted = grown.attend(q, mask=mask[..., :12])
    assert torch.equal(ours.attend(q, mask=mask), torch.as_tensor(wanted))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_full_one_refuses_and_stays_as_it_is(compiled: bool) -> None:
    cache = new(max_length=12, batch=1)
    k = noise(1, 2, 12, 16)
    cache.append(k, k)
    before = cache.attend(noise(1, 4, 1, 16))
    call = torch.compile(step, fullgraph=True, backend="eager") if compiled else step
    with pytest.raises(InputError, match="13 tokens do not fit a fixed cache of 12"):
        call(cache, noise(1, 4, 1, 16), noise(1, 2, 1, 16))
    assert torch.equal(cache.attend(noise(1, 4, 1, 16)), before)


def test_truncate_reorder_and_reset() -> None:
    cache, k = new(dtype="int8"), noise(3, 2, 20, 16)
    q = noise(3, 4, 1, 16)
    cache.append(k[:, :, :15], k[:, :, :15])
    wanted = cache.attend(q)
    cache.append(k[:, :, 15:], k[:, :, 15:])
    cache.truncate(15)
    assert torch.equal(cache.attend(q), wanted)
    cache.reorder([2, 0, 0])
    rows = torch.tensor([2, 0, 0])
    assert torch.equal(cache.attend(q[rows]), wanted[rows])
    with pytest.raises(InputError, match="keeps its 3"):
        cache.reorder([1])
    with pytest.raises(InputError, match="sequences 0 to 2"):
        cache.reorder([1, 2, 3])
    cache.reset()
    assert cache.lengths.tolist() == [0, 0, 0]


def test_where_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVFOLD_BACKEND", "torch")
    with pytest.raises(InputError, match="has no kernels"):
        new()


@pytest.mark.parametrize("dtype", ["bf16", "int4"])
def test_the_operators_are_well_behaved(dtype: str) -> None:
    """PyTorch's own checks: what is written is declared, and shapes are foretold."""
    cache, x = new(dtype=dtype), noise(3, 2, 5, 16)
    cache.append(x, x)
    parts, tests = fixed._parts(cache._view), ("test_schema", "test_faketensor")
    ops = torch.ops.kvfold
    torch.library.opcheck(ops.cpu_append.default, (x, x, *parts), test_utils=tests)
    options = check_options((3, 4, 5, 50), {"sink_logits": noise(4), "mask": noise(5, 50)})
    read = (noise(3, 4, 5, 16), *parts, 16, *options.flat())
    torch.library.opcheck(ops.cpu_attend.default, read, test_utils=tests)
