"""Decoding attention on a GPU: correctness, then speed against PyTorch and the bandwidth.

    python benchmarks/gpu_decode.py            # everything, under 10 minutes on an H100

First the tests of the Triton kernels, on the GPU. Then one step of one layer, 32 query heads of
128, for each batch, context and cache format: a CUDA graph of a few buffers in turn, together
well beyond the L2 cache, all competitors alternating in one process. Then latents of 512 + 64 (MLA)
in bfloat16, which all query heads read, against PyTorch over the same rows. Reported are fractions
of the bandwidth that copying reaches in the same run, and ratios to the fastest of PyTorch's ways.
A result that differs from float64 by more than its arithmetic explains is not timed. Appends to
``gpu_decode.jsonl`` beside this file. ``--smoke`` runs tiny sizes, on a CPU too.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from kvfold.bench.peers import PEERS
from kvfold.bench.timing import Timing, measure
from kvfold.cache.fixed import FixedKVCache
from kvfold.files import append_text
from kvfold.kernels.dispatch import attend_view
from kvfold.kernels.view import KVView
from kvfold.ops.reference import attend

HEADS, DIM = 32, 128
FORMATS = ("bf16", "fp8", "int8", "int4")
AGAINST = ("sdpa", "sdpa-grouped", "repeat", "matmul")
# batch, KV heads, context
CASES = (
    (1, 8, 131_072), (8, 8, 32_768), (64, 8, 8_192), (64, 8, 32_768), (63, 8, 32_768),
    (65, 8, 32_768), (8, 32, 32_768), (8, 16, 32_768), (8, 4, 32_768), (8, 1, 32_768),
)  # fmt: skip
SMOKE = ((2, 2, 64),)
RANK, ROPE = 512, 64
LATENTS = ((1, 16, 131_072), (8, 16, 32_768), (64, 16, 8_192), (8, 128, 32_768))  # query heads
SMOKE_LATENTS = ((2, 4, 64),)
WORKING_SET = 1 << 30  # many times the 50 MB of an H100's L2
ALLOWED = 0.02  # relative: bfloat16 queries and weights over thousands of keys stay far below
RESULTS = Path(__file__).with_suffix(".jsonl")

Step = Callable[[], object]


def synchronized() -> float:
    """Seconds, when the GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return perf_counter()


def graphed(step: Step) -> Step:
    """The step as a CUDA graph, which launches in a few microseconds whatever it holds."""
    if not torch.cuda.is_available():
        return step
    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def in_turn(steps: list[Step]) -> Step:
    """All of them, one after the other."""

    def run() -> None:
        for step in steps:
            step()

    return run


