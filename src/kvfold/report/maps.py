"""Which tokens every head looks at, layer by layer, in bounded memory.

Only queries and keys of the wanted layers are kept. Weights are computed some queries at a time
and, for long texts, summed into bins at once; the map of all tokens by all tokens never exists.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kvfold.arch.decoder import learned_positions
from kvfold.errors import InputError
from kvfold.fold.stream import IMPLEMENTATION, AttentionCall
from kvfold.names import shown
from kvfold.numbers import LAYER, Wholes

ROWS = 256  # queries whose weights are computed together
BINS = 128  # of a map's side; shorter texts have a bin for each token


@dataclass(frozen=True)
class Seen:
    """What one layer computed its attention from, for one text.

    Attributes:
        query: ``[Hq, T, D]``, key: ``[Hkv, T, D]``, float32. mask: boolean or additive
            ``[T, T]``, or None for plain causal.
        latent: whether all keys are read out of one latent, which is what is cached.
    """

    query: torch.Tensor
    key: torch.Tensor
    mask: torch.Tensor | None
    scale: float
    softcap: float | None
    latent: bool = False

    @classmethod
    def of(cls, call: AttentionCall, latent: bool = False) -> "Seen":
        mask = None if call.mask is None else call.mask[0, 0]
        query, key = call.query[0].float(), call.key[0].float()
        return cls(query, key, mask, call.scale, call.softcap, latent)

    @property
    def tokens(self) -> int:
        return self.query.shape[1]

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return len(self.query) // len(self.key)

    def weights(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """The attention weights ``[Hq, rows, T]`` of successive queries."""
        for start in range(0, self.tokens, ROWS):
            rows = slice(start, min(start + ROWS, self.tokens))
            groups = self.query[:, rows].unflatten(0, (len(self.key), -1))
            scores = (groups @ self.key[:, None].mT * self.scale).flatten(0, 1)
            if self.softcap is not None:
                scores = self.softcap * torch.tanh(scores / self.softcap)
            if self.mask is None:
                position = torch.arange(self.tokens)
                scores = scores.masked_fill(position > position[rows, None], -torch.inf)
            elif self.mask.dtype == torch.bool:
                scores = scores.masked_fill(~self.mask[rows], -torch.inf)
            else:
                scores = scores + self.mask[rows]
            yield rows, scores.softmax(-1)


def attention_layers(model: nn.Module) -> dict[int, nn.Module]:
    """The attention modules of a transformers model, by layer.

    Raises:
        InputError: if none is found.
    """
    found: dict[int, nn.Module] = {}
    for module in model.modules():
        layer: Any = getattr(module, "layer_idx", None)
        if isinstance(layer, int) and "attention" in type(module).__name__.lower():
            found[layer] = module
    if not found:
        raise InputError(
            f"{type(model).__name__} has no attention layers that can be looked at",
            "kvfold look needs a decoder of transformers",
        )
    return dict(sorted(found.items()))


@torch.no_grad()
def look(model: Any, ids: torch.Tensor, layers: Sequence[int]) -> dict[int, Seen]:
    """Run ``ids`` ``[T]`` through a model and keep what the wanted layers saw.

    Raises:
        InputError: for layers the model does not have, or attention that cannot be heard.
    """
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise InputError(f"model {shown(model)}: expected a model of transformers", "see --help")
    layers = Wholes(LAYER).check(layers, "--layer")
    config: Any = model.config
    _check_ids(ids, learned_positions(config.to_dict()))
    modules = attention_layers(model)
    missing = [layer for layer in layers if layer not in modules]
    if missing:
        raise InputError(
            f"--layer {missing[0]}: the model has layers 0 to {max(modules)}", "see --help"
        )
    heard: dict[int, Seen] = {}
    wanted = {layer: modules[layer] for layer in layers}
    latent = bool(getattr(config, "kv_lora_rank", None))
    with _listening(wanted, heard, latent), _implementation(model):
        call: Any = model
        call(ids[None].to(call.device), use_cache=False)
    if len(heard) < len(layers):
        raise InputError(
            f"{type(model).__name__} computes attention in a way that cannot be listened to",
            "kvfold look needs models whose attention implementation can be set",
        )
    return heard


def _check_ids(ids: Any, positions: int | None) -> None:
    whole = isinstance(ids, torch.Tensor) and ids.dtype in (torch.int64, torch.int32)
    if not whole or ids.ndim != 1 or not len(ids):
        raise InputError("the text makes no tokens [T]", "give a longer text")
    if positions is not None and len(ids) > positions:
        raise InputError(
            f"the text has {len(ids)} tokens; the model has {positions} positions",
            f"--max-tokens {positions} looks at its beginning",
        )


@contextmanager
def _listening(
    modules: dict[int, nn.Module], heard: dict[int, Seen], latent: bool
) -> Iterator[None]:
    def listener(layer: int) -> Any:
        def hear(call: AttentionCall) -> None:
            heard[layer] = Seen.of(call, latent)

        return hear

    for layer, module in modules.items():
        module.kvfold_listener = listener(layer)
    try:
        yield
    finally:
        for module in modules.values():
            del module.kvfold_listener


@contextmanager
def _implementation(model: Any) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation(IMPLEMENTATION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def pooled(seen: Seen, bins: int = BINS) -> torch.Tensor:
    """Every head's map ``[Hq, P, P]``, P = min(tokens, bins): the mean over a bin's queries of the
    weight on a bin's keys. Rows sum to one."""
    side = min(seen.tokens, bins)
    place = torch.arange(seen.tokens) * side // seen.tokens
    result = torch.zeros(len(seen.query), side, side, dtype=torch.float32)
    for rows, weights in seen.weights():
        by_key = torch.zeros(*weights.shape[:2], side, dtype=torch.float32).index_add_(
            2, place, weights
        )
        result.index_add_(1, place[rows], by_key)
    return result / torch.bincount(place, minlength=side)[:, None]


def divergences(source: Seen, other: Seen) -> torch.Tensor:
    """``[Hq]``: KL(source || other) of a query's weights, nats, mean over queries.

    Raises:
        InputError: if the two have different query heads or tokens.
    """
    if source.query.shape[:2] != other.query.shape[:2]:
        raise InputError(
            f"{list(source.query.shape[:2])} query heads and tokens cannot be compared with "
            f"{list(other.query.shape[:2])}",
            "compare a model with what was folded from it",
        )
    total = torch.zeros(len(source.query), dtype=torch.float32)
    for (_, p), (_, r) in zip(source.weights(), other.weights(), strict=True):
        terms = p * (p.clamp_min(1e-30).log() - r.clamp_min(1e-30).log())
        total += terms.sum((1, 2))
    return total / source.tokens
