"""All that makes a cache smaller, together: SmolLM2-135M-Instruct at 8,000 tokens.

    python benchmarks/texts.py debian texts            # see that file
    python benchmarks/healing.py texts work            # makes the folded checkpoint
    python benchmarks/combined.py texts work           # a quarter of an hour on 2 cores

The source, its fold to one KV head of three (`healing.py`'s ``finished``), and that with an INT8
cache that is read or kept in part. Windows of 8,000 tokens of two texts are read as a whole, then
STEPS tokens are predicted one by one; at every step all of them take turns, so that a busier minute
hits all. Appends to ``combined.jsonl`` beside this file.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvfold
import kvfold.transformers as drop_in
from fold_quality import machine, source_folder
from kvfold.files import append_text
from kvfold.quality.text import read_texts, token_windows

CONTEXT, STEPS, WINDOWS = 8000, 128, 2
TEXTS = ("handbook", "code")
RESULTS = Path(__file__).with_suffix(".jsonl")


class Way(NamedTuple):
    """A checkpoint and what its cache does."""

    folded: bool
    cache: dict[str, Any]


QUARTER, HALF = kvfold.Select(budget=0.25), kvfold.Evict(budget=0.5)
WAYS = {
    "source": Way(False, {}),
    "source, INT8": Way(False, {"dtype": "int8"}),
    "folded": Way(True, {}),
    "folded, INT8": Way(True, {"dtype": "int8"}),
    "folded, INT8, 25% read": Way(True, {"dtype": "int8", "select": QUARTER}),
    "folded, INT8, 50% kept": Way(True, {"dtype": "int8", "evict": HALF}),
    "folded, INT8, 50% kept, 25% of it read": Way(
        True, {"dtype": "int8", "select": QUARTER, "evict": HALF}
    ),
}


class Found(NamedTuple):
    """Of one way and window: nats of each token, bytes kept and read, seconds of each step."""

    nats: list[float]
    kept: float
    read: float
    seconds: list[float]


@torch.inference_mode()
def score(models: dict[bool, Any], ids: torch.Tensor) -> dict[str, Found]:
    """Read a window ``[T]`` but for its end, which is predicted by every way in turn."""
    first = len(ids) - STEPS
    caches = {}
    for name, way in WAYS.items():
        caches[name] = drop_in.KVCache(models[way.folded].config, **way.cache)
        models[way.folded](ids[None, :first], past_key_values=caches[name], logits_to_keep=1)
    held = {name: [layer.cache for layer in cache.layers] for name, cache in caches.items()}
    kept = {name: sum(x.bytes_per_token * x.mean_held for x in all_) for name, all_ in held.items()}
    read = {name: sum(x.bytes_per_step for x in all_) for name, all_ in held.items()}
    nats: dict[str, list[float]] = {name: [] for name in WAYS}
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for at in range(first, len(ids) - 1):
        for name, way in WAYS.items():
            started = time.perf_counter()
            logits = models[way.folded](ids[None, at : at + 1], past_key_values=caches[name]).logits
            seconds[name].append(time.perf_counter() - started)
            nats[name].append(-float(logits[0, -1].float().log_softmax(-1)[ids[at + 1]]))
    return {n: Found(nats[n], kept[n], read[n], seconds[n]) for n in WAYS}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("texts", type=Path)
    parser.add_argument("work", type=Path)
    arguments = parser.parse_args()
    folders = {False: source_folder(arguments.work), True: arguments.work / "finished"}
    tokenizer = AutoTokenizer.from_pretrained(folders[False])
    models = {
        folded: AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, attn_implementation="kvfold"
        ).eval()
        for folded, folder in folders.items()
    }
    for text in TEXTS:
        raw = read_texts([arguments.texts / f"{text}.txt"], CONTEXT)
        windows = token_windows(tokenizer, raw, CONTEXT, CONTEXT * WINDOWS)
        found = [score(models, ids) for ids in windows]
        for name in WAYS:
            own = [each[name] for each in found]
            kept, read = (mean(getattr(each, side) for each in own) for side in ("kept", "read"))
            nats, step = mean(mean(x.nats) for x in own), median(s for x in own for s in x.seconds)
            row = {
                **machine(), "text": text, "way": name, "tokens": sum(len(x.nats) for x in own),
                "nats": nats, "kept_bytes": kept, "read_bytes": read, "seconds": step,
            }  # fmt: skip
            append_text(RESULTS, json.dumps(row) + "\n")
            said = f"{kept / 2**20:.1f} MiB, {read / 2**20:.1f} MiB read, {1e3 * step:.1f} ms"
            print(f"{text:10} {name:40} {nats:.3f} nats, {said}", flush=True)


if __name__ == "__main__":
    main()
