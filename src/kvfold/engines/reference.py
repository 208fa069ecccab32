"""What transformers says: greedy tokens in float32, and how close each call was."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvfold.arch.decoder import describe
from kvfold.checkpoint.pretrained import load_tokenizer
from kvfold.checkpoint.source import read_config
from kvfold.errors import InputError
from kvfold.names import shown
from kvfold.progress import Progress
from kvfold.quality.run import load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LIKELIEST = 100  # tokens of each step whose logits are kept


@dataclass(frozen=True)
class Continuation:
    """A prompt, and what transformers makes of it.

    Attributes:
        tokens: up to the first special one: engines differ in what they do after it.
        likeliest: logits of the best tokens of each step.
    """

    prompt: str
    ids: list[int]
    tokens: list[int]
    likeliest: list[dict[int, float]]
    special: Collection[int]

    def gap(self, step: int, token: int) -> float | None:
        """How much more the reference's token has than another; None if that is far behind."""
        logits = self.likeliest[step]
        return logits[self.tokens[step]] - logits[token] if token in logits else None


def reference(
    folder: Path, prompts: Sequence[str], tokens: int, device: str | None, progress: Progress
) -> tuple[list[Continuation], Any]:
    """Greedy continuations of prompts by transformers in float32, and the tokenizer.

    Raises:
        InputError: for a prompt that makes no tokens, or is longer than the model reads.
    """
    tokenizer = load_tokenizer(folder)
    encoded = [[int(token) for token in tokenizer(prompt)["input_ids"]] for prompt in prompts]
    positions = describe(read_config(folder)).max_context
    for prompt, ids in zip(prompts, encoded, strict=True):
        _check(prompt, ids, tokens, positions)
    model = load_model(folder, "float32", device)
    special = _special(model, tokenizer)
    found = []
    for done, (prompt, ids) in enumerate(zip(prompts, encoded, strict=True)):
        progress("transformers", done, len(prompts))
        found.append(_greedy(model, prompt, ids, tokens, special))
    progress("transformers", len(prompts), len(prompts))
    return found, tokenizer


def _check(prompt: str, ids: list[int], tokens: int, positions: int | None) -> None:
    if not ids:
        raise InputError(f"the prompt {shown(prompt)} makes no tokens", "give some words")
    if positions is not None and len(ids) + tokens > positions:
        raise InputError(
            f"a prompt of {len(ids)} tokens and --tokens {tokens} are more than the {positions} "
            "positions of the model",
            "give a shorter prompt, or fewer tokens",
        )


def _special(model: "PreTrainedModel", tokenizer: Any) -> set[int]:
    """Tokens at which some engine ends an answer."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    listed = ends if isinstance(ends, list) else [ends]
    return {*tokenizer.all_special_ids, *(end for end in listed if end is not None)}


def _greedy(
    model: "PreTrainedModel", prompt: str, ids: list[int], tokens: int, special: set[int]
) -> Continuation:
    import torch

    found: list[int] = []
    likeliest: list[dict[int, float]] = []
    fresh, cache = ids, None
    with torch.inference_mode():
        while len(found) < tokens:
            given = torch.tensor([fresh], device=model.device)
            output = model(given, past_key_values=cache, use_cache=True)
            best = output.logits[0, -1].float().topk(min(_LIKELIEST, output.logits.shape[-1]))
            likeliest.append(dict(zip(best.indices.tolist(), best.values.tolist(), strict=True)))
            fresh, cache = [int(best.indices[0])], output.past_key_values
            found += fresh
            if fresh[0] in special:
                break
    return Continuation(prompt, ids, found, likeliest, special)
