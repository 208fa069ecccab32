"""Folding a model of Llama-2-7B's shape on a GPU: seconds and peak memory of every stage.

    python benchmarks/gpu_fold.py work             # 14 GB of random weights in the folder WORK
    python benchmarks/gpu_fold.py work --smoke     # a tiny model, on a CPU too

First the tests of folding on the device: what is lost there and on the CPU, and that a seed gives
the same bytes twice. Then `convert` from 32 to 8 KV heads on 50,000 tokens, each in a process of
its own: the closed form (`--fit none`), with both refits (`refit`) and with the fit (`local`, the
default); a stage takes what it adds. Weights are random, which times do not depend on: nothing is
said of quality. The goal is 15 minutes and 24 GB for `local` on an H100. Appends to
``gpu_fold.jsonl`` beside this file.
"""

import argparse
import json
import random
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from fold_quality import machine
from kvfold import convert
from kvfold.files import append_text, write_text
from streaming_memory import make_source

LLAMA_2_7B = LlamaConfig(
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=32, vocab_size=32000, max_position_embeddings=4096,
    tie_word_embeddings=False, architectures=["LlamaForCausalLM"],
)  # fmt: skip
SMOKE = LlamaConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=8,
    num_key_value_heads=8, vocab_size=500, tie_word_embeddings=False,
    architectures=["LlamaForCausalLM"],
)  # fmt: skip
TINY = "llama-tiny"
FITS = ("none", "refit", "local")
TOKENS = 50_000
RESULTS = Path(__file__).with_suffix(".jsonl")


def fold(source: Path, work: Path, fit: str, device: str) -> dict[str, Any]:
    """One conversion: seconds, and the peaks of this process and of the device."""
    text, out, heads = work / "words.txt", work / "out", 2 if source.name == TINY else 8
    record = convert(
        source, out, heads, fit=fit, calibration=[text], calibration_tokens=TOKENS,
        device=device, force=True,
    )  # fmt: skip
    on_device = torch.cuda.max_memory_allocated() if device.startswith("cuda") else None
    return {**record["run"], "device_peak_bytes": on_device}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument(
        "--smoke", action="store_true", help="a tiny model, nothing is written down"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    config, name = (SMOKE, TINY) if arguments.smoke else (LLAMA_2_7B, "llama-7b")
    if arguments.device == "cuda" and not arguments.smoke:
        tests = Path(__file__).parents[1] / "tests" / "fold" / "test_gpu.py"
        subprocess.run([sys.executable, "-m", "pytest", str(tests), "-m", "gpu"], check=True)
    source = arguments.work / name
    arguments.work.mkdir(parents=True, exist_ok=True)
    make_source(source, config, config.vocab_size)
    draw = random.Random(0)
    words = (f"word{draw.randrange(1, config.vocab_size)}" for _ in range(TOKENS + 10_000))
    write_text(arguments.work / "words.txt", " ".join(words), force=True)
    print("| fit | seconds | device | process |")
    for fit in FITS:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
            run = alone.submit(fold, source, arguments.work, fit, arguments.device).result()
        gib = [f"{size / 2**30:.1f} GiB" if size else "–"
               for size in (run["device_peak_bytes"], run["peak_memory_bytes"])]  # fmt: skip
        print(f"| {fit} | {run['seconds']:.0f} | {gib[0]} | {gib[1]} |", flush=True)
        if not arguments.smoke:
            line = {
                "benchmark": "gpu_fold",
                **machine(),
                "device": _device(),
                "fit": fit,
                "run": run,
            }
            append_text(RESULTS, json.dumps(line) + "\n")


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    main()
