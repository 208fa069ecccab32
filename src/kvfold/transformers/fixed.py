"""A transformers cache of fixed size, whose steps ``torch.compile`` takes as one graph."""

from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.cache_utils import Cache

from kvfold.cache.checks import check_sizes
from kvfold.cache.fixed import Dtype
from kvfold.cache.fixed import FixedKVCache as LayerCache
from kvfold.errors import UnsupportedError
from kvfold.kernels.dispatch import attention
from kvfold.kernels.limits import MAX_TOKENS
from kvfold.kernels.outside import outside_graphs
from kvfold.transformers.cache import latent_sizes, windows_of
from kvfold.transformers.layer import HeldLayer, Stored, length_after_crop


class FixedStored(Stored):
    """Stands for the keys or values of a fixed cache: ``max_length`` positions, filled or not."""

    def tensor(self) -> torch.Tensor:
        held: LayerCache = self.layer.held
        return held.tensors(self.dtype)[self.side]

    def of_dtype(self, dtype: torch.dtype) -> "FixedStored":
        return FixedStored(self.layer, self.side, self.shape[2], dtype, self.new)


class FixedKVLayer(HeldLayer):
    """One layer of ``FixedKVCache``; its cache may also be made before its first keys come."""

    is_compileable = True
    cache: LayerCache | None

    def __init__(
        self, max_length: int, dtype: Dtype | tuple[Dtype, Dtype] | None, window: int | None
    ) -> None:
        super().__init__(dtype, window)
        self.max_length = max_length

    def _all(self, side: int) -> FixedStored | None:
        return None if self.cache is None else self._new(side, self.dtypes[side], None)

    def _new(self, side: int, dtype: torch.dtype, new: torch.Tensor | None) -> FixedStored:
        return FixedStored(self, side, self.max_length, dtype, new)

    @outside_graphs("a graph cannot make a cache: run one step, or early_initialization, before it")
    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make the cache for keys ``[B, Hkv, T, D]`` and values of these sizes and dtypes."""
        batch, heads, _, head_dim = key_states.shape
        self._note(key_states, value_states)
        self.cache = LayerCache(
            heads,
            head_dim,
            max_length=self.max_length,
            v_head_dim=value_states.shape[3],
            batch=batch,
            dtype=self._dtype or self.dtypes,
            window=self._window,
            device=key_states.device,
        )
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Stored, Stored]:
        """Store new tokens ``[B, Hkv, T, D]``."""
        if self.cache is None:
            self.lazy_initialization(key_states, value_states)
        self.held.append(key_states, value_states)
        keys = self._new(0, key_states.dtype, key_states)
        return keys, self._new(1, value_states.dtype, value_states)

    def get_seq_length(self) -> torch.Tensor | int:
        """Tokens so far, as a tensor: ``torch.compile`` would make a graph for every number.

        It is int32, which tells masks of this cache from those of transformers' (``masks``).
        """
        return 0 if self.cache is None else self.cache.lengths[0]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.max_length, 0

    def get_max_length(self) -> int:
        return self.max_length

    def reset(self) -> None:
        if self.cache is not None:
            self.cache.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, as transformers' own layers do."""
        length = length_after_crop(int(self.get_seq_length()), tokens_to_remove)
        if self.cache is not None:
            self.cache.truncate(length)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Make sequence i what sequence ``beam_idx[i]`` was."""
        if self.cache is not None:
            self.cache.reorder(beam_idx.tolist())


class FixedKVCache(Cache):  # type: ignore[misc]
    """A transformers cache of fixed size that kvfold's attention reads in place.

    A decoding step with it is one graph of ``torch.compile``, also with ``fullgraph=True``, and
    is never compiled anew as the cache fills or when another of the same size takes its place.

    Args:
        config: the model's. Layers with a sliding window keep everything, and read the window.
        max_length: tokens of each sequence; more are refused (on a GPU: dropped).
        dtype: of the cache, as for ``KVCache``. INT4's ends are not kept exact here.

    Raises:
        UnsupportedError: for layers that are not softmax attention, and for latents (MLA).

    It needs ``attn_implementation="kvfold"`` and the compiled kernels, or a GPU with Triton.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        max_length: int,
        dtype: Dtype | tuple[Dtype, Dtype] | None = None,
    ) -> None:
        check_sizes(max_length=max_length)
        text = config.get_text_config(decoder=True)
        if latent_sizes(text) is not None:
            raise UnsupportedError(
                "a fixed cache keeps no latents, as this model's attention does (MLA)",
                "use kvfold.transformers.KVCache, which torch.compile takes without fullgraph=True",
            )
        windows = windows_of(text)
        super().__init__(layers=[FixedKVLayer(max_length, dtype, window) for window in windows])

    @property
    def nbytes(self) -> int:
        """Bytes of memory that keys and values take."""
        return sum(layer.cache.nbytes for layer in self.layers if layer.cache is not None)


def attend_fixed(
    query: torch.Tensor, key: FixedStored, value: FixedStored, options: dict[str, Any]
) -> Any:
    """Attention over a fixed cache; ``options`` as ``attend`` makes them."""
    cache: LayerCache = key.layer.held
    if options["mask"] is None and cache.window is not None and cache.max_length > cache.window:
        raise UnsupportedError(
            f"the config has a sliding window of {cache.window} tokens, which the model's masks"
            " ignore",
            "use transformers' own cache for this model",
        )
    if options.pop("dropout") > 0:
        raise UnsupportedError("a fixed cache is for inference, without dropout")
    tokens = query.shape[2]
    if tokens == 1 or (tokens <= MAX_TOKENS and cache.window is None):
        options["causal"] = options["causal"] or cache.window is not None  # alike for one query
        return cache.attend(query, **options)
    return _attend_prompt(query, key, value, options)


@outside_graphs("a prompt looks at how many tokens a fixed cache holds: compile single steps only")
def _attend_prompt(
    query: torch.Tensor, key: FixedStored, value: FixedStored, options: dict[str, Any]
) -> Any:
    cache: LayerCache = key.layer.held
    tokens, length = query.shape[2], int(cache.lengths.max())
    if tokens < length and cache.window is None and not query.is_cuda:
        return cache.attend(query, **options)
    if tokens == length and key.new is not None and value.new is not None:
        keys, values = key.new.to(key.dtype), value.new.to(value.dtype)
    else:
        keys, values = key.tensor()[:, :, :length], value.tensor()[:, :, :length]
    if options["mask"] is not None:
        options["mask"] = options["mask"][..., :length]
    return attention(query, keys, values, **options)
