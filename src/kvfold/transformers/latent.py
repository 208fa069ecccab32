"""Latents of DeepSeek-style models: cached once, and read without being expanded.

transformers caches a latent and a rotary key per token, and at every step expands all of them to
the keys and values of every head, by ``expand_kv`` of an attention module. Here the module is given
what stands for the cache's latents, and its own ``expand_kv`` runs over that: as long as it does
nothing but multiply them by a weight, split the product by heads into keys and values, and put the
rotary key behind every head's, what it did is written down and nothing is computed. kvfold's
attention then takes the weight into the queries (``kvfold.ops.latent``). Whatever else is done with
a stand-in, by another attention or a linear layer that is more than a weight, makes the tensor
first. Nothing of the model is changed.
"""

from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch.nn.functional import linear

from kvfold.cache.kv import Dtype
from kvfold.cache.latent import LatentCache
from kvfold.kernels.outside import python_state
from kvfold.ops.latent import into_latents, out_of_latents
from kvfold.transformers.layer import PAGE, KVLayer, StandIn, Stored, length_after_crop


class LatentLayer(KVLayer):
    """One layer of ``KVCache`` that holds latents, where that is what comes.

    Args:
        sizes: of a latent and of a rotary key.
    """

    def __init__(self, dtype: Dtype | tuple[Dtype, Dtype] | None, sizes: tuple[int, int]) -> None:
        super().__init__(dtype, None)
        self._sizes = sizes

    @python_state
    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make the cache for latents ``[B, 1, T, rank]`` and rotary keys ``[B, 1, T, rope]``."""
        sizes = key_states.shape[3], value_states.shape[3]
        if key_states.shape[1] != 1 or sizes != self._sizes:  # keys and values, expanded before
            super().lazy_initialization(key_states, value_states)
            return
        self._note(key_states, value_states)
        dtype: Any = self._dtype or key_states.dtype
        self.cache = LatentCache(
            *sizes, batch=len(key_states), dtype=dtype, kind="paged",
            page_size=PAGE, device=key_states.device,
        )  # fmt: skip
        self.is_initialized = True

    def _all(self, side: int) -> Stored | None:
        if not isinstance(self.cache, LatentCache):
            return super()._all(side)
        return Latents(self, side, self.get_seq_length(), self.dtypes[side])

    @python_state
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Stored, Stored]:
        """Store new tokens: latents ``[B, 1, T, rank]`` and rotary keys ``[B, 1, T, rope]``."""
        if self.cache is None:
            self.lazy_initialization(key_states, value_states)
        if not isinstance(self.cache, LatentCache):
            return super().update(key_states, value_states, *args, **kwargs)
        past, given = self.get_seq_length(), (key_states, value_states)
        self.cache.append(key_states[:, 0], value_states[:, 0].to(key_states.dtype))
        latents, turned = (
            Latents(self, side, past + x.shape[2], x.dtype, None if past else x)
            for side, x in enumerate(given)
        )
        return latents, turned

    def cropped(self, tokens_to_remove: int) -> int:
        if not isinstance(self.cache, LatentCache):
            return super().cropped(tokens_to_remove)
        return length_after_crop(self.get_seq_length(), tokens_to_remove)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, as transformers' own layers do."""
        if isinstance(self.cache, LatentCache):
            self.cache.truncate(self.cropped(tokens_to_remove))
        else:
            super().crop(tokens_to_remove)


