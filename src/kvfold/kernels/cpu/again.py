"""A decoding step that one layer after the other repeats: what C is told stays, but for addresses.

Between two layers of a model the processor has forgotten the way through Python, and each line of
it takes several times as long as in a loop; so there are few here.
"""

from ctypes import byref
from typing import Any

import torch

from kvfold.kernels.cpu.call import APPEND, KernelCall, Written
from kvfold.kernels.cpu.library import Side, library
from kvfold.kernels.view import Rows

Sides = tuple[Side, Side]


def sides_at_hand(rows: tuple[Rows, Rows]) -> Sides | None:
    """Keys and values as C has them, if they were read before."""
    keys, values = rows[0].known, rows[1].known
    return (keys, values) if isinstance(keys, Side) and isinstance(values, Side) else None


class Again:
    """What the first layer of a step made for C, to be told where another layer's things lie.

    Args:
        appends: what ``Kernels.append`` kept, for every store that is written.
        attend: what ``Kernels.attend`` kept; it reads the same stores, in this order.
        tensors: that layer's q, k, v and out ``[tokens, H, D]``.
    """

    def __init__(
        self, appends: list[Written], attend: KernelCall, tensors: tuple[torch.Tensor, ...]
    ) -> None:
        self._appends, self._attend = appends, attend
        self._likes = [(x.shape, x.stride(), x.dtype) for x in tensors]
        found = library()
        assert found is not None
        self._c = found.c
        call = attend.struct
        # Structs within structs are the same memory; asking for one again takes time.
        self._q, self._out = call.q, call.out
        self._read = [call.parts[i] for i in range(len(appends))]
        self._new = [(each.call.k, each.call.v, each.call.part) for each in appends]
        self._calls = [byref(each.call) for each in appends], byref(call)

    @classmethod
    def of(
        cls,
        appends: list[dict[str, Any]],
        attend: dict[str, Any],
        tensors: tuple[torch.Tensor, ...],
    ) -> "Again | None":
        """Of what was kept; None if other kernels did it, or otherwise."""
        written, call = [kept.get(APPEND) for kept in appends], attend.get("cpu")
        stores = call.struct.num_parts if isinstance(call, KernelCall) else 0
        if stores != len(written) or not all(isinstance(each, Written) for each in written):
            return None
        return cls(written, call, tensors)  # type: ignore[arg-type]

    def fits(self, tensors: tuple[torch.Tensor, ...]) -> bool:
        """Whether q, k, v and out lie as C was told."""
        for x, (shape, strides, dtype) in zip(tensors, self._likes, strict=True):
            if x.shape != shape or x.stride() != strides or x.dtype is not dtype:
                return False
        return True

    def run(self, tensors: tuple[torch.Tensor, ...], stores: list[Sides]) -> None:
        """Write k and v, which fit, to the stores, and attend."""
        q, k, v, out = tensors
        appends, attend = self._calls
        at_k, at_v = k.data_ptr(), v.data_ptr()
        for (new_k, new_v, part), read, (keys, values), append in zip(
            self._new, self._read, stores, appends, strict=True
        ):
            new_k.data, new_v.data = at_k, at_v
            part.k = read.k = keys
            part.v = read.v = values
            self._c.kvf_append(append)
        self._q.data, self._out.data = q.data_ptr(), out.data_ptr()
        self._c.kvf_attend(attend)
