"""Tensors as addresses for C, which cannot tell what it is given: checked here, on every call."""

from array import array
from collections.abc import Iterable

import torch

from kvfold.errors import InputError


class Buffer:
    """Numbers of one dtype in this machine's memory, where C reads or writes them.

    Args:
        name: what errors call it.
        dtype: the only one it may have; None where C is told which it is.

    >>> lengths = Buffer("lengths", torch.int32)
    >>> lengths.address(torch.zeros(2, dtype=torch.int32), (2,)) != 0
    True
    """

    __slots__ = ("dtype", "name")

    def __init__(self, name: str, dtype: torch.dtype | None = None) -> None:
        self.name, self.dtype = name, dtype

    def address(self, x: torch.Tensor, shape: tuple[int, ...]) -> int:
        """Where ``x`` lies: of this shape, one number after the other.

        Raises:
            InputError: if C would read or write anything else than what is meant.
        """
        fits = x.dtype is self.dtype and x.is_cpu and x.shape == shape and x.is_contiguous()
        if fits:
            return x.data_ptr() or self._nothing(x)
        raise self._refusal(x, shape)

    def row_address(self, x: torch.Tensor, shape: tuple[int, ...]) -> int:
        """Where ``x`` lies: of this shape, its last dimension one number after the other.

        Raises:
            InputError: if C would read or write anything else than what is meant.
        """
        known = self.dtype is None or x.dtype is self.dtype
        if known and x.is_cpu and x.shape == shape and (x.stride()[-1] == 1 or shape[-1] <= 1):
            return x.data_ptr() or self._nothing(x)
        raise self._refusal(x, shape)

    def _refusal(self, x: torch.Tensor, shape: tuple[int, ...]) -> InputError:
        dtype = "" if self.dtype is None else f"{self.dtype} "
        return InputError(
            f"{self.name}: {x.dtype} {list(x.shape)} with strides {list(x.stride())} on "
            f"{x.device}; the kernels expect contiguous {dtype}{list(shape)} on cpu"
        )

    def _nothing(self, x: torch.Tensor) -> int:
        if x.numel():
            raise InputError(f"{self.name}: the memory of this tensor has been freed")
        return 0


class Int32s:
    """Whole numbers of Python's as C reads them; whoever hands out the address keeps this.

    >>> len(Int32s([3, 4]))
    2
    """

    __slots__ = ("_memory", "address", "count")

    def __init__(self, numbers: Iterable[int]) -> None:
        try:
            given = numbers.tolist() if isinstance(numbers, torch.Tensor) else numbers
            self._memory = array("i", given)
        except OverflowError:
            raise InputError("positions beyond 2147483647: expected fewer tokens") from None
        self.address, self.count = self._memory.buffer_info()

    def __len__(self) -> int:
        return self.count
