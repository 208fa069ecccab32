"""One decode step over latents (MLA): kvfold's cache against PyTorch's ways.

    python benchmarks/latents.py            # about 2 minutes on 2 cores
    VENV/bin/python benchmarks/latents.py   # the same where vLLM for CPUs is: beside its kernel

One layer, one sequence, queries in bfloat16; caches take turns, so that none is found near the
cores. Every row tells what share of the step its products would take at the speed of the processor,
the fastest that ``torch.matmul`` reaches here with the products of 128 query heads, in bfloat16 or
float32, and what share reading the latents once would. A result further from float64 than twice
PyTorch's own bfloat16 error gets no speed. Appends to ``latents.jsonl`` beside this file.
"""

import argparse
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from fold_quality import machine
from kvfold import LatentCache
from kvfold.bench.buffers import Rotation, copies, read
from kvfold.bench.gate import Truth
from kvfold.bench.timing import measure
from kvfold.files import append_text

CASES = ((512, 64, 4), (512, 64, 8), (512, 64, 16), (512, 64, 128), (160, 32, 9), (64, 32, 16))
FORMATS = ("bf16", "int8", "fp8")
SHORT, LONG = 4096, 16384  # tokens; PyTorch's ways are timed at the shorter
EXPANDED = (512, 64, 16, 1024)  # what transformers does takes seconds: one case tells
MANY = 128  # query heads whose products tell the processor's speed
WORKING_SET = 64 << 20
RESULTS = Path(__file__).with_suffix(".jsonl")

Step = Callable[[], torch.Tensor]


def filled(rows: torch.Tensor, rank: int, dtype: str) -> LatentCache:
    cache = LatentCache(rank, rows.shape[-1] - rank, dtype=dtype, max_length=rows.shape[1])
    cache.append(rows[..., :rank], rows[..., rank:])
    return cache


def own(q: torch.Tensor, rows: torch.Tensor, rank: int, dtype: str) -> tuple[Step, bool]:
    """A step of kvfold's, over one cache after the other; whether it is right."""
    first = filled(rows, rank, dtype)
    count = copies(round(first.bytes_per_step), WORKING_SET)
    turns = Rotation([first, *(filled(rows, rank, dtype) for _ in range(count - 1))])

    def step() -> torch.Tensor:
        out = turns.take().attend(q, scale=q.shape[-1] ** -0.5)
        assert isinstance(out, torch.Tensor)
        return out

    k = torch.cat(first.tensors(torch.float32), -1)[:, None]
    return step, Truth(q, k, k[..., :rank]).judge(step()).passed


def plain(q: torch.Tensor, rows: torch.Tensor, rank: int) -> Step:
    """Two products and a softmax, in the dtype of the rows."""
    turns = Rotation([rows.clone() for _ in range(copies(rows.nbytes, WORKING_SET))])
    x = q[:, :, 0].to(rows.dtype) * q.shape[-1] ** -0.5

    def step() -> torch.Tensor:
        held = turns.take()
        weights = (x @ held.mT).softmax(-1)
        return (weights @ held[..., :rank])[:, :, None].to(q.dtype)

    return step


def vllm(q: torch.Tensor, rows: torch.Tensor, rank: int) -> Step | None:
    """vLLM's CPU kernel for latents in pages of 16; None where there is none for this."""
    if (rank, q.shape[-1]) != (512, 576) or find_spec("vllm") is None:
        return None
    from vllm import _custom_ops as kernels
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    pages = [
        rows[0].clone().unflatten(0, (-1, 16)) for _ in range(copies(rows.nbytes, WORKING_SET))
    ]
    turns = Rotation(pages)
    table = torch.arange(len(pages[0]), dtype=torch.int32)[None]
    lengths = torch.tensor([rows.shape[1]], dtype=torch.int32)

    def step() -> torch.Tensor:
        out = torch.empty(1, q.shape[1], rank, dtype=rows.dtype)
        x = q[:, :, 0].to(rows.dtype)
        kernels.mla_decode_kvcache_cpu(out, x, turns.take(), q.shape[-1] ** -0.5, table, lengths)
        return out[:, :, None].to(q.dtype)

    return step


def expanded(q: torch.Tensor, rows: torch.Tensor, rank: int, nope: int = 128) -> Step:
    """As transformers does it: keys and values of every head are made of all latents, each step."""
    heads, rope = q.shape[1], rows.shape[-1] - rank
    weight = torch.randn(heads * 2 * nope, rank).to(rows.dtype) * rank**-0.5
    mine = torch.randn(1, heads, 1, nope + rope).to(rows.dtype)

    def step() -> torch.Tensor:
        both = (rows[..., :rank] @ weight.mT).unflatten(-1, (heads, -1)).transpose(1, 2)
        shared = rows[:, None, :, rank:].expand(-1, heads, -1, -1)
        return sdpa(mine, torch.cat([both[..., :nope], shared], -1), both[..., nope:])

    return step


