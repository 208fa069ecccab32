"""A layer of a transformers cache that is a cache of kvfold's; what stands for its tensors."""

from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from kvfold.cache.checks import check_formats
from kvfold.cache.kv import Dtype
from kvfold.cache.kv import KVCache as LayerCache
from kvfold.errors import InputError, UnsupportedError
from kvfold.kernels.limits import MAX_TOKENS
from kvfold.kernels.outside import python_state
from kvfold.ops.evict import Evict
from kvfold.ops.options import CacheOptions
from kvfold.ops.select import Select
from kvfold.transformers.queries import LastQueries

PAGE, _SLIDING_PAGE = 256, 64
_CHOSEN_PAGE, _COARSE_PAGE = 32, 64  # of four bits, to which summaries would add too much
_EVERYTHING = (1 << 31) - 1  # tokens of slack


class StandIn:
    """Stands for a tensor where a model expects one: any use of it makes the tensor first."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def tensor(self) -> torch.Tensor:
        """What it stands for."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # protocols such as copying look for these
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    def __getitem__(self, index: Any) -> Any:
        return self.tensor()[index]

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        named = {key: plain(a) for key, a in (kwargs or {}).items()}
        return function(*[plain(a) for a in args], **named)


class Stored(StandIn):
    """Stands for the keys or values of a cache.

    kvfold's attention reads the cache itself. Any other use, by another attention implementation
    say, decodes everything into a tensor first.

    Args:
        layer: whose ``held`` cache it is. side: 0 for keys, 1 for values.
        tokens: how many of the first ones it stands for.
        new: their tensor, if they are all new.
    """

    def __init__(
        self,
        layer: Any,
        side: int,
        tokens: int,
        dtype: torch.dtype,
        new: torch.Tensor | None = None,
    ) -> None:
        self.layer, self.side, self.new, self.dtype = layer, side, new, dtype
        self.shape = torch.Size(self._sizes(layer.held, side, tokens))
        self.device = layer.held.device

    @staticmethod
    def _sizes(cache: Any, side: int, tokens: int) -> tuple[int, ...]:
        dim = cache.v_head_dim if side else cache.head_dim
        return cache.batch, cache.num_kv_heads, tokens, dim

    def tensor(self) -> torch.Tensor:
        """``[B, Hkv, S, D]`` in the model's dtype."""
        if self.new is not None:
            return self.new.to(self.dtype)
        if self.layer.evict is not None:
            raise UnsupportedError(
                "KV heads of a cache that evicts hold different tokens, which make no tensor",
                'load the model with attn_implementation="kvfold"',
            )
        return self.layer.held.tensors(self.dtype)[self.side][:, :, : self.shape[2]]

    def of_dtype(self, dtype: torch.dtype) -> "Stored":
        """The same, to be decoded to another dtype."""
        return Stored(self.layer, self.side, self.shape[2], dtype, self.new)


def plain(x: Any) -> Any:
    """``x`` with every stand-in, also in lists and tuples, as its tensor."""
    if isinstance(x, StandIn):
        return x.tensor()
    if isinstance(x, list | tuple):
        return type(x)(plain(item) for item in x)
    return x


class HeldLayer(CacheLayerMixin):  # type: ignore[misc]
    """A layer whose keys and values are in a cache of kvfold's; made when its first keys come."""

    is_croppable = True
    evict: Evict | None = None

    def __init__(self, dtype: Dtype | tuple[Dtype, Dtype] | None, window: int | None) -> None:
        self.cache: Any = None
        super().__init__()
        self._dtype, self._window = dtype, window
        self.is_sliding = window is not None

    @property
    def held(self) -> Any:
        """The cache of the layer.

        Raises:
            InputError: if nothing came yet.
        """
        if self.cache is None:
            raise InputError("a layer of the cache was read before it was given any keys")
        return self.cache

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the layer takes."""
        return 0 if self.cache is None else int(self.cache.nbytes)

    @property
    def keys(self) -> Stored | None:
        """Stands for all keys ``[B, Hkv, S, D]``; None before the first."""
        return self._all(0)

    @keys.setter
    def keys(self, given: None) -> None:
        refuse_tensors(given)

    @property
    def values(self) -> Stored | None:
        """Stands for all values ``[B, Hkv, S, Dv]``; None before the first."""
        return self._all(1)

    @values.setter
    def values(self, given: None) -> None:
        refuse_tensors(given)

    def _all(self, side: int) -> Stored | None:
        """What stands for all of a side, 0 for keys; None if nothing came yet."""
        raise NotImplementedError

    def _note(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take from the first keys and values what transformers and ``_all`` ask a layer for."""
        self.dtypes = key_states.dtype, value_states.dtype
        self.dtype, self.device = key_states.dtype, key_states.device


def length_after_crop(length: int, tokens_to_remove: int) -> int:
    """How many of ``length`` tokens are left where transformers' own layer removes so many.

    Raises:
        InputError: for what that layer refuses.
    """
    left = DynamicLayer()
    left.lazy_initialization(empty := torch.empty(1, 1, 0, 1), empty)
    left.keys = left.values = torch.empty(1, 1, length, 1)
    try:
        left.crop(tokens_to_remove)
    except (ValueError, TypeError) as error:
        raise InputError(
            f"crop({tokens_to_remove!r}): {error}", "crop(-n) removes the last n tokens"
        ) from error
    return int(left.keys.shape[2])


