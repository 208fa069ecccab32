"""This machine's memory, bandwidth and arithmetic, measured."""

import os
from collections.abc import Callable
from time import perf_counter

import torch

from kvfold.bench.buffers import read
from kvfold.plan.hardware import Hardware

_BYTES = 512 << 20  # far beyond any cache
_SIZE = 2048  # of the square matrices that are multiplied
_ROUNDS = 5


def measure_here() -> Hardware:
    """The GPU if there is one, else the CPU: read bandwidth, and a large matrix product.

    Takes a second or two. Bandwidth is the best of several rounds, as other work only slows it.
    """
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    data = torch.ones(_BYTES, dtype=torch.uint8, device=device)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    a = torch.randn(_SIZE, _SIZE, device=device, dtype=dtype)
    reading = min(_seconds(lambda: read(data)) for _ in range(_ROUNDS))
    multiplying = min(_seconds(lambda: a @ a) for _ in range(_ROUNDS))
    if on_gpu:
        memory = float(torch.cuda.get_device_properties(0).total_memory)
        name = torch.cuda.get_device_name()
    else:
        memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        name = f"this CPU, {torch.get_num_threads()} threads"
    source = f"measured just now ({str(dtype).removeprefix('torch.')} arithmetic)"
    return Hardware(name, memory, _BYTES / reading, 2.0 * _SIZE**3 / multiplying, source)


def _seconds(call: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return perf_counter() - start
