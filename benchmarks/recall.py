"""Recall in 32,768 tokens: a small model made for it, on caches that read or keep a part.

    python benchmarks/recall.py work      # trains for five minutes on 2 cores, then asks for three

Small public models recall badly from long texts. This one (SmolLM3's architecture, two layers, the
second without rotary embedding, four query and two KV heads of 32) is trained to: among noise stand
pairs of a name and a value, and at the end comes a name, whose value follows. Trained on up to
2,048 tokens. Then texts of 32,768 tokens with PAIRS pairs are read once; every cache is asked for
each of the values. Of caches that forget, also with the name in the prompt already (`known`). The
model is kept in ``work/recall``, answers go to ``recall.jsonl`` beside this file.
"""

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, SmolLM3Config, SmolLM3ForCausalLM

import kvfold
import kvfold.transformers as drop_in
from fold_quality import machine
from kvfold.files import append_text

NOISE, NAMES, VALUES = 32, 32, 32  # symbols of each kind; 0 comes first
LENGTH, PAIRS, TEXTS = 32_768, 8, 4
BUDGETS = (0.5, 0.25, 0.125)
RESULTS = Path(__file__).with_suffix(".jsonl")


def config() -> SmolLM3Config:
    return SmolLM3Config(
        vocab_size=1 + NOISE + NAMES + VALUES, hidden_size=128, intermediate_size=256,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        max_position_embeddings=LENGTH + 64, no_rope_layers=[1, 0], tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip


def texts(
    rows: int, length: int, pairs: int, draw: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noise with pairs in it, ``[rows, length]``, and their names and values, ``[rows, pairs]``."""
    ids = torch.randint(1, 1 + NOISE, (rows, length), generator=draw)
    ids[:, 0] = 0
    names = torch.stack([torch.randperm(NAMES, generator=draw)[:pairs] for _ in range(rows)])
    names = names + 1 + NOISE
    values = torch.randint(VALUES, (rows, pairs), generator=draw) + 1 + NOISE + NAMES
    for row in range(rows):
        at = 1 + 2 * torch.randperm((length - 1) // 2, generator=draw)[:pairs]
        ids[row, at], ids[row, at + 1] = names[row], values[row]
    return ids, names, values


def repeated(rows: int, draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise that comes twice, and what is to be predicted of it: the second time."""
    once = torch.randint(1, 1 + NOISE + NAMES + VALUES, (rows, 48), generator=draw)
    ids = torch.cat([torch.zeros(rows, 1, dtype=torch.long), once, once], 1)
    wanted = ids.roll(-1, 1)
    wanted[:, :50], wanted[:, -1] = -100, -100
    return ids, wanted


def paired(rows: int, length: int, draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise with pairs, all of which are asked for: names, and values to be predicted."""
    ids, names, values = texts(rows, length, 16, draw)
    order = torch.stack([torch.randperm(16, generator=draw) for _ in range(rows)])
    asked = torch.stack([names.gather(1, order), values.gather(1, order)], -1).flatten(1)
    whole = torch.cat([ids, asked], 1)
    wanted = whole.roll(-1, 1)
    wanted[:, :length] = -100
    wanted[:, length + 1 :: 2] = -100
    return whole, wanted


def train(folder: Path, seconds: float) -> None:
    """First to repeat what came before, then on pairs in texts that get longer."""
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(1)
    model = SmolLM3ForCausalLM(config())
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01, betas=(0.9, 0.98))
    started, step, smooth, pairs = time.perf_counter(), 0, 5.0, False
    while (passed := (time.perf_counter() - started) / seconds) < 1:
        if not pairs and smooth < 0.3:
            pairs = True
        length = min(2048, 64 << int(7 * passed))
        rows = max(1, 8192 // (length + 32))
        ids, wanted = paired(rows, length, draw) if pairs else repeated(84, draw)
        rate = 2e-3 * min(1.0, (step + 1) / 100) * min(1.0, 2 * (1 - passed))
        for group in optimizer.param_groups:
            group["lr"] = rate
        logits = model(ids).logits
        lost = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())
        optimizer.zero_grad()
        lost.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        smooth += 0.02 * (float(lost.detach()) - smooth)
        if step % 100 == 0:
            what = f"pairs in {length} tokens" if pairs else "repeating"
            print(f"{step:6} steps, {what}: {smooth:.4f} nats", flush=True)
        step += 1
    model.save_pretrained(folder)


class Asked:
    """Answers right, and all, by way and budget."""

    def __init__(self, model: Any, dtype: str) -> None:
        self.model, self.dtype = model, dtype
        self.answers: dict[tuple[str, float], list[bool]] = {}

    def read(self, ids: torch.Tensor, **options: Any) -> Any:
        cache = drop_in.KVCache(self.model.config, dtype=self.dtype, **options)
        self.model(ids[None], past_key_values=cache, logits_to_keep=1)
        return cache

    def ask(self, cache: Any, names: torch.Tensor, values: torch.Tensor, *way: Any) -> None:
        """One name after the other, each forgotten again."""
        for name, value in zip(names, values, strict=True):
            logits = self.model(name[None, None], past_key_values=cache).logits[0, -1]
            self.answers.setdefault(way, []).append(bool(logits.argmax() == value))
            cache.crop(-1)

    def selecting(self, ids: torch.Tensor, names: torch.Tensor, values: torch.Tensor) -> None:
        for by in ("spread", "box"):
            cache = self.read(ids, select=kvfold.Select(by=by), page_size=32)
            for budget in BUDGETS:
                ways = {by: kvfold.Select(budget=budget, by=by)}
                if by == "spread":
                    recent = round(budget * LENGTH) - 64
                    ways["exact"] = kvfold.Select(budget=budget, by="exact")
                    ways["window"] = kvfold.Select(budget=budget, recent=recent)
                for name, select in ways.items():
                    for layer in cache.layers:
                        layer.cache._selection.select = select
                    self.ask(cache, names, values, f"select {name}", budget)

    def evicting(self, ids: torch.Tensor, names: torch.Tensor, values: torch.Tensor) -> None:
        whole = self.read(ids, evict=kvfold.Evict(budget=1.0, every=0))
        self.ask(whole, names, values, "dense", 1.0)
        for budget in BUDGETS:
            for by in ("attention", "recent"):
                self.ask(forgetful(whole, budget, by), names, values, f"evict {by}", budget)
        for name, value in zip(names, values, strict=True):
            known = copy.deepcopy(whole)
            self.model(name[None, None], past_key_values=known)
            for budget in BUDGETS:
                cache = forgetful(known, budget, "attention")
                cache.crop(-1)
                self.ask(cache, name[None], value[None], "evict attention, known", budget)


def forgetful(cache: Any, budget: float, by: str) -> Any:
    """A copy that keeps so much."""
    found = copy.deepcopy(cache)
    for layer in found.layers:
        held = layer.cache
        held.evict(budget, by=held.scores(layer._queries.tensor()) if by == "attention" else by)
    return found


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--dtype", default="bf16", help="of the cache")
    parser.add_argument("--seconds", type=float, default=300, help="of training")
    arguments = parser.parse_args()
    folder = arguments.work / "recall"
    if not folder.exists():
        with torch.inference_mode(False):
            train(folder, arguments.seconds)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="kvfold").eval()
    asked = Asked(model, arguments.dtype)
    draw = torch.Generator().manual_seed(2)
    for _ in range(TEXTS):
        for each in zip(*texts(1, LENGTH, PAIRS, draw), strict=True):
            asked.selecting(*each)
            asked.evicting(*each)
    for (way, budget), answers in asked.answers.items():
        row = {**machine(), "dtype": arguments.dtype, "way": way, "budget": budget,
               "found": sum(answers), "asked": len(answers)}  # fmt: skip
        append_text(RESULTS, json.dumps(row) + "\n")
        print(f"{way:24} {budget:6.1%}: {sum(answers)} of {len(answers)}", flush=True)


if __name__ == "__main__":
    main()
