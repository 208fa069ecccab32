"""What the attention layer refuses, in one line each, before anything is computed or cached."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Real
from typing import Any, Protocol

import torch
from torch import nn

from kvfold.cache.checks import (
    check_device,
    check_dtype,
    check_rotary,
    check_sizes,
    check_tensor,
    refuse_gradients,
)
from kvfold.cache.kv import KVCache
from kvfold.cache.latent import LatentCache
from kvfold.errors import InputError
from kvfold.geometry import AttentionGeometry
from kvfold.kernels.dispatch import explain
from kvfold.names import shown
from kvfold.ops.options import Window
from kvfold.ops.rope import Rotary

_LATE_LENGTHS = (
    "lengths were given with a cache that holds tokens already",
    "right padding is only for the first tokens; then all sequences take equally many",
)


class Layer(Protocol):
    """What is checked of an attention layer."""

    @property
    def geometry(self) -> AttentionGeometry: ...

    @property
    def kv_hidden_size(self) -> int: ...

    @property
    def rotary(self) -> Rotary | None: ...

    @property
    def causal(self) -> bool: ...

    @property
    def window(self) -> Window | None: ...

    @property
    def sinks(self) -> int: ...

    @property
    def softcap(self) -> float | None: ...

    @property
    def scale(self) -> float | None: ...

    @property
    def dropout(self) -> float: ...

    @property
    def o_proj(self) -> nn.Linear: ...

    @property
    def _slides(self) -> int | None: ...

    @property
    def _sight(self) -> dict[str, Any]: ...

    @property
    def _scoring(self) -> dict[str, Any]: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


@dataclass(frozen=True)
class Hidden:
    """What a call hides, besides what the layer always does; see ``forward``."""

    start: torch.Tensor | None
    lengths: torch.Tensor | None
    mask: torch.Tensor | None

    @property
    def options(self) -> dict[str, Any]:
        """What ``attention`` is given. (Dynamo before PyTorch 2.12 cannot trace ``vars``.)"""
        return {"start": self.start, "lengths": self.lengths, "mask": self.mask}


def check_options(layer: Layer, qk_norm: float | None) -> None:
    """Let nobody build a layer that cannot work."""
    check_sizes(kv_hidden_size=layer.kv_hidden_size)
    if layer.rotary is not None:
        check_rotary(layer.rotary, layer.geometry.head_dim)
    if not isinstance(layer.window, tuple | list):
        check_sizes(window=layer.window)
    check_sizes(sinks=layer.sinks)
    given = {"softcap": layer.softcap, "scale": layer.scale}
    for name, number in ({"dropout": layer.dropout} | given).items():
        if number is not None or name == "dropout":
            _check_number(name, number)
    if qk_norm is not None:
        check_epsilon("qk_norm", qk_norm)
    if layer.sinks and layer.window is None:
        raise InputError(f"sinks={layer.sinks} without a window: every token is seen anyway")
    check_call(layer, torch.empty(1, 1, 1, dtype=torch.float32), 1, Hidden(None, None, None))


def _check_number(name: str, number: object) -> None:
    real = isinstance(number, Real) and not isinstance(number, bool)
    if not real or not math.isfinite(number):  # type: ignore[arg-type]
        raise InputError(f"{name}={shown(number)}: expected a finite number")


def check_epsilon(name: str, epsilon: float) -> None:
    """What a norm adds to a mean square."""
    _check_number(name, epsilon)
    if not epsilon > 0:
        raise InputError(f"{name}={epsilon}: expected a positive epsilon")


def check_weights(device: object, dtype: object) -> None:
    """Where weights are made, and in which dtype; None for PyTorch's defaults."""
    if device is not None and str(device) != "meta":
        check_device(device)
    if dtype is not None:
        check_dtype(dtype)


def check_call(layer: Layer, x: torch.Tensor, keys: int, hidden: Hidden) -> None:
    """Let ``attention`` check its options before anything is computed or cached."""
    mask, g = hidden.mask, layer.geometry
    if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
        raise InputError(f"mask is {mask.dtype}, expected bool or float", "use mask.bool()")
    like = x.new_empty(1)  # shapes without memory
    explain(
        like.expand(x.shape[0], g.num_heads, x.shape[1], g.head_dim),
        like.expand(x.shape[0], g.num_kv_heads, keys, g.head_dim),
        like.expand(x.shape[0], g.num_kv_heads, keys, g.v_head_dim),
        **layer._sight,
        **layer._scoring,
        **hidden.options,
        dropout=layer.dropout,
    )


