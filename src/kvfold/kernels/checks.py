"""What attention refuses, in one line each, before anything is computed."""

import math
from numbers import Integral, Real

import torch

from kvfold.errors import InputError
from kvfold.names import shown
from kvfold.ops.options import Options, Window, constant, reach

Shape = tuple[int, int, int, int]  # batch, query heads, queries, keys


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
    if not torch.compiler.is_compiling():
        _check_kinds(
            (("sinks", sinks, int), ("scale", scale, float), ("softcap", softcap, float)),
            (
                ("start", start), ("lengths", lengths), ("mask", mask),
                ("alibi_slopes", alibi_slopes), ("sink_logits", sink_logits),
            ),
            window,
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
    if alibi_slopes is not None and alibi_slopes.shape != (heads,):
        raise InputError(f"alibi_slopes has shape {list(alibi_slopes.shape)}, expected [{heads}]")
    if sink_logits is not None and sink_logits.shape != (heads,):
        raise InputError(f"sink_logits has shape {list(sink_logits.shape)}, expected [{heads}]")
    if mask is not None:
        _check_mask(mask, shape)
        mask = mask.view((1,) * (4 - mask.dim()) + tuple(mask.shape)) if mask.dim() < 4 else mask
    left, right = reach(causal, window)
    return Options(
        left, right, sinks, start, lengths, mask, scale, softcap, alibi_slopes, sink_logits
    )


def _check_kinds(
    numbers: tuple[tuple[str, object, type], ...],
    tensors: tuple[tuple[str, object], ...],
    window: object,
) -> None:
    """Numbers are numbers, tensors are tensors; None is neither given. Usual types come first: a
    step of decoding waits for this."""
    for name, x, kind in numbers:
        if x is not None and type(x) is not kind and not _is_number(x, kind):
            raise InputError(f"{name}={shown(x)}: expected a number")
    for name, given in tensors:
        if given is not None and not isinstance(given, torch.Tensor):
            raise InputError(
                f"{name} is {shown(given)}, expected a tensor", "torch.as_tensor makes one"
            )
    if window is None or type(window) is int:
        return
    parts = window if isinstance(window, tuple | list) else (window,)
    if not all(x is None or _is_number(x, int) for x in parts):
        raise InputError(f"window={shown(window)}: expected a number or a pair of numbers, or None")


def _is_number(x: object, kind: type) -> bool:
    if isinstance(x, torch.Tensor):  # of one number, as a model may compute its scale
        return kind is float and x.numel() == 1 and x.is_floating_point() and not x.is_meta
    numeric = Integral if kind is int else Real
    return type(x) is int or type(x) is kind or (isinstance(x, numeric) and not isinstance(x, bool))


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