def buffers(size: int, most: int) -> int:
    return max(1, min(most, -(-WORKING_SET // size)))


def own(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, most: int) -> list[Step]:
    """Steps over as many equal caches as fill the working set; none if the result is wrong."""
    steps: list[Step] = []
    count = 1
    while len(steps) < count:
        cache = FixedKVCache(
            k.shape[1], DIM, max_length=k.shape[2], batch=len(k), dtype=name, device=q.device
        )
        for low in range(0, k.shape[2], 4096):
            cut = slice(low, low + 4096)
            cache.append(k[:, :, cut], v[:, :, cut])
        if not steps:
            wanted = reference(q, cache)
            error = float((cache.attend(q).float() - wanted).norm() / wanted.norm())
            if not error <= ALLOWED:
                print(f"  kvfold {name}: wrong by {error:.2g}, not timed")
                return []
            count = buffers(cache.nbytes, most)
        steps.append(graphed(partial(cache.attend, q)))
    return steps


def reference(q: torch.Tensor, cache: FixedKVCache) -> torch.Tensor:
    """Attention of the first sequence in float64 over what the cache holds, for all of q's."""
    rows = []
    for b in range(len(q)):
        keys, values = cache.read(b)
        rows.append(attend(q[b : b + 1].double(), keys[None].double(), values[None].double()).out)
    return torch.cat(rows).float()


def peers(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, names: tuple[str, ...], most: int
) -> dict[str, list[Step]]:
    """Name -> steps, for those that can be had and fit in memory."""
    count = buffers(2 * k.nbytes, most)
    copies = [(k, v), *((k.clone(), v.clone()) for _ in range(count - 1))]
    found: dict[str, list[Step]] = {}
    for name in names:
        try:
            attend = PEERS[name].build()
            found[name] = [graphed(partial(attend, q, *pair)) for pair in copies]
        except (RuntimeError, torch.OutOfMemoryError) as error:
            print(f"  {name}: {str(error).splitlines()[0][:120]}")
    return found


def copying(size: int, device: torch.device) -> tuple[Step, int]:
    """A copy within the GPU's memory, and the bytes it reads and writes."""
    source = torch.empty(max(size, 1 << 20), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return graphed(lambda: target.copy_(source)), 2 * len(source)


def run_case(
    case: tuple[int, int, int], names: tuple[str, ...], device: torch.device, smoke: bool
) -> None:
    batch, kv_heads, context = case
    shape = batch, kv_heads, context, DIM
    k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(2))
    q = torch.randn(batch, HEADS, 1, DIM, device=device, dtype=torch.bfloat16)
    copy, copied = copying(min(WORKING_SET, 2 * k.nbytes), device)
    most, rounds, repeats = (1, 1, 1) if smoke else (8, 7, None)
    steps = {f"kvfold {name}": own(name, q, k, v, most) for name in FORMATS}
    steps |= peers(q, k, v, names, most)
    steps = {name: each for name, each in steps.items() if each}
    calls = {name: in_turn(each) for name, each in steps.items()}
    timings = measure(
        {"copy": copy} | calls, rounds=rounds, min_time=0.02, repeats=repeats, clock=synchronized
    )
    bandwidth = copied / timings["copy"].median
    plain = 2 * k.nbytes
    sizes = {"fp8": 0.5, "int8": 0.5, "int4": 0.25}
    groups = {"fp8": 1, "int8": 1, "int4": DIM // 32}
    best = min((per_step(timings[n], steps[n]) for n in names if n in steps), default=0.0)
    half = per_step(timings["kvfold bf16"], steps["kvfold bf16"])
    for name, each in steps.items():
        fmt = name.removeprefix("kvfold ")
        scales = 2 * 2 * batch * kv_heads * context * groups.get(fmt, 0)
        read = plain * sizes.get(fmt, 1.0) + scales
        seconds = per_step(timings[name], each)
        row = {
            "benchmark": "gpu_decode", "date": date.today().isoformat(), "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "interpreter",
            "batch": batch, "kv_heads": kv_heads, "context": context, "name": name,
            "seconds": seconds, "copy_bandwidth": bandwidth,
            "of_copy_bandwidth": read / seconds / bandwidth, "vs_best_of_pytorch": best / seconds,
            "vs_own_bf16": half / seconds,
        }  # fmt: skip
        append_text(RESULTS, json.dumps(row) + "\n")
        print(
            f"  {name:14} {1e6 * seconds:9.1f} us  {row['of_copy_bandwidth']:6.1%} of copying  "
            f"{row['vs_best_of_pytorch']:5.2f} x PyTorch  {row['vs_own_bf16']:5.2f} x bf16"
        )


def run_latents(case: tuple[int, int, int], device: torch.device, smoke: bool) -> None:
    """One case of latents; PyTorch gets the rows as keys, and their first numbers as values."""
    batch, heads, context = case
    rows = torch.randn(batch, 1, context, RANK + ROPE, device=device, dtype=torch.bfloat16)
    q = torch.randn(batch, heads, 1, RANK + ROPE, device=device, dtype=torch.bfloat16)
    table = torch.arange(batch, dtype=torch.int32, device=device)[:, None]
    lengths = torch.full((batch,), context, dtype=torch.int32, device=device)

    def own(rows: torch.Tensor) -> object:
        view = KVView.of_pages(rows, rows[..., :RANK], table, lengths)
        return attend_view(q, view)

    wanted = attend(q[:1].double(), rows[:1].double(), rows[:1, ..., :RANK].double()).out
    found = own(rows)
    assert isinstance(found, torch.Tensor)
    error = float((found[:1] - wanted).norm() / wanted.norm())
    if not error <= ALLOWED:
        print(f"  kvfold latents: wrong by {error:.2g}, not timed")
        return
    copies = [rows, *(rows.clone() for _ in range(buffers(rows.nbytes, 1 if smoke else 8) - 1))]
    steps = {"kvfold latents": [graphed(partial(own, each)) for each in copies]}
    for name in ("sdpa-grouped", "matmul"):
        peer = PEERS[name].build()
        steps[name] = [graphed(partial(peer, q, each, each[..., :RANK])) for each in copies]
    copy, copied = copying(min(WORKING_SET, rows.nbytes), device)
    calls = {name: in_turn(each) for name, each in steps.items()}
    limits: dict[str, Any] = {"rounds": 1, "repeats": 1} if smoke else {"rounds": 7}
    timings = measure({"copy": copy} | calls, min_time=0.02, clock=synchronized, **limits)
    bandwidth = copied / timings["copy"].median
    for name, each in steps.items():
        seconds = per_step(timings[name], each)
        row = {
            "benchmark": "gpu_decode", "date": date.today().isoformat(), "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "interpreter",
            "batch": batch, "heads": heads, "latent": [RANK, ROPE], "context": context,
            "name": name, "seconds": seconds, "copy_bandwidth": bandwidth,
            "of_copy_bandwidth": rows.nbytes / seconds / bandwidth,
        }  # fmt: skip
        append_text(RESULTS, json.dumps(row) + "\n")
        print(f"  {name:14} {1e6 * seconds:9.1f} us  {row['of_copy_bandwidth']:6.1%} of copying")


def per_step(timing: Timing, steps: list[Step]) -> float:
    return timing.median / len(steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to try the script")
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument("--flex", action="store_true", help="FlexAttention too (compiles long)")
    arguments = parser.parse_args()
    if not arguments.smoke and not torch.cuda.is_available():
        sys.exit("error: there is no GPU here\nhint: --smoke runs tiny sizes on the CPU")
    if not arguments.no_tests and not arguments.smoke:
        folder = Path(__file__).parents[1] / "tests" / "kernels"
        tests = [str(path) for path in sorted(folder.glob("test_triton*.py"))]
        subprocess.run([sys.executable, "-m", "pytest", *tests, "-m", "gpu or not gpu"], check=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = AGAINST + (("flex",) if arguments.flex else ())
    with torch.no_grad():
        for case in SMOKE if arguments.smoke else CASES:
            print("batch {}, {} KV heads, {:,} tokens".format(*case), flush=True)
            run_case(case, names, device, arguments.smoke)
        for case in SMOKE_LATENTS if arguments.smoke else LATENTS:
            print("latents: batch {}, {} query heads, {:,} tokens".format(*case), flush=True)
            run_latents(case, device, arguments.smoke)


if __name__ == "__main__":
    main()
