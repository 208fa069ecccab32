"""A short healing run, and what is compared of its results."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from kvfold.healing.watch import read_metrics

OPTIONS: dict[str, Any] = {
    "stages": ["kl"],
    "tokens": 2048,
    "batch_tokens": 256,
    "context": 64,
    "held_out_tokens": 128,
    "lr": 1e-2,
    "save_tokens": 512,
    "eval_tokens": 1024,
    "eval_texts": [],
}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(a: Path, b: Path) -> bool:
    left, right = weights(a), weights(b)
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def untimed(folder: Path) -> list[dict[str, Any]]:
    """The metrics, without what two runs may differ in."""
    timing = {"tokens_per_second", "overhead"}
    rows = read_metrics(folder / "healing.jsonl")
    return [{name: row[name] for name in row if name not in timing} for row in rows]
