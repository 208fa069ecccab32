"""What is handed to C as an address: refused unless C reads what is meant."""

import ctypes
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.cache.kv import KVCache
from kvfold.errors import InputError
from kvfold.kernels.cpu.call import KernelCall, part_of
from kvfold.kernels.cpu.pointer import Buffer, Int32s
from kvfold.kernels.view import KVView, Rows, readable
from kvfold.ops.options import FIELDS, Options, unflattened
from tests.toolbox.attention_cases import contents, filled, kernels, needs_kernels, noise, stores

SIZES = st.lists(st.integers(0, 3), min_size=1, max_size=4)
NUMBERS = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.int64)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Any shape, strides, dtype, on the CPU or nowhere."""
    sizes = draw(SIZES)
    order = draw(st.permutations(range(len(sizes))))
    x = torch.zeros([sizes[i] for i in order], dtype=draw(st.sampled_from(NUMBERS)), device="cpu")
    x = x.permute([list(order).index(i) for i in range(len(sizes))])
    if draw(st.booleans()):
        x = x[..., :: draw(st.integers(1, 2))]
    if draw(st.booleans()):
        x = x.expand(draw(st.integers(1, 2)), *x.shape)
    return x if draw(st.booleans()) else x.to("meta")


@settings(max_examples=300, deadline=None)
@given(tensors(), st.sampled_from(NUMBERS), SIZES, st.booleans())
def test_only_the_buffer_that_is_meant_has_an_address(
    x: torch.Tensor, dtype: torch.dtype, sizes: list[int], own: bool
) -> None:
    shape = tuple(x.shape) if own else tuple(sizes)
    known = x.dtype is dtype and x.device.type == "cpu" and x.shape == shape
    for method, fits in (
        (Buffer("x", dtype).address, known and x.is_contiguous()),
        (Buffer("x", dtype).row_address, known and (x.shape[-1] <= 1 or x.stride(-1) == 1)),
    ):
        if fits:
            assert method(x, shape) == x.data_ptr()
            continue
        with pytest.raises(InputError) as error:
            method(x, shape)
        for word in ("x:", str(x.dtype), str(list(x.shape)), str(x.device), str(list(shape))):
            assert word in error.value.message


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=9))
def test_whole_numbers_arrive_as_they_are(numbers: list[int]) -> None:
    held = Int32s(numbers)
    found = (ctypes.c_int32 * len(numbers)).from_address(held.address) if numbers else ()
    assert list(found) == numbers


@pytest.mark.parametrize("number", [2**31, -(2**31) - 1, 10**30])
def test_whole_numbers_that_do_not_fit_are_refused(number: int) -> None:
    with pytest.raises(InputError, match="2147483647"):
        Int32s([0, number])


def test_freed_memory_has_no_address() -> None:
    """As left behind by those who shard parameters."""
    x = torch.zeros(8, dtype=torch.float32)
    x.untyped_storage().resize_(0)
    with pytest.raises(InputError, match="freed"):
        Buffer("x", torch.float32).address(x, (8,))


@needs_kernels
def test_calls_refuse_what_does_not_belong_together() -> None:
    """Wrong tensors within the library are refused by the same checks, not followed."""
    q, k = noise(2, 4, 1, 16), noise(2, 2, 9, 16)
    view = KVView.of_tensors(k, k, [9, 9])
    pages = view.table
    with pytest.raises(InputError, match="3 lengths for 2"):
        KernelCall(q, 2, [9, 9, 9], Options(), 9)
    call = KernelCall(q, 2, [9, 9], Options(), 9)
    for wrong in (pages.long(), pages.float(), pages.to("meta")):
        with pytest.raises(InputError, match="page table"):
            part_of(view._replace(table=wrong), None, call.lengths)
    with pytest.raises(InputError, match="1 ranges"):
        part_of(view, None, Int32s([9]))
    with pytest.raises(InputError, match="unknown cache dtype"):
        Rows.plain(k.double())
    with pytest.raises(InputError, match="expect contiguous"):
        part_of(KVView.of_tensors(k.mT.contiguous().mT, k, [9, 9]), None, call.lengths)
    wrongs: dict[str, Any] = {
        "mask": torch.zeros(2, 4, 1, 9, device="meta"),
        "start": torch.zeros(3, dtype=torch.int32),
        "alibi_slopes": torch.zeros(5),
        "sink_logits": torch.zeros(4, device="meta"),
    }
    for name, wrong in wrongs.items():
        values = dict(zip(FIELDS, Options().flat(), strict=True)) | {name: wrong}
        options = unflattened(list(values.values()))
        with pytest.raises(InputError, match=name):
            KernelCall(q, 2, [9, 9], options, 9)


@needs_kernels
@pytest.mark.parametrize("name", ["data", "scales"])
def test_a_cache_whose_memory_was_exchanged_is_refused(name: str) -> None:
    cache = filled(KVCache(2, 16, dtype="int8"), 9)
    store = stores(cache)[0]
    held = getattr(store.keys, name)
    for wrong in (held.float(), held[:, :, :-1], held.to("meta")):
        setattr(store.keys, name, wrong)
        store._sides = None
        with pytest.raises(InputError, match="pages" if name == "data" else "scales"):
            cache.attend(noise(1, 4, 1, 16))


@needs_kernels
def test_numbers_whose_memory_holds_the_other_sign() -> None:
    """The imaginary part of a conjugate is a view that is negated when it is read."""
    real, imaginary = noise(1, 2, 9, 16), noise(1, 2, 9, 16, seed=1)
    view = torch.complex(real, imaginary).conj().imag
    assert view.is_neg()
    assert torch.equal(readable(view), -imaginary)
    views, copies = (KVCache(2, 16, dtype="fp32") for _ in range(2))
    views.append(view, view)
    copies.append(-imaginary, -imaginary)
    for x, y in zip(contents(views), contents(copies), strict=True):
        assert torch.equal(x, y)
    q = view[:, :, :1]
    found, expected = views.attend(q), copies.attend(q.resolve_neg())
    assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected))


@needs_kernels
def test_measuring_bandwidth_reads_whole_tensors_only() -> None:
    x = torch.zeros(64, 64)
    kernels().read(x)
    with pytest.raises(InputError, match="data"):
        kernels().read(x.mT[:, :3])


@needs_kernels
def test_masks_over_no_keys() -> None:
    cache = KVCache(1, 8)
    for mask in (torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 0), torch.ones(1) > 0):
        assert torch.equal(
            torch.as_tensor(cache.attend(noise(1, 2, 1, 8), mask=mask)), torch.zeros(1, 2, 1, 8)
        )
