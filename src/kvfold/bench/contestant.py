"""A model with one attention implementation and one cache, decoding greedily."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

# Models and caches of transformers have no useful types.
Model = Any
Cache = Any

NATIVE = "sdpa"  # transformers' own default
PLAIN = "eager"  # the plainest correct computation: how much precision alone changes
OURS = "kvfold"
_ROUNDING = 2.0**-8  # relative, of one bfloat16 number


def twin(model: Model, implementation: str) -> Model:
    """The same model, weights shared, with another attention implementation.

    Raises:
        UnsupportedError: if the model cannot use kvfold's.
    """
    from kvfold.transformers import check_implementation

    tensors = chain(model.parameters(), model.buffers())
    other = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    other.set_attn_implementation(implementation)
    if implementation == OURS:
        check_implementation(other)
    return other


@dataclass
class Contestant:
    """Decodes a prompt's continuation step by step.

    Attributes:
        model: with its attention implementation set. make_cache: an empty cache for it.
    """

    model: Model
    make_cache: Callable[[], Cache]

    def prefill(self, prompt: torch.Tensor, piece: int | None = None) -> torch.Tensor:
        """Read a prompt ``[B, S]`` into a new cache; logits ``[B, vocabulary]``.

        Args:
            piece: tokens at once; None for all of them.
        """
        self.cache = self.make_cache()
        *pieces, last = prompt.split(piece or prompt.shape[1], dim=1)
        for tokens in pieces:
            self.feed(tokens)
        return self.feed(last)

    def feed(self, tokens: torch.Tensor, model: Model | None = None) -> torch.Tensor:
        """Add tokens ``[B, T]``; logits ``[B, vocabulary]`` after the last, and its successor."""
        found = (model or self.model)(
            tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1
        )
        logits: torch.Tensor = found.logits[:, -1]
        self.token = logits.argmax(-1, keepdim=True)
        return logits

    def step(self) -> None:
        """Decode one token more."""
        self.feed(self.token)

    def kv_bytes(self) -> int:
        """Bytes of keys and values that the cache has allocated."""
        if hasattr(self.cache, "nbytes"):
            return int(self.cache.nbytes)
        layers = [layer for layer in self.cache.layers if layer.keys is not None]
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)


@dataclass(frozen=True)
class ModelVerdict:
    """How an implementation's logits differ from transformers', relative (root mean square).

    Attributes:
        error, allowed: the largest over the steps, and its limit. top1: share of choices alike.
    """

    error: float
    allowed: float
    top1: float

    @property
    def passed(self) -> bool:
        """False for NaN too."""
        return self.error <= self.allowed

    @property
    def reason(self) -> str:
        return f"logits differ by {self.error:.2g}, allowed {self.allowed:.2g}"


@dataclass(frozen=True)
class Walk:
    """What transformers' own implementation did after a prompt.

    Attributes:
        logits: ``[B, vocabulary]``, after the prompt and after each token.
        tokens: ``[B, 1]``, what it chose.
    """

    logits: list[torch.Tensor]
    tokens: list[torch.Tensor]


def walk(contestant: Contestant, first: torch.Tensor, steps: int) -> Walk:
    """Let a contestant that has read its prompt go ``steps`` tokens on."""
    logits, tokens = [first], list[torch.Tensor]()
    for _ in range(steps):
        tokens.append(contestant.token)
        logits.append(contestant.feed(contestant.token))
    return Walk(logits, tokens)


def judge(
    own: Contestant,
    first: torch.Tensor,
    path: Walk,
    others: list[Model],
    again: Callable[[], torch.Tensor],
) -> ModelVerdict:
    """Compare a contestant that has read its prompt, along a given path.

    The prompt's logits must be transformers' own, whatever the cache's format. After that every
    step is taken by two other implementations too, ``sdpa`` and ``eager``, from the very same
    cache, so that quantization is nobody's error. What these two differ by is the measure: both are
    right, and some prompts amplify their rounding a hundred times. So the error counts from the
    nearer of the two.

    Args:
        first: its logits after the prompt. others: the model with ``sdpa`` and with ``eager``.
        again: what ``eager`` makes of the prompt, which is only asked for if ``sdpa``'s logits
            leave a doubt.
    """
    # maximum and not max: NaN must win.
    error = precision = torch.zeros((), dtype=torch.float32)
    same = [first.argmax(-1) == path.logits[0].argmax(-1)]
    for token, truth in zip(path.tokens, path.logits[1:], strict=True):
        native, plain = (_try(own, token, model) for model in others)
        logits = own.feed(token)
        error = torch.maximum(error, _nearer(logits, native, plain))
        precision = torch.maximum(precision, difference(plain, native))
        same.append(logits.argmax(-1) == truth.argmax(-1))
    native = path.logits[0]
    beginning = difference(first, native)
    if not beginning <= _allowed(precision):
        plain = again()
        beginning = _nearer(first, native, plain)
        precision = torch.maximum(precision, difference(plain, native))
    error = torch.maximum(error, beginning)
    top1 = float(torch.cat(same).float().mean())
    return ModelVerdict(float(error), float(_allowed(precision)), top1)


def _allowed(precision: torch.Tensor) -> torch.Tensor:
    return 2 * precision + _ROUNDING


def _nearer(logits: torch.Tensor, *right: torch.Tensor) -> torch.Tensor:
    """The difference from the one that is nearest; NaN if there is one."""
    return torch.stack([difference(logits, each) for each in right]).amin()


def _try(own: Contestant, token: torch.Tensor, model: Model) -> torch.Tensor:
    """Another model's step on the contestant's cache, taken back."""
    logits = own.feed(token, model)
    own.cache.crop(-1)
    return logits


def difference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Root mean square of a - b as a multiple of that of b."""
    return (a.float() - b.float()).norm() / b.float().norm()
