"""Causal attention over a whole prompt: kvfold against PyTorch's ways, bfloat16.

    python benchmarks/prefill.py            # about 3 minutes on 2 cores

One layer, 32 query heads of 128, batch 1. Competitors take turns; speeds are multiples of the
fastest of PyTorch's ways in the same rounds. A result further from float64 than twice
PyTorch's own bfloat16 error gets no speed. Writes ``prefill.jsonl`` beside this file.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

import kvfold
from fold_quality import machine
from kvfold.bench.timing import measure, ratio
from kvfold.files import append_text, write_text

HEADS, HEAD_DIM = 32, 128
KV_HEADS = (32, 8, 4, 1)
CONTEXTS = (512, 2048, 4096)
RESULTS = Path(__file__).with_suffix(".jsonl")

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def repeated(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    times = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
    return sdpa(q, k, v, is_causal=True)


def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    out = kvfold.attention(q, k, v)
    assert isinstance(out, torch.Tensor)
    return out


WAYS: dict[str, Attend] = {
    "kvfold": ours,
    "sdpa": lambda q, k, v: sdpa(q, k, v, is_causal=True, enable_gqa=True),
    "repeat": repeated,
}


def case(kv_heads: int, context: int, rounds: int) -> dict[str, object]:
    """One row: share of speed of the best of PyTorch's ways."""
    torch.manual_seed(0)
    q = torch.randn(1, HEADS, context, HEAD_DIM).bfloat16()
    k, v = (torch.randn(1, kv_heads, context, HEAD_DIM).bfloat16() for _ in "kv")
    some = slice(context - 64, context)  # the last queries will do
    wide_k, wide_v = (x.double().repeat_interleave(HEADS // kv_heads, 1) for x in (k, v))
    hidden = torch.ones(64, context, dtype=torch.bool).tril(context - 64)
    truth = sdpa(q[:, :, some].double(), wide_k, wide_v, hidden)
    errors = {n: float((way(q, k, v)[:, :, some] - truth).abs().max()) for n, way in WAYS.items()}
    allowed = 2 * min(errors["sdpa"], errors["repeat"]) + 1e-5
    right = {name: partial(way, q, k, v) for name, way in WAYS.items() if errors[name] <= allowed}
    timings = measure(right, rounds=rounds)
    best = min((n for n in right if n != "kvfold"), key=lambda name: timings[name].median)
    speeds = {name: ratio(timings[best], timings[name]) for name in right}
    return {
        "kv_heads": kv_heads,
        "context": context,
        "path": str(kvfold.explain(q, k, v)),
        "speed": {name: round(s.median, 3) for name, s in speeds.items()},
        "spread": {name: round(s.relative, 3) for name, s in speeds.items()},
        "seconds": {name: timings[name].median for name in right},
        "wrong": sorted(set(WAYS) - set(right)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    write_text(RESULTS, "")
    with torch.no_grad():
        for context in CONTEXTS:
            for kv_heads in KV_HEADS:
                row = {**case(kv_heads, context, options.rounds), **machine()}
                append_text(RESULTS, json.dumps(row) + "\n")
                print(context, kv_heads, row["speed"], row["wrong"], row["path"], flush=True)


if __name__ == "__main__":
    main()
