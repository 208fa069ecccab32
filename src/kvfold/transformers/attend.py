"""Attention as transformers calls it."""

from typing import Any

import torch
from torch import nn

from kvfold.errors import UnsupportedError
from kvfold.kernels.dispatch import attention
from kvfold.kernels.limits import MAX_TOKENS
from kvfold.kernels.outside import python_state
from kvfold.transformers.fixed import FixedStored, attend_fixed
from kvfold.transformers.keywords import refuse_unknown
from kvfold.transformers.latent import Heads, heads_of
from kvfold.transformers.layer import Stored, plain


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
    position_bias: torch.Tensor | None = None,
    indices: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' interface of an attention implementation.

    Args:
        query: ``[B, Hq, T, D]``; key, value: ``[B, Hkv, S, D]`` or what ``KVCache`` gave.
        attention_mask: boolean or additive ``[B or 1, 1 or Hq, T, S]``. Without one, and with
            more than one query, ``is_causal`` (the module's own by default) says whether query t
            sees the keys up to t only; as everywhere in transformers, True if nobody says.
        s_aux: ``[Hq]``, a logit per head that takes attention away (gpt-oss's sinks).
        position_bias: ``[B or 1, Hq, T, S]``, added to the scores (T5).
        indices: ``[B, T, N]``, the only keys that each query sees (DeepSeek's sparse attention).
        sinks: ``[B, Hq, T, 1]``, as ``s_aux`` but of every query (inkling2).

    Returns:
        ``[B, T, Hq, Dv]`` and no weights.

    Raises:
        UnsupportedError: for a tensor that the module's attention uses and this one does not.
    """
    refuse_unknown(module, kwargs)
    heads = heads_of(key, value)
    if heads is None:
        query, key, value = _of_one_dtype(query, *(_known(x) for x in (key, value)))
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and attention_mask is None
    if indices is not None:
        attention_mask, causal = _selected(indices, attention_mask, key.shape[2], causal), False
    if position_bias is not None:
        attention_mask, causal = _biased(position_bias, attention_mask, causal), False
    if sinks is not None:
        key, value, attention_mask = _with_sinks(sinks, key, value, attention_mask, causal)
        causal = False
    options: dict[str, Any] = {"scale": scaling, "softcap": softcap, "dropout": dropout}
    options |= {"mask": attention_mask, "causal": causal, "sink_logits": s_aux}
    if heads is not None:
        found = _attend_latents(query, heads, options)
    elif isinstance(key, FixedStored) and isinstance(value, FixedStored):
        found = attend_fixed(query, key, value, options)
    elif isinstance(key, Stored) and isinstance(value, Stored):
        found = _attend_stored(query, key, value, options)
    else:
        found = _attend_plain(query, plain(key), plain(value), options)
    return found.transpose(1, 2).contiguous(), None


def _of_one_dtype(
    query: torch.Tensor, key: torch.Tensor | Stored, value: torch.Tensor | Stored
) -> tuple[torch.Tensor, torch.Tensor | Stored, torch.Tensor | Stored]:
    """The one place where dtypes are made the same.

    Under ``torch.autocast`` rotary embedding leaves queries and keys in float32 beside values in
    bfloat16: all take autocast's dtype then, as in PyTorch's scaled_dot_product_attention. Else
    they take the widest of their dtypes. Stored keys and values keep their format; only what is
    decoded of them is converted.
    """
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
    elif query.dtype == key.dtype == value.dtype:
        return query, key, value
    else:
        dtype = torch.promote_types(query.dtype, torch.promote_types(key.dtype, value.dtype))
    return query.to(dtype), _converted(key, dtype), _converted(value, dtype)


def _known(x: Any) -> Any:
    """As it is if attention reads it so, else the tensor that it stands for."""
    return x if isinstance(x, torch.Tensor | Stored) else plain(x)


def _converted(x: torch.Tensor | Stored, dtype: torch.dtype) -> torch.Tensor | Stored:
    return x.of_dtype(dtype) if isinstance(x, Stored) else x.to(dtype)


def _biased(bias: torch.Tensor, mask: torch.Tensor | None, causal: bool) -> torch.Tensor:
    """An additive mask: the bias ``[1, Hq, T, S]``, -inf where a key may not be seen."""
    tokens, keys = bias.shape[-2:]
    if mask is None and causal and tokens > 1:
        mask = _first_prompt(tokens, keys, bias.device)
    if mask is None:
        return bias
    return bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else bias + mask


def _selected(
    indices: torch.Tensor, mask: torch.Tensor | None, keys: int, causal: bool
) -> torch.Tensor:
    """The mask, and nothing but the keys of the indices ``[B, T, N]``."""
    rows, tokens, _ = indices.shape
    chosen = torch.zeros(rows, tokens, keys, dtype=torch.bool, device=indices.device)
    chosen = chosen.scatter(-1, indices.long(), True)[:, None]
    if mask is None:
        mask = _first_prompt(tokens, keys, chosen.device) if causal and tokens > 1 else chosen
    return mask & chosen if mask.dtype == torch.bool else mask.masked_fill(~chosen, -torch.inf)


def _with_sinks(
    sinks: torch.Tensor,
    key: torch.Tensor | Stored,
    value: torch.Tensor | Stored,
    mask: torch.Tensor | None,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each query's own sink as one key more: of score ``sinks`` and value 0."""
    keys, values = (nn.functional.pad(plain(x), (0, 0, 0, 1)) for x in (key, value))
    shape = *sinks.shape[:3], key.shape[2]
    bias = _biased(sinks.new_zeros(1).expand(shape), mask, causal)
    return keys, values, torch.cat([bias, sinks.to(bias.dtype)], dim=-1)


def _first_prompt(tokens: int, keys: int, device: torch.device) -> torch.Tensor:
    """What transformers means by causal without a mask: query t sees keys 0 to t."""
    return torch.ones(tokens, keys, dtype=torch.bool, device=device).tril()


@python_state
def _attend_latents(query: torch.Tensor, heads: Heads, options: dict[str, Any]) -> Any:
    if options["dropout"] > 0 or not heads.absorbing_pays(query.shape[2]):
        query, key, value = _of_one_dtype(query, heads.key.tensor(), heads.value.tensor())
        return _attend_plain(query, plain(key), plain(value), options)
    if torch.is_autocast_enabled(query.device.type):
        query = query.to(torch.get_autocast_dtype(query.device.type))
    del options["dropout"]
    return heads.attend(query, options)


def _attend_plain(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: dict[str, Any]
) -> Any:
    tokens, keys = query.shape[2], key.shape[2]
    if options["causal"] and 1 < tokens < keys:
        # The first prompt in a static cache: what lies behind it is not filled yet.
        key, value = key[:, :, :tokens], value[:, :, :tokens]
    elif options["causal"] and tokens > keys:
        options |= {"causal": False, "mask": _first_prompt(tokens, keys, query.device)}
    return attention(query, key, value, **options)


@python_state
def _attend_stored(query: torch.Tensor, key: Stored, value: Stored, options: dict[str, Any]) -> Any:
    layer, tokens = key.layer, query.shape[2]
    cache = layer.held
    if layer.evict is None:
        return _attend_held(query, key, value, options)
    given = {name: options[name] for name in ("scale", "softcap") if options[name] is not None}
    if options["mask"] is not None:
        given["start"] = _padding(options["mask"], cache.batch, tokens)
    if key.new is not None and tokens > MAX_TOKENS:
        found = attention(query, key.tensor(), value.tensor(), **options)
    elif options["dropout"] > 0:
        raise UnsupportedError("a cache that evicts has no dropout", "call model.eval()")
    else:
        sinks = options["sink_logits"]
        found = cache.attend(query, **given, **({} if sinks is None else {"sink_logits": sinks}))
    layer.asked(query, given)
    return found


def _padding(mask: torch.Tensor, batch: int, tokens: int) -> torch.Tensor:
    """How many first keys a mask hides, ``[B]``; refuses masks that hide others."""
    start = left_padding(mask, batch, tokens)
    if start is None:
        raise UnsupportedError(
            "a cache that evicts knows of padding on the left, and of no other masks",
            "pad on the left, or leave evict out",
        )
    return start


def _attend_held(query: torch.Tensor, key: Stored, value: Stored, options: dict[str, Any]) -> Any:
    """Over a cache that forgets nothing but what a window hides."""
    cache, tokens = key.layer.held, query.shape[2]
    if cache.window is not None and tokens > 1 and key.shape[2] > cache.window:
        _check_window(options["mask"], cache.window)
    if key.new is not None and value.new is not None and tokens > MAX_TOKENS:
        if cache.window is not None and options["causal"]:
            options |= {"window": cache.window}
        return attention(query, key.tensor(), value.tensor(), **options)
    whole = tokens > MAX_TOKENS or options["dropout"] > 0
    if cache.window is not None and not options["causal"]:
        # What sees nothing later is causal; with its window the cache reads no more than it must.
        options["causal"] = tokens == 1 or not _looks_ahead(options["mask"], tokens)
        whole = whole or not options["causal"]
    if whole:
        options["causal"] = options["causal"] and options["mask"] is None
        return attention(query, key.tensor(), value.tensor(), **options)
    del options["dropout"]
    if cache.select is not None and options["mask"] is not None:
        start = left_padding(options["mask"], cache.batch, tokens)
        if start is not None:  # selected pages stand elsewhere than the mask has them
            options |= {"mask": None, "causal": True, "start": start}
    return cache.attend(query, **options)


def left_padding(mask: torch.Tensor, batch: int, tokens: int) -> torch.Tensor | None:
    """How many first keys a mask ``[B or 1, 1, T, S]`` hides, int ``[B]``; None if it hides more
    than these and, from each query, what comes after it."""
    if mask.dim() != 4 or mask.shape[1] != 1:
        return None
    shown = _shown(mask)[:, 0].expand(-1, tokens, -1)
    keys = torch.arange(shown.shape[2], device=mask.device)
    start = shown[:, -1].int().argmax(-1)
    own = keys[-tokens:, None]
    wanted = (keys >= start[:, None, None]) & (keys <= own)
    return start.expand(batch) if torch.equal(shown, wanted) else None


def _check_window(mask: torch.Tensor | None, window: int) -> None:
    """Refuse a model whose last query sees keys that a sliding cache need not have kept.

    Its config has a window, so transformers' own cache keeps no more, but its masks do not.
    """
    older = True if mask is None else _shown(mask[..., -1, :-window]).any()
    if older:
        raise UnsupportedError(
            f"the config has a sliding window of {window} tokens, which the model's masks ignore",
            "use transformers' own cache for this model",
        )


def _shown(mask: torch.Tensor) -> torch.Tensor:
    """Where a mask, boolean or additive, lets keys be seen."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min


def _looks_ahead(mask: torch.Tensor | None, tokens: int) -> bool:
    """Whether some query may see a key that comes after it; the last query is at the last key."""
    if mask is None:
        return True
    shown = _shown(mask[..., -tokens:])
    return bool(shown.expand(*shown.shape[:-2], tokens, tokens).triu(1).any())