class Latents(Stored):
    """Stands for the latents (side 0) or the rotary keys (side 1) of a cache, ``[B, 1, S, D]``."""

    @staticmethod
    def _sizes(cache: LatentCache, side: int, tokens: int) -> tuple[int, ...]:
        return cache.batch, 1, tokens, cache.qk_rope_head_dim if side else cache.kv_lora_rank

    def tensor(self) -> torch.Tensor:
        """``[B, 1, S, D]`` in the model's dtype."""
        if self.new is not None:
            return self.new.to(self.dtype)
        held: torch.Tensor = self.layer.held.tensors(self.dtype)[self.side]
        return held[:, None, : self.shape[2]]

    def of_dtype(self, dtype: torch.dtype) -> "Latents":
        return Latents(self.layer, self.side, self.shape[2], dtype, self.new)

    def expand(self, *sizes: int) -> Any:
        """One for every head: ``expand(-1, H, -1, -1)`` is written down."""
        if len(sizes) == 4 and (*sizes[:1], *sizes[2:]) == (-1, -1, -1):
            return _ForEveryHead(self, sizes[1])
        return self.tensor().expand(*sizes)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """A product with a weight is written down."""
        if function is linear and _is_plain_product(*args, **(kwargs or {})):
            return _Product(args[0], args[1])
        return super().__torch_function__(function, types, args, kwargs)


def _is_plain_product(x: Any, weight: Any, bias: Any = None) -> bool:
    return (
        isinstance(x, Latents)
        and x.side == 0
        and bias is None
        and type(weight) in (torch.Tensor, torch.nn.Parameter)
    )


class _Product(StandIn):
    """Stands for ``linear(latents, weight)``, ``[B, 1, S, N]``."""

    def __init__(self, latents: Latents, weight: torch.Tensor) -> None:
        self.latents, self.weight = latents, weight
        self.shape = torch.Size((*latents.shape[:3], len(weight)))
        self.dtype, self.device = latents.dtype, latents.device

    @cached_property
    def _made(self) -> torch.Tensor:
        return linear(self.latents.tensor(), self.weight)

    def tensor(self) -> torch.Tensor:
        return self._made

    def view(self, *shape: Any) -> Any:
        """By heads: ``view((B, S, -1, D))`` is written down."""
        sizes = tuple(shape[0]) if len(shape) == 1 else shape
        batch, _, tokens, width = self.shape
        if len(sizes) == 4 and sizes[:3] == (batch, tokens, -1) and width % sizes[3] == 0:
            return _ByToken(self, sizes[3])
        return self.tensor().view(*shape)


