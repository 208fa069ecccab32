"""Decoding with latent attention (MLA) in transformers, in the shape of DeepSeek-V2-Lite's layers.

    python benchmarks/latent_step.py                  # about 1 minute on 2 cores

A random DeepSeek-V2 of few layers: 16 heads of 128 + 64, values of 128, latents of 512 + 64, a
small dense MLP in place of the experts. transformers' own step (``sdpa``, DynamicCache) makes every
head's keys and values of all latents anew; kvfold's reads the latents. Caches hold the same random
latents; all ways step at all contexts in turns. The slope is the median over the rounds of a
least-squares line through a round's times; the floor is the bytes of latents per token over the
read bandwidth measured in the same run. Where logits are not transformers', nothing is timed.
Appends to ``latent_step.jsonl`` beside this file.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DynamicCache

import kvfold.transformers as drop_in
from decode_slope import read_bandwidth, seconds, slope
from fold_quality import machine
from kvfold.files import append_text

RANK, ROPE = 512, 64
FORMATS = ("bf16", "int8")
ALLOWED = {"sdpa": 0.0, "bf16": 0.02, "int8": 0.05}  # relative, of logits: latents are rounded
RESULTS = Path(__file__).with_suffix(".jsonl")


def model_of(layers: int, dtype: torch.dtype) -> Any:
    """Random, without experts."""
    torch.manual_seed(0)
    config = DeepseekV2Config(
        hidden_size=2048, num_hidden_layers=layers, first_k_dense_replace=layers,
        num_attention_heads=16, num_key_value_heads=16, intermediate_size=2048, vocab_size=1024,
        kv_lora_rank=RANK, q_lora_rank=None, qk_nope_head_dim=128, qk_rope_head_dim=ROPE,
        v_head_dim=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return DeepseekV2ForCausalLM(config).to(dtype).eval()


def filled(model: Any, way: str, context: int) -> Any:
    """A cache of random latents, the same ones for every way."""
    config = model.config
    cache = DynamicCache(config=config) if way == "sdpa" else drop_in.KVCache(config, dtype=way)
    generator = torch.Generator().manual_seed(context)
    for layer in range(config.num_hidden_layers):
        rows = torch.randn(1, 1, context, RANK + ROPE, generator=generator).to(model.dtype)
        cache.update(rows[..., :RANK].contiguous(), rows[..., RANK:].contiguous(), layer)
    return cache


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--weights", choices=("bfloat16", "float32"), default="float32")
    parser.add_argument("--context", type=int, nargs="+", default=[512, 4096, 16384])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = model_of(options.layers, getattr(torch, options.weights))
    ids = torch.full((1, 1), 500)

    @torch.no_grad()
    def logits(way: str, cache: Any) -> torch.Tensor:
        model.set_attn_implementation("sdpa" if way == "sdpa" else "kvfold")
        found: torch.Tensor = model(ids, past_key_values=cache).logits
        cache.crop(-1)  # so that every sample sees the same context
        return found

    steps: dict[tuple[str, int], Callable[[], Any]] = {}
    errors: dict[str, float] = {}
    for context in options.context:
        theirs = torch.zeros(())
        for way in ("sdpa", *FORMATS):
            cache = filled(model, way, context)
            found = logits(way, cache).float()
            theirs = found if way == "sdpa" else theirs
            error = float((found - theirs).norm() / theirs.norm())
            assert error <= ALLOWED[way], f"{way} is off by {error:.2g} at {context} tokens"
            errors[way] = max(errors.get(way, 0.0), error)
            steps[way, context] = partial(logits, way, cache)
    samples: dict[tuple[str, int], list[float]] = {}
    bandwidths, order = [], list(steps)
    for _ in range(options.rounds):
        bandwidths.append(read_bandwidth())
        order = order[1:] + order[:1]  # nobody always follows the same neighbour
        for case in order:
            samples.setdefault(case, []).append(seconds(steps[case]))
    bandwidth = median(bandwidths)
    for way in ("sdpa", *FORMATS):
        times = {context: median(samples[way, context]) for context in options.context}
        slopes = [
            slope({context: samples[way, context][turn] for context in options.context})
            for turn in range(options.rounds)
        ]
        row = {
            "way": way,
            "weights": options.weights,
            "threads": options.threads,
            "layers": options.layers,
            "milliseconds": {c: round(t * 1e3, 2) for c, t in times.items()},
            "microseconds_per_token_and_layer": median(slopes) * 1e6 / options.layers,
            "bf16_floor": 2 * (RANK + ROPE) / bandwidth * 1e6,
            "read_bandwidth": bandwidth,
            "error": errors[way],
            **machine(),
        }
        append_text(RESULTS, json.dumps(row) + "\n")
        print(json.dumps(row))


if __name__ == "__main__":
    main()
