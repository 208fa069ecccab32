"""What attention refuses, in one line each, before anything is computed."""

import math
from numbers import Integral, Real
from typing import TypeGuard

import torch

from kvfold.errors import InputError
from kvfold.names import shown
from kvfold.ops.options import Options, Window, constant, reach

Shape = tuple[int, int, int, int]  # batch, query heads, queries, keys
# What kernels hold as float32 and int32.
_TINY, _HUGE = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
_MOST_SINKS = (1 << 31) - 1
_FAR = 1 << 62


def check_options(
    shape: Shape,
    *,
    causal: bool = True,
    window: Window | None = None,
    sinks: int = 0,
    start: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sink_logits: torch.Tensor | None = None,
) -> Options:
    """Check the options that ``kvfold.attention`` and caches share.

    Raises:
        InputError: for the first that does not fit.
    """
    batch, heads, _, keys = shape
    if not torch.compiler.is_compiling():  # which knows what is a number and what a tensor
        check_flags(causal=causal)
        _check_numbers(window, sinks, scale, softcap)
        check_tensors(
            start=start, lengths=lengths, mask=mask, alibi_slopes=alibi_slopes,
            sink_logits=sink_logits,
        )  # fmt: skip
    _check_window(window, causal)
    if sinks < 0:
        raise InputError(f"sinks={sinks}: expected 0 or more")
    scale = None if scale is None else constant(scale)
    softcap = None if softcap is None else constant(softcap)
    if scale is not None and not math.isfinite(scale):
        raise InputError(f"scale={scale}: expected a finite number")
    if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
        raise InputError(f"softcap={softcap}: expected a positive number, or None")
    if not torch.compiler.is_compiling():
        check_range("start", start, batch, keys)
        check_range("lengths", lengths, batch, keys)
    _check_per_head("alibi_slopes", alibi_slopes, heads)
    _check_per_head("sink_logits", sink_logits, heads)
    if mask is not None:
        _check_mask(mask, shape)
        mask = mask.view((1,) * (4 - mask.dim()) + tuple(mask.shape)) if mask.dim() < 4 else mask
    left, right = reach(causal, window)
    if not torch.compiler.is_compiling():  # operators take integers of 64 bits
        left, right = (None if x is None else min(x, _FAR) for x in (left, right))
    return Options(
        left, right, sinks, start, lengths, mask, scale, softcap, alibi_slopes, sink_logits
    )


def check_flags(**flags: object) -> None:
    """Refuse anything but True and False: "no" and None would count as one of them."""
    for name, flag in flags.items():
        if flag is not True and flag is not False:
            raise InputError(f"{name}={shown(flag)}: expected True or False")


def check_tensors(**tensors: object) -> None:
    """Refuse anything but ordinary tensors; None is not given."""
    for name, x in tensors.items():
        if x is None:
            continue
        if not isinstance(x, torch.Tensor):
            raise InputError(f"{name}={shown(x)}: expected a tensor", "torch.as_tensor makes one")
        if x.layout is not torch.strided:
            raise InputError(f"{name} is {x.layout}, expected an ordinary (strided) tensor")


def _check_numbers(window: object, sinks: object, scale: object, softcap: object) -> None:
    whole = window if isinstance(window, tuple | list) else (window,)
    if window is not None and not all(x is None or _is_whole(x) for x in whole):
        raise InputError(
            f"window={shown(window)}: expected a whole number of keys, a pair, or None"
        )
    if not _is_whole(sinks) or sinks > _MOST_SINKS:  # type: ignore[operator]
        raise InputError(f"sinks={shown(sinks)}: expected a whole number of keys")
    for name, x in (("scale", scale), ("softcap", softcap)):
        if x is None:
            continue
        if not is_number(x) and not _is_scalar(x):
            raise InputError(f"{name}={shown(x)}: expected a number, or None")
        x = float(x)  # type: ignore[arg-type]
        if math.isfinite(x) and x and not _TINY <= abs(x) <= _HUGE:
            raise InputError(f"{name}={x}: float32 cannot hold it; expected {_TINY} to {_HUGE}")


def is_number(x: object) -> TypeGuard[float]:
    """Whether it is a number of Python's or NumPy's; True and False are not meant as one."""
    # Usual types come first: a step of decoding waits for this.
    return type(x) is float or type(x) is int or (isinstance(x, Real) and not isinstance(x, bool))


def _is_scalar(x: object) -> bool:
    """A tensor of one number, as a model may compute its scale."""
    if not isinstance(x, torch.Tensor):
        return False
    return x.numel() == 1 and x.is_floating_point() and not x.is_meta


def _is_whole(x: object) -> bool:
    return type(x) is int or (isinstance(x, Integral) and not isinstance(x, bool))


def _check_window(window: Window | None, causal: bool) -> None:
    """A number counts back from a query's position; a pair counts on both of its sides."""
    if window is None:
        return
    if not isinstance(window, tuple | list):
        if window < 1:
            raise InputError(f"window={window}: expected at least 1, or None")
        if not causal:
            raise InputError(
                f"window={window} needs causal=True: it counts back from a query's position",
                "window=(left, right) limits what is seen on both sides",
            )
        return
    if len(window) != 2 or any(x is not None and x < -1 for x in window):
        raise InputError(
            f"window={window}: expected (left, right), keys before and after a query's own",
            "0 or more; -1 or None for no limit",
        )
    if causal and (window[1] or 0) > 0:
        raise InputError(
            f"window={window} would show later keys, which causal=True hides",
            "give causal=False, or a window that ends with 0",
        )


def _check_per_head(name: str, given: torch.Tensor | None, heads: int) -> None:
    if given is None:
        return
    if given.shape != (heads,):
        raise InputError(f"{name} has shape {list(given.shape)}, expected [{heads}]")
    if given.dtype == torch.bool or given.is_complex():
        raise InputError(f"{name} is {given.dtype}, expected a float type")


def check_range(name: str, given: torch.Tensor | None, batch: int, keys: int) -> None:
    """Positions must be ``[B]`` and within the keys: kernels follow them blindly."""
    if given is None:
        return
    if given.shape != (batch,):
        raise InputError(f"{name} has shape {list(given.shape)}, expected [{batch}]")
    if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
        raise InputError(f"{name} is {given.dtype}, expected whole numbers (torch.int32)")
    if given.device.type != "cpu":
        return  # reading it would wait for the GPU, whose kernels stay within the keys anyway
    if given.numel() and not 0 <= int(given.min()) <= int(given.max()) <= keys:
        low, high = int(given.min()), int(given.max())
        raise InputError(f"{name} runs from {low} to {high}, beyond the {keys} keys given")


def _check_mask(mask: torch.Tensor, shape: Shape) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise InputError(
            f"mask is {mask.dtype}, expected bool or a float type",
            "a 0/1 mask becomes boolean by mask.bool()",
        )
    try:
        fits = torch.broadcast_shapes(mask.shape, shape) == torch.Size(shape)
    except RuntimeError:
        fits = False
    if not fits:
        raise InputError(
            f"mask has shape {list(mask.shape)}, which does not broadcast to {list(shape)}"
        )