class KVLayer(HeldLayer):
    """One layer of ``KVCache``."""

    def __init__(
        self,
        dtype: Dtype | tuple[Dtype, Dtype] | None,
        window: int | None,
        select: Select | None = None,
        page_size: int | None = None,
        evict: Evict | None = None,
    ) -> None:
        super().__init__(dtype, window)
        self._select, self._page, self.evict = select, page_size, evict
        self.record_past = False
        self._queries = LastQueries(evict.window if evict is not None else 1)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that its keys, values and last queries take."""
        return self._queries.nbytes + super().nbytes

    def activate_past_recording(self) -> None:
        """Let a window free nothing until ``crop``, which can go back to any token until then."""
        self.record_past = True

    def _all(self, side: int) -> Stored | None:
        if self.cache is None:
            return None
        return Stored(self, side, self.get_seq_length(), self.dtypes[side])

    @python_state
    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make the cache for keys ``[B, Hkv, T, D]`` and values of these sizes and dtypes."""
        batch, heads, _, head_dim = key_states.shape
        self._note(key_states, value_states)
        dtype = self._dtype or self.dtypes
        self.cache = LayerCache(
            heads,
            head_dim,
            v_head_dim=value_states.shape[3],
            batch=batch,
            dtype=dtype,
            kind="paged" if self._window is None else "sliding",
            page_size=self._page_size(dtype),
            window=self._window,
            select=self._select,
            device=key_states.device,
        )
        self.is_initialized = True

    def _page_size(self, dtype: Any) -> int:
        """Longer pages read faster; shorter ones are freed sooner, and chosen better."""
        if self._select is None and self.evict is None:
            return PAGE if self._window is None else _SLIDING_PAGE
        coarse = any(fmt.bits == 4 for fmt in check_formats(dtype))
        short = self._select is not None and not coarse
        return self._page or (_CHOSEN_PAGE if short else _COARSE_PAGE)

    @python_state
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Stored, Stored]:
        """Store new tokens ``[B, Hkv, T, D]``."""
        if self.cache is None:
            self.lazy_initialization(key_states, value_states)
        cache, past, tokens = self.held, self.get_seq_length(), key_states.shape[2]
        # A long first prompt attends over the tensors at hand, so a window need not store it all.
        queries = tokens if past or tokens <= MAX_TOKENS else 0
        cache.slack = _EVERYTHING if self.record_past else 0
        cache.append(key_states, value_states, queries=queries)
        sides = (key_states, value_states)
        keys, values = (
            Stored(self, side, past + tokens, new.dtype, None if past else new)
            for side, new in enumerate(sides)
        )
        return keys, values

    def asked(self, q: torch.Tensor, options: CacheOptions) -> None:
        """Evict, where that is due, after queries ``[B, Hq, T, D]`` and their attention."""
        how = self.evict
        if how is None:
            return
        cache, least = self.held, max(how.tokens(self.get_seq_length()), how.sinks + how.recent)
        more = cache.mean_held - least
        most = 0 if q.shape[2] > MAX_TOKENS else how.every
        if more + how.window > most:
            self._queries.add(q)
        else:  # nobody will ask for them, nor for others without them
            self._queries.clear()
        if more > most:
            cache.evict_as(how, self._queries.tensor(), **options)
            self._queries.clear()

    @python_state
    def get_seq_length(self) -> int:
        return 0 if self.cache is None else self.cache.lengths[0] if self.cache.lengths else 0

    @python_state
    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks are made for all positions, whatever a window keeps."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.cache, self.is_initialized = None, False
        self._queries.clear()

    def cropped(self, tokens_to_remove: int) -> int:
        """How many tokens ``crop`` would leave: what transformers' own layer leaves of as many.

        Raises:
            InputError: for what that layer refuses, and where a window has freed what is needed.
        """
        length = length_after_crop(self.get_seq_length(), tokens_to_remove)
        if self.cache is not None and not self.cache.can_truncate(length):
            said = f"cannot go back to {length} tokens"
            if self.evict is not None:
                raise InputError(f"{said}: of these some were evicted", "evict with more recent=")
            raise InputError(
                f"{said}: a window has freed what they see",
                "call activate_past_recording() before the tokens that crop may remove",
            )
        return length

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, as transformers' own layers do; a window frees what it can."""
        old, length = self.get_seq_length(), self.cropped(tokens_to_remove)
        self._queries.crop(old - length)
        if self.cache is not None:
            self.cache.truncate(length)
            if self.record_past:
                self.cache.trim()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some sequences, as indexing a tensor with ``indices`` would."""
        if self.cache is None:
            return
        try:
            rows = torch.arange(self.cache.batch)[indices].tolist()
        except (IndexError, TypeError) as error:
            raise InputError(
                f"indices {indices!r} of {self.cache.batch} sequences: {error}"
            ) from error
        self.cache.reorder(rows)
        self._queries.select(rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.cache is not None:
            rows = [b for b in range(self.cache.batch) for _ in range(repeats)]
            self.cache.reorder(rows)
            self._queries.select(rows)


def refuse_tensors(given: torch.Tensor | None) -> None:
    """What a layer does that is told to hold other keys or values."""
    if given is not None:
        raise UnsupportedError(
            "a cache of kvfold holds no tensors that could be replaced", "add tokens with update"
        )
