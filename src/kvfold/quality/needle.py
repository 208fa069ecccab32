"""Pass-key retrieval: can a model still find one sentence in a long text? Needs no download.

A five-digit key stands somewhere in filler text, and the model is asked for it at the end
(arXiv 2305.16300). Answered means that every token of the key is the model's most likely one; the
nats of the key tell apart what yes and no do not. What a source can do, its folds should do.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from kvfold.errors import InputError
from kvfold.numbers import NEEDLE
from kvfold.progress import Progress, no_progress
from kvfold.quality.given import vocabulary
from kvfold.quality.text import Tokenizer, check_ids, opening_tokens

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class Way(NamedTuple):
    """How a model may answer with a cache.

    Attributes:
        make: an empty cache for a model, which it may tell how to attend.
        known: whether the question is read with the text, at once, and not token by token after it.
    """

    make: Callable[[Any], Any]
    known: bool = False


DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
KEYS = 4  # different keys for each length and depth
_FILLER = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
)
_NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key. "
_QUESTION = "What is the pass key? The pass key is"


@dataclass(frozen=True)
class Retrieval:
    """One model at one length and depth.

    Attributes:
        depth: of the key, 0 at the beginning. found: fraction of keys answered.
        nats: of the right answer, mean per token.
    """

    name: str
    tokens: int
    depth: float
    found: float
    nats: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def retrieve(
    models: "Sequence[tuple[str, PreTrainedModel]]",
    tokenizer: Tokenizer,
    lengths: Sequence[int],
    *,
    seed: int = 0,
    progress: Progress = no_progress,
    caches: Mapping[str, Way] | None = None,
) -> list[Retrieval]:
    """Ask every model for the same keys.

    Args:
        lengths: of the prompts, in tokens.
        caches: by name, each of which every model also answers with: the text is read at once, the
            answer token by token.

    Raises:
        InputError: for lengths that hold no filler, or beyond a model's positions.

    >>> retrieve([("source", model)], tokenizer, [512, 2048])  # doctest: +SKIP
    """
    import torch

    for name, model in models:
        longest = getattr(model.config, "max_position_embeddings", None)
        if longest and max(lengths) > longest:
            raise InputError(
                f"--needle {max(lengths)} is longer than the {longest} positions of {name}",
                f"use at most {longest}",
            )
    results = []
    asked_ways: list[tuple[str, PreTrainedModel, Way | None]] = []
    for name, model in models:
        asked_ways.append((name, model, None))
        asked_ways += [(f"{name}, {said}", model, way) for said, way in (caches or {}).items()]
    question = len(_ids(tokenizer, _QUESTION))
    total = len(lengths) * len(DEPTHS) * len(asked_ways)
    for length in lengths:
        for depth in DEPTHS:
            prompts = [prompt(tokenizer, length, depth, key) for key in _keys(seed, length, depth)]
            for name, model, way in asked_ways:
                for asked, answer in prompts:
                    check_ids([*asked.tolist(), *answer.tolist()], vocabulary(model))
                with torch.inference_mode():
                    if way is None:
                        scores = [_score(model, *each) for each in prompts]
                    else:
                        scores = [_step(model, way, question, *each) for each in prompts]
                found = sum(score[0] for score in scores) / len(scores)
                nats = sum(score[1] for score in scores) / len(scores)
                results.append(Retrieval(name, length, depth, found, nats))
                progress("looking for pass keys", len(results), total)
    return results


def _keys(seed: int, length: int, depth: float) -> list[str]:
    draw = random.Random(f"{seed}/{length}/{depth}")
    return [str(draw.randrange(10_000, 100_000)) for _ in range(KEYS)]


def prompt(
    tokenizer: Tokenizer, length: int, depth: float, key: str
) -> "tuple[torch.Tensor, torch.Tensor]":
    """Ids of a prompt of ``length`` tokens and of its answer, ``[T]`` and ``[A]``.

    Raises:
        InputError: if needle and question alone are longer.
    """
    import torch

    opening = opening_tokens(tokenizer)
    needle, question = (_ids(tokenizer, x) for x in (_NEEDLE.format(key=key), _QUESTION))
    room = length - len(opening) - len(needle) - len(question)
    if room < 0:
        raise InputError(
            f"--needle {length}: expected at least {length - room} tokens", NEEDLE.hint
        )
    one = _ids(tokenizer, _FILLER)
    filler = (one * (room // len(one) + 1))[:room]
    # Between sentences of the filler, not within one.
    at = min(round(depth * room / len(one)) * len(one), room)
    whole = [*opening, *filler[:at], *needle, *filler[at:], *question]
    answer = _ids(tokenizer, f" {key}")
    return torch.tensor(whole, dtype=torch.int64), torch.tensor(answer, dtype=torch.int64)


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return found


def _score(
    model: "PreTrainedModel", asked: "torch.Tensor", answer: "torch.Tensor"
) -> tuple[bool, float]:
    """Whether greedy decoding would give the answer, and its nats per token."""
    import torch

    ids = torch.cat([asked, answer])[None].to(model.device)
    logits = model(ids, use_cache=False).logits[0, len(asked) - 1 : -1].float()
    return _right(logits, answer)


def _step(
    model: "PreTrainedModel",
    way: Way,
    question: int,
    asked: "torch.Tensor",
    answer: "torch.Tensor",
) -> tuple[bool, float]:
    """The same, the answer, and perhaps the last ``question`` tokens, read one by one."""
    import torch

    ids, cache = torch.cat([asked, answer])[None].to(model.device), way.make(model)
    read = len(asked) - (0 if way.known else question)
    first = model(ids[:, :read], past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    logits = [first[0, -1].float()]
    logits += [
        model(ids[:, at : at + 1], past_key_values=cache, use_cache=True).logits[0, -1].float()
        for at in range(read, ids.shape[1] - 1)
    ]
    return _right(torch.stack(logits[-len(answer) :]), answer)


def _right(logits: "torch.Tensor", answer: "torch.Tensor") -> tuple[bool, float]:
    import torch

    target = answer.to(logits.device)
    nats = torch.nn.functional.cross_entropy(logits, target)
    return bool((logits.argmax(-1) == target).all()), float(nats)
