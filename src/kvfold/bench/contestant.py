"""A model with one attention implementation and one cache, decoding greedily."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch

# Models and caches of transformers have no useful types.
Model = Any
Cache = Any

NATIVE = "sdpa"  # transformers' own default
PLAIN = "eager"  # the plainest correct computation
OURS = "kvfold"
WIDE = "sdpa in float32"  # the truth
LAST = 8  # tokens of a prompt whose logits are looked at, at most
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


def wide(model: Model) -> Model:
    """The same model, weights shared, that computes in float32: they are widened as it runs."""
    other = twin(model, NATIVE)
    for module in other.modules():
        if module._parameters:
            module.forward = partial(_widely, module, module.forward)
    return other


def _widely(module: torch.nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    stored = dict(module._parameters)
    for name, parameter in stored.items():
        if parameter is not None and parameter.is_floating_point():
            module._parameters[name] = torch.nn.Parameter(parameter.float(), False)
    try:
        return forward(*args, **kwargs)
    finally:
        module._parameters.update(stored)


@dataclass
class Contestant:
    """Decodes a prompt's continuation step by step.

    Attributes:
        model: with its attention implementation set. make_cache: an empty cache for it.
    """

    model: Model
    make_cache: Callable[[], Cache]

    def prefill(self, prompt: torch.Tensor) -> torch.Tensor:
        """Read a prompt ``[B, S]`` into a new cache; its last logits ``[B, L, vocabulary]``."""
        self.cache = self.make_cache()
        return self.feed(prompt)

    def feed(self, tokens: torch.Tensor, model: Model | None = None) -> torch.Tensor:
        """Add tokens ``[B, T]``; logits ``[B, L, vocabulary]`` of the last, and what follows."""
        found = (model or self.model)(
            tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=LAST
        )
        logits: torch.Tensor = found.logits
        self.token = logits[:, -1].argmax(-1, keepdim=True)
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
    """How far an implementation's logits are from the truth, relative (root mean square).

    Attributes:
        error, allowed: the median over steps and sequences, and its limit; of the prompt's last
            tokens, if it is these that are wrong. top1: share of choices alike.
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
        logits: ``[B, L, vocabulary]``, of the prompt's last tokens and of each that follows.
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
    step is taken by others too, from the very same cache, so that quantization is nobody's error:
    in float32, which is the truth, and by ``sdpa`` and ``eager``. A contestant may be twice as far
    from the truth as the farther of these.

    That is said of medians: some tokens' logits are moved a hundred times as far as others' by
    roundings alone, which hit one implementation and spare the next.

    Args:
        first: its logits after the prompt. others: the model in float32, with ``sdpa`` and with
            ``eager``.
        again: the prompt's logits in float32, which are only asked for if those of ``sdpa`` leave
            a doubt.
    """
    native = path.logits[0]
    errors, roundings = list[torch.Tensor](), list[torch.Tensor]()
    same = [(first.argmax(-1) == native.argmax(-1)).flatten()]
    for token, chosen in zip(path.tokens, path.logits[1:], strict=True):
        truth, *right = (_try(own, token, model) for model in others)
        logits = own.feed(token)
        errors.append(difference(logits, truth))
        roundings.append(torch.stack([difference(each, truth) for each in right]).amax(0))
        same.append((logits.argmax(-1) == chosen.argmax(-1)).flatten())
    top1 = float(torch.cat(same).float().mean())
    beginning = ModelVerdict(_median([difference(first, native)]), _ROUNDING, top1)
    if not beginning.passed:
        truth = again()
        allowed = _allowed([difference(native, truth)])
        beginning = ModelVerdict(_median([difference(first, truth)]), allowed, top1)
    steps = ModelVerdict(_median(errors), _allowed(roundings), top1)
    return steps if beginning.passed else beginning


def _allowed(roundings: list[torch.Tensor]) -> float:
    return 2 * _median(roundings) + _ROUNDING


def _median(differences: list[torch.Tensor]) -> float:
    """NaN if there is one."""
    return float(torch.cat([each.flatten() for each in differences]).median())


def _try(own: Contestant, token: torch.Tensor, model: Model) -> torch.Tensor:
    """Another model's step on the contestant's cache, taken back."""
    logits = own.feed(token, model)
    own.cache.crop(-1)
    return logits


def difference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Root mean square of a - b as a multiple of that of b, over the last dimension."""
    return (a.float() - b.float()).norm(dim=-1) / b.float().norm(dim=-1)
