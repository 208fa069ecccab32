"""Drop-in for transformers: an attention implementation named ``kvfold``, and a cache.

    import kvfold.transformers  # registers the name; changes nothing else

    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="kvfold")
    cache = kvfold.transformers.KVCache(model.config, dtype="int4")
    model.generate(**inputs, past_key_values=cache)

The implementation alone works with every transformers cache; it then reads plain tensors. With
``KVCache`` keys and values are stored as the kernels read them, in any format, and never copied.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import sdpa_mask

from kvfold.cache.kv import Dtype
from kvfold.cache.kv import KVCache as LayerCache
from kvfold.errors import InputError, UnsupportedError
from kvfold.kernels.dispatch import attention
from kvfold.kernels.library import MAX_TOKENS

NAME = "kvfold"
_PAGE, _SLIDING_PAGE = 256, 64  # longer pages read faster; shorter ones are freed sooner


class Stored:
    """Stands for the keys or values of a cache where a model expects their tensor.

    kvfold's attention reads the cache itself. Any other use, by another attention implementation
    say, decodes everything into a tensor first.
    """

    def __init__(self, layer: "KVLayer", new: torch.Tensor, past: int, side: int) -> None:
        self.layer, self.new, self.past = layer, new, past
        self._side = side
        self.shape = torch.Size((*new.shape[:2], past + new.shape[2], new.shape[3]))
        self.dtype, self.device = new.dtype, new.device

    def tensor(self) -> torch.Tensor:
        """``[B, Hkv, S, D]`` in the model's dtype."""
        if self.past == 0:
            return self.new
        return self.layer.tensors(self.dtype)[self._side]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor(), name)

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.tensor()[index]

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        plain = [_plain(a) for a in args]
        return function(*plain, **{key: _plain(a) for key, a in (kwargs or {}).items()})


def _plain(x: Any) -> Any:
    if isinstance(x, Stored):
        return x.tensor()
    if isinstance(x, list | tuple):
        return type(x)(_plain(item) for item in x)
    return x


class KVLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer of ``KVCache``; made when its first keys come."""

    is_croppable = True
    supports_early_init = False

    def __init__(self, dtype: Dtype | tuple[Dtype, Dtype] | None, window: int | None) -> None:
        super().__init__()
        self._dtype, self._window = dtype, window
        self.is_sliding = window is not None
        self.cache: LayerCache | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        batch, heads, _, head_dim = key_states.shape
        self.cache = LayerCache(
            heads,
            head_dim,
            v_head_dim=value_states.shape[3],
            batch=batch,
            dtype=self._dtype or key_states.dtype,
            kind="paged" if self._window is None else "sliding",
            page_size=_PAGE if self._window is None else _SLIDING_PAGE,
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
        assert self.cache is not None
        past, tokens = self.get_seq_length(), key_states.shape[2]
        # A long first prompt attends over the tensors at hand, so a window need not store it all.
        queries = tokens if past or tokens <= MAX_TOKENS else 0
        self.cache.append(key_states, value_states, queries=queries)
        return Stored(self, key_states, past, 0), Stored(self, value_states, past, 1)

    def tensors(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Everything, decoded; positions that a window has freed are zeros."""
        assert self.cache is not None
        return self.cache.tensors(dtype)

    def get_seq_length(self) -> int:
        return 0 if self.cache is None else self.cache.lengths[0] if self.cache.lengths else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks are made for all positions, whatever a window keeps."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.cache, self.is_initialized = None, False

    def crop(self, tokens_to_remove: int) -> None:
        if self.cache is not None and tokens_to_remove:
            self.cache.truncate(max(0, self.get_seq_length() - abs(tokens_to_remove)))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.cache is not None:
            self.cache.reorder(indices.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.cache is not None:
            rows = range(self.cache.batch)
            self.cache.reorder([b for b in rows for _ in range(repeats)])


class KVCache(Cache):  # type: ignore[misc]
    """A transformers cache that kvfold's attention reads in place.

    Args:
        config: the model's; its sliding layers get sliding caches.
        dtype: of the cache, as for ``kvfold.KVCache``: ``bf16``, ``int8``, ``int4``,
            ``("int8", "int4")`` …; by default the model's own.

    Raises:
        UnsupportedError: for layers that are not softmax attention.

    It works with every attention implementation, but only ``attn_implementation="kvfold"`` reads
    it without decoding all of it at every step.
    """

    def __init__(
        self, config: PretrainedConfig, dtype: Dtype | tuple[Dtype, Dtype] | None = None
    ) -> None:
        text = config.get_text_config(decoder=True)
        super().__init__(layers=[KVLayer(dtype, window) for window in _windows(text)])

    @property
    def nbytes(self) -> int:
        """Bytes of memory that keys and values take, allocated but unused pages included."""
        return sum(layer.cache.nbytes for layer in self.layers if layer.cache is not None)


def _windows(config: PretrainedConfig) -> Iterable[int | None]:
    """The sliding window of every layer, None for full attention."""
    window = getattr(config, "sliding_window", None)
    count = config.num_hidden_layers - (getattr(config, "num_kv_shared_layers", None) or 0)
    types = getattr(config, "layer_types", None)
    if types is None:
        use = window is not None and getattr(config, "use_sliding_window", True)
        types = ["sliding_attention" if use else "full_attention"] * config.num_hidden_layers
    for kind in types[:count]:
        if kind not in ("full_attention", "sliding_attention", "chunked_attention"):
            raise UnsupportedError(
                f"a layer of type {kind!r} keeps no keys and values",
                "use transformers' own cache for this model",
            )
        yield window if kind == "sliding_attention" else None


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor | Stored,
    value: torch.Tensor | Stored,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' interface of an attention implementation.

    Args:
        query: ``[B, Hq, T, D]``; key, value: ``[B, Hkv, S, D]`` or what ``KVCache`` gave.
        attention_mask: boolean or additive ``[B or 1, 1 or Hq, T, S]``, or None for causal.
        s_aux: ``[Hq]``, a logit per head that takes attention away (gpt-oss's sinks).

    Returns:
        ``[B, T, Hq, Dv]`` and no weights.
    """
    if kwargs.get("position_bias") is not None:
        raise UnsupportedError("kvfold's attention has no position bias", "use 'eager' or 'sdpa'")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    options: dict[str, Any] = {"scale": scaling, "softcap": softcap, "sink_logits": s_aux}
    options |= {"mask": attention_mask, "causal": causal and attention_mask is None}
    if isinstance(key, Stored) and isinstance(value, Stored):
        found = _attend_stored(query, key, value, options)
    else:
        assert isinstance(key, torch.Tensor)
        assert isinstance(value, torch.Tensor)
        if attention_mask is None and 1 < query.shape[2] < key.shape[2]:
            # The first prompt in a static cache: what lies behind it is not filled yet.
            key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
        found = attention(query, key, value, dropout=dropout, **options)
    assert isinstance(found, torch.Tensor)
    return found.transpose(1, 2).contiguous(), None


def _attend_stored(query: torch.Tensor, key: Stored, value: Stored, options: dict[str, Any]) -> Any:
    cache = key.layer.cache
    assert cache is not None
    if key.past == 0 and query.shape[2] > MAX_TOKENS:
        if cache.window is not None and options["mask"] is None:
            options |= {"window": cache.window}
        return attention(query, key.new, value.new, **options)
    if query.shape[2] > MAX_TOKENS:
        return attention(query, key.tensor(), value.tensor(), **options)
    if not options["causal"] and options["mask"] is not None and cache.window is not None:
        # The mask says it all, but with its window the cache reads no more than it must.
        options |= {"causal": True}
    return cache.attend(query, **options)


def enable() -> None:
    """Register the implementation ``kvfold`` with transformers; importing this module does it.

    It patches nothing: models use it only when loaded with ``attn_implementation="kvfold"`` or
    told to by ``model.set_attn_implementation("kvfold")``.
    """
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def check_implementation(model: nn.Module) -> None:
    """Refuse a model that would decode the whole cache at every step.

    Raises:
        InputError: if the model does not use kvfold's attention.
    """
    used = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if used != NAME:
        raise InputError(
            f"the model uses {used!r} attention", "load it with attn_implementation='kvfold'"
        )


enable()