class _ByToken(StandIn):
    """Stands for a product by heads, ``[B, S, H, D]``."""

    def __init__(self, product: _Product, each: int) -> None:
        self.product, self.each = product, each
        batch, _, tokens, width = product.shape
        self.shape = torch.Size((batch, tokens, width // each, each))
        self.dtype, self.device = product.dtype, product.device

    def tensor(self) -> torch.Tensor:
        return self.product.tensor().view(self.shape)

    def transpose(self, first: int, second: int) -> Any:
        if (first, second) == (1, 2):
            return _OfHeads(self, 0, self.each)
        return self.tensor().transpose(first, second)


class _OfHeads(StandIn):
    """Stands for the numbers ``low:high`` that each head makes of a latent, ``[B, H, S, D]``."""

    def __init__(self, whole: _ByToken, low: int, high: int) -> None:
        self.whole, self.low, self.high = whole, low, high
        batch, tokens, heads, _ = whole.shape
        self.shape = torch.Size((batch, heads, tokens, high - low))
        self.dtype, self.device = whole.dtype, whole.device

    def tensor(self) -> torch.Tensor:
        return self.whole.tensor().transpose(1, 2)[..., self.low : self.high]

    @property
    def weight(self) -> torch.Tensor:
        """What makes these numbers of a latent: ``[H, D, rank]``."""
        by_head = self.whole.product.weight.unflatten(0, (-1, self.whole.each))
        return by_head[:, self.low : self.high]

    def new_empty(self, *shape: int, **options: Any) -> Any:
        """Keys to be written to are written down."""
        if shape[:-1] == self.shape[:-1] and not options:
            return _Keys(self, torch.Size(shape))
        return self.tensor().new_empty(*shape, **options)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """So is a split into keys and values."""
        named = kwargs or {}
        if function is torch.split and len(args) == 2 and named == {"dim": -1}:
            x, sizes = args
            if isinstance(x, _OfHeads) and isinstance(sizes, list) and sum(sizes) == x.shape[3]:
                ends = [x.low + sum(sizes[: i + 1]) for i in range(len(sizes))]
                starts = [x.low, *ends[:-1]]
                return tuple(_OfHeads(x.whole, *each) for each in zip(starts, ends, strict=True))
        return super().__torch_function__(function, types, args, kwargs)


class _ForEveryHead(StandIn):
    """Stands for rotary keys that all heads share, ``[B, H, S, rope]``."""

    def __init__(self, turned: Latents, heads: int) -> None:
        self.turned = turned
        self.shape = torch.Size((turned.shape[0], heads, *turned.shape[2:]))
        self.dtype, self.device = turned.dtype, turned.device

    def tensor(self) -> torch.Tensor:
        return self.turned.tensor().expand(self.shape)


class _Keys(StandIn):
    """Stands for every head's keys ``[B, H, S, D]``, which are written part by part."""

    def __init__(self, like: StandIn, shape: torch.Size) -> None:
        self.shape, self.dtype, self.device = shape, like.dtype, like.device
        self.parts: list[tuple[slice, Any]] = []

    def tensor(self) -> torch.Tensor:
        made = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        for where, part in self.parts:
            made[..., where] = part.tensor() if isinstance(part, StandIn) else part
        return made

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, tuple) and len(index) == 2 and index[0] is Ellipsis:
            return _Place(self, index[1])
        return self.tensor()[index]


class _Place:
    """A part of keys that is about to be written."""

    def __init__(self, keys: _Keys, where: slice) -> None:
        self.keys, self.where = keys, where

    def copy_(self, part: Any) -> None:
        self.keys.parts.append((self.where, part))


class Heads(NamedTuple):
    """Keys and values that every head makes of a cache's latents, not made yet.

    Attributes:
        key, value: stand for them, ``[B, H, S, D]`` and ``[B, H, S, Dv]``.
        to_key: ``[H, D - rope, rank]``; to_value: ``[H, Dv, rank]``: makes them of a latent.
    """

    layer: LatentLayer
    key: StandIn
    value: StandIn
    to_key: torch.Tensor
    to_value: torch.Tensor
    new: bool

    def absorbing_pays(self, tokens: int) -> bool:
        """Whether so many queries cost fewer operations over latents than over expanded heads.

        Of one head: expanding S latents takes ``S rank (Dk + Dv)`` products (Dk without the rotary
        part) and attention then ``T S (Dk + Dv)``, besides the rotary part; absorbed they are
        ``T rank (Dk + Dv)`` and ``T S 2 rank``. So a step always, and chunks up to some hundred
        tokens, read latents; a first prompt expands.
        """
        held, rank = self.value.shape[2], self.to_key.shape[2]
        each = self.to_key.shape[1] + self.to_value.shape[1]
        absorbed = tokens * rank * each + tokens * held * 2 * rank
        return not self.new and absorbed < held * rank * each + tokens * held * each

    def attend(self, q: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        """``[B, H, T, Dv]`` for the last T queries, in the absorbed form."""
        to_key, to_value = self.to_key.to(q.dtype), self.to_value.to(q.dtype)
        nope = to_key.shape[1]
        rows = torch.cat([into_latents(q[..., :nope], to_key), q[..., nope:]], -1)
        found: Any = self.layer.held.attend(rows, **options)
        return out_of_latents(found, to_value)


def heads_of(key: Any, value: Any) -> Heads | None:
    """The heads that keys and values stand for; None if they are anything else."""
    if not (isinstance(key, _Keys) and isinstance(value, _OfHeads) and len(key.parts) == 2):
        return None
    (first, nope), (second, rope) = key.parts
    if not (isinstance(nope, _OfHeads) and isinstance(rope, _ForEveryHead)):
        return None
    made = value.whole.product, nope.whole.product
    latents, size = made[0].latents, nope.shape[3]
    whole = (first, second) == (slice(None, size), slice(size, None))
    if not whole or made[0] is not made[1] or rope.turned.layer is not latents.layer:
        return None
    new = latents.new is not None
    return Heads(latents.layer, key, value, nope.weight, value.weight, new)
