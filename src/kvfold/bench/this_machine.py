"""This machine: its memory, bandwidth and arithmetic, measured, and what is said of it."""

import os
import platform
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from kvfold.bench.buffers import read
from kvfold.plan.hardware import Hardware

_BYTES = 512 << 20  # far beyond any cache
_SIZE = 2048  # of the square matrices that are multiplied
_ROUNDS = 5


def measure_this_machine() -> Hardware:
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


def described(threads: int) -> dict[str, Any]:
    """What a result says of the machine, so many of whose threads made it."""
    import transformers

    from kvfold.kernels.cpu.library import library

    kernels = library()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_name() or platform.processor() or platform.machine(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "kernels": kernels.in_use if kernels else "not built",
        "threads": threads,
        "last_level_cache": last_level_cache(),
        "kvfold": version("kvfold"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), "")


def last_level_cache() -> int | None:
    """Bytes of the last-level cache, None where the system does not tell."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="utf-8").strip()
        if text[-1:] == "K" and text[:-1].isdigit():
            sizes.append(int(text[:-1]) * 1024)
    return max(sizes, default=None)


def is_cold(working_set: int) -> bool | None:
    """Whether so many bytes in turn leave nothing of use in the last-level cache."""
    cache = last_level_cache()
    return None if cache is None else working_set >= 2 * cache
