"""Every way to compute attention, best first: the one ladder that all calls go down.

A new backend is a file with a ``Backend`` and its line in ``LADDER``.
"""

import os

import torch

from kvfold.kernels.backend import Backend, Call, Found, Kernels
from kvfold.kernels.cpu.backend import Cpu
from kvfold.kernels.torch.flex import Flex
from kvfold.kernels.torch.products import FewProducts, Products
from kvfold.kernels.torch.sdpa import Sdpa
from kvfold.kernels.triton.backend import Triton

LADDER: list[Backend] = [
    Triton(),
    Cpu(),
    FewProducts(),
    Flex(),
    Sdpa(),
    Products(),
]


def choose(call: Call) -> tuple[Backend, str]:
    """The first backend that has nothing against the call, and what the one before it had."""
    said = ""
    for backend in LADDER:
        reason = backend.why_not(call) or backend.lacks(call.options)
        if reason is None:
            return backend, said
        said = reason
    raise AssertionError("the last backend takes everything")


def attend(call: Call) -> Found:
    """Compute it: the output, and the log-sum-exp if it was asked for."""
    for backend in LADDER:  # as ``choose`` does, which would take a fiftieth of a step's time
        if backend.why_not(call) is None and backend.lacks(call.options) is None:
            found = backend.attend(call)
            if call.out is None or found[0] is call.out:
                return found
            return call.out.copy_(found[0]), found[1]
    raise AssertionError("the last backend takes everything")


def home(device: torch.device) -> Kernels:
    """The kernels for memory on a device: those that ``KVFOLD_BACKEND`` names, or the first.

    ``KVFOLD_BACKEND`` is ``torch`` to compare with, ``triton`` on a CPU for Triton's interpreter.
    """
    wished = os.environ.get("KVFOLD_BACKEND")
    if wished:
        for backend in LADDER:
            if backend.name == wished and isinstance(backend, Kernels):
                return backend
    for backend in LADDER:
        if isinstance(backend, Kernels) and backend.here(device):
            return backend
    raise AssertionError("the last backend is everywhere")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def home_name(device: torch.device) -> str:
    """What ``home`` is called; ``torch.compile`` takes it as it is."""
    return home(device).name


def named(name: str) -> Kernels:
    """The kernels of that name."""
    return next(x for x in LADDER if isinstance(x, Kernels) and x.name == name)