def products(heads: int, rows: torch.Tensor, rank: int) -> dict[str, Callable[[], object]]:
    """The two products alone, near the cores."""
    p = torch.randn(heads, rows.shape[1]).to(rows.dtype)
    x, held = torch.randn(heads, rows.shape[2]).to(rows.dtype), rows[0]
    return {
        f"scores {rows.dtype}": lambda: x @ held.mT,
        f"values {rows.dtype}": lambda: p @ held[:, :rank],
    }


def bandwidth(rounds: int) -> float:
    data = torch.ones(256 << 20, dtype=torch.uint8)
    return data.nbytes / measure({"read": lambda: read(data)}, rounds=rounds)["read"].low


def matrix_speed(heads: int, rows: torch.Tensor, rank: int, rounds: int) -> float:
    """Flops per second of both products, in the faster dtype."""
    timed: dict[str, Callable[[], object]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        timed |= products(heads, rows.to(dtype), rank)
    low = {name: timing.low for name, timing in measure(timed, rounds=rounds).items()}
    seconds = min(
        low[f"scores {dtype}"] + low[f"values {dtype}"]
        for dtype in ("torch.float32", "torch.bfloat16")
    )
    return 2 * heads * rows.shape[1] * (rows.shape[2] + rank) / seconds


def case(
    rank: int, rope: int, heads: int, rounds: int, read_speed: float, speed: float
) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    q = torch.randn(1, heads, 1, rank + rope).bfloat16()
    rows = torch.randn(1, SHORT, rank + rope)
    same_shape = matrix_speed(heads, rows, rank, rounds)
    steps: dict[str, Step] = {}
    wrong, truth = (
        [],
        Truth(q, *(x[:, None] for x in (rows.bfloat16(), rows.bfloat16()[..., :rank]))),
    )
    for dtype in FORMATS:
        steps[f"kvfold {dtype}"], right = own(q, rows, rank, dtype)
        steps[f"{dtype} long"], _ = own(q, rows.repeat(1, LONG // SHORT, 1), rank, dtype)
        wrong += [] if right else [f"kvfold {dtype}"]
    for wide in (torch.bfloat16, torch.float32):
        name = f"matmul {str(wide).removeprefix('torch.')}"
        steps[name] = plain(q, rows.bfloat16().to(wide), rank)
        wrong += [] if truth.judge(steps[name]()).passed else [name]
        theirs = vllm(q, rows.bfloat16().to(wide), rank)
        if theirs is not None:
            name = name.replace("matmul", "vLLM")
            steps[name] = theirs
            wrong += [] if truth.judge(theirs()).passed else [name]
    timings = measure(steps, rounds=rounds)
    found = []
    for name in steps:
        if name.endswith(" long") or name in wrong:
            continue
        seconds, kind = timings[name].median, name.split()[1]
        size = {"int8": 1, "fp8": 1, "bf16": 2, "bfloat16": 2, "float32": 4}[kind] * (rank + rope)
        flops = 2 * heads * (2 * rank + rope)
        row = {
            "latent": f"{rank}+{rope}", "heads": heads, "context": SHORT, "way": name,
            "seconds": seconds, "spread": round(timings[name].relative, 3),
            "matrix_gflops": round(speed / 1e9, 1), "bandwidth": read_speed,
            "matrix_gflops_same_shape": round(same_shape / 1e9, 1),
            "of_products": flops * SHORT / speed / seconds,
            "of_bytes": size * SHORT / read_speed / seconds,
        }  # fmt: skip
        if f"{kind} long" in timings:
            slope = (timings[f"{kind} long"].median - seconds) / (LONG - SHORT)
            row |= {
                "ns_per_token": 1e9 * slope,
                "floor_ns_per_token": 1e9 * max(size / read_speed, flops / speed),
            }
        found.append(row)
    return found


def expanded_case(rounds: int) -> dict[str, Any]:
    rank, rope, heads, context = EXPANDED
    rows, q = torch.randn(1, context, rank + rope), torch.randn(1, heads, 1, rank + rope).bfloat16()
    steps = {
        "expanded bfloat16": expanded(q, rows.bfloat16(), rank),
        "expanded float32": expanded(q, rows, rank),
        "kvfold bf16": own(q, rows, rank, "bf16")[0],
    }
    timings = measure(steps, rounds=rounds)
    return {
        "latent": f"{rank}+{rope}", "heads": heads, "context": context, "way": "expanded",
        "milliseconds": {name: 1e3 * timing.median for name, timing in timings.items()},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with torch.inference_mode():
        read_speed = bandwidth(options.rounds)
        speed = matrix_speed(MANY, torch.randn(1, SHORT, 576), 512, options.rounds)
        rows = [row for each in CASES for row in case(*each, options.rounds, read_speed, speed)]
        rows.append(expanded_case(3))
    about = {"threads": options.threads, **machine()}
    append_text(RESULTS, "".join(json.dumps(row | about) + "\n" for row in rows))
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