def check_inputs(
    layer: Layer,
    x: torch.Tensor,
    context: torch.Tensor | None,
    hidden: Hidden,
) -> None:
    """Sequences are ``[B, tokens, width]``, where the weights are."""
    check_tensor("x", x)
    for name, beside in {"context": context, **hidden.options}.items():
        if beside is not None:
            check_tensor(name, beside)
            if beside.is_meta and not x.is_meta:
                raise InputError(f"{name} is on meta: it has no numbers", "move it with .to(...)")
    weight = layer.o_proj.weight
    given = {"x": (x, layer.geometry.hidden_size)}
    if context is not None:
        given["context"] = (context, layer.kv_hidden_size)
    for name, (tensor, width) in given.items():
        if tensor.dim() != 3 or tensor.shape[-1] != width or tensor.shape[0] != x.shape[0]:
            shape = f"[{x.shape[0] if name == 'context' else 'B'}, tokens, {width}]"
            raise InputError(f"{name} has shape {list(tensor.shape)}, expected {shape}")
        mixed = tensor.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type)
        if mixed or tensor.device != weight.device:
            kinds = f"{tensor.dtype} on {tensor.device}, not {weight.dtype} on {weight.device}"
            raise InputError(f"{name} is {kinds}", "move one of them with .to(...)")
    if context is None and layer.kv_hidden_size != layer.geometry.hidden_size:
        raise InputError(
            f"a layer with kv_hidden_size={layer.kv_hidden_size} needs a context of that width"
        )
    if context is not None and (layer.causal or layer.rotary is not None):
        raise InputError(
            "a context was given to a layer that is causal or has rotary embedding",
            "positions in two sequences do not compare; build it with causal=False, rotary=None",
        )


def check_latent_cache(
    layer: Layer, cache: LatentCache, sizes: tuple[int, int], x: torch.Tensor, hidden: Hidden
) -> None:
    """The cache is one that a latent layer of these sizes can fill and read now."""
    if not isinstance(cache, LatentCache):
        raise InputError(f"cache is {shown(cache)}", "make one: layer.new_cache(batch)")
    refuse_gradients(x, *layer.parameters())
    expected = x.shape[0], *sizes
    found = cache.batch, cache.kv_lora_rank, cache.qk_rope_head_dim
    if found != expected:
        names = "batch, kv_lora_rank, qk_rope_head_dim"
        raise InputError(
            f"the cache has {names} = {found}, expected {expected}",
            f"make it with layer.new_cache({x.shape[0]})",
        )
    if any(cache.lengths) and hidden.lengths is not None:
        raise InputError(*_LATE_LENGTHS)


def check_cache(
    layer: Layer,
    cache: KVCache,
    x: torch.Tensor,
    context: torch.Tensor | None,
    hidden: Hidden,
) -> None:
    """The cache is one that this layer can fill and read now."""
    if not isinstance(cache, KVCache):
        raise InputError(f"cache is {shown(cache)}", "make one: layer.new_cache(batch)")
    refuse_gradients(x, context, *layer.parameters())
    g = layer.geometry
    expected = (x.shape[0], g.num_kv_heads, g.head_dim, g.v_head_dim)
    found = (cache.batch, cache.num_kv_heads, cache.head_dim, cache.v_head_dim)
    if found != expected:
        names = "batch, num_kv_heads, head_dim, v_head_dim"
        sizes = f"the cache has {names} = {found}, expected {expected}"
        raise InputError(sizes, f"make it with layer.new_cache({x.shape[0]})")
    if cache.kind == "sliding" and (cache.window, cache.sinks) != (layer._slides, layer.sinks):
        theirs = f"window={cache.window}, sinks={cache.sinks}"
        ours = f"window={layer._slides}, sinks={layer.sinks}"
        raise InputError(f"the cache slides with {theirs}, the layer with {ours}")
    if cache.kind == "sliding" and cache.sinks and hidden.start is not None:
        raise InputError(
            "a sliding cache keeps the first positions as sinks, which start= says are padding",
            "pad on the right (lengths), or use a contiguous or paged cache",
        )
    if context is None and not layer.causal:
        raise InputError(
            "a layer that is not causal can cache only a context",
            "tokens that come later would change what earlier ones saw",
        )
    if not any(cache.lengths):
        return
    lengths = hidden.lengths
    if context is None and lengths is not None:
        raise InputError(*_LATE_LENGTHS)
    if context is not None:
        held = [context.shape[1]] * cache.batch if lengths is None else lengths.tolist()
        if held != cache.lengths:
            sizes = f"the cache holds contexts of {cache.lengths} tokens, this one has {held}"
            raise InputError(sizes, "use a new cache for a new context")
