"""The CPU kernels over a cache of fixed size, as operators that ``torch.compile`` takes.

The lengths are a tensor, read when an operator runs: one graph serves every step.
"""

from typing import Any

import torch

from kvfold.errors import InputError
from kvfold.kernels.cpu.call import KernelCall, append
from kvfold.kernels.cpu.library import library
from kvfold.kernels.view import KVView, Rows, readable
from kvfold.ops.formats import FORMATS
from kvfold.ops.options import SCHEMA, Options, unflattened

_PAGES = "Tensor{0} k_data, Tensor{1} k_scales, Tensor{2} v_data, Tensor{3} v_scales"
_PLACES = "Tensor table, Tensor ends, str k_format, str v_format, SymInt page_size, SymInt most"
_WRITTEN = _PAGES.format("(a!)", "(b!)", "(c!)", "(d!)")
_READ = _PAGES.format("", "", "", "")
# Defined by their schemas: ``torch.library.custom_op`` would take longer for every call.
_OPERATORS = torch.library.Library("kvfold", "FRAGMENT")
_OPERATORS.define(f"cpu_append(Tensor k, Tensor v, {_WRITTEN}, {_PLACES}) -> ()")
_OPERATORS.define(
    f"cpu_attend(Tensor q, {_READ}, {_PLACES}, SymInt v_head_dim, {SCHEMA}) -> (Tensor, Tensor)"
)

Found = tuple[torch.Tensor, torch.Tensor]


def append_fixed(k: torch.Tensor, v: torch.Tensor, view: KVView) -> None:
    """Write tokens ``[B, Hkv, T, D]`` and ``Dv`` from the view's ends on, which are a tensor.

    Raises:
        InputError: if they do not fit: here, unlike on a GPU, asking costs nothing.
    """
    if torch.compiler.is_compiling():
        torch.ops.kvfold.cpu_append(k, v, *_parts(view))
    else:
        _append(k, v, view)


def attend_fixed(q: torch.Tensor, view: KVView, options: Options, v_head_dim: int) -> Found:
    """Attention of the last tokens over what the view holds: output and log-sum-exp."""
    if torch.compiler.is_compiling():
        flat = options.flat()
        found: Found = torch.ops.kvfold.cpu_attend(q, *_parts(view), v_head_dim, *flat)
        return found
    return _attend(q, view, options, v_head_dim)


def _append(k: torch.Tensor, v: torch.Tensor, view: KVView) -> None:
    lib = library()
    assert lib is not None
    there = _at_hand(view)
    longest = max(there.end, default=0) + k.shape[2]
    if longest > view.most:
        raise InputError(f"{longest} tokens do not fit a fixed cache of {view.most}")
    append(lib, readable(k), readable(v), there)


def _attend(q: torch.Tensor, view: KVView, options: Options, v_head_dim: int) -> Found:
    lib = library()
    assert lib is not None
    there = _at_hand(view)
    run = KernelCall(q, view.keys.data.shape[1], there.end, options, view.most)
    out, lse = run.run(lib, [there], v_head_dim, return_lse=True)
    assert lse is not None
    return out, lse


def _at_hand(view: KVView) -> KVView:
    """The view with its ends as numbers."""
    assert isinstance(view.end, torch.Tensor)
    return view._replace(end=view.end.tolist())


def _parts(view: KVView) -> tuple[Any, ...]:
    """A view as operators are given it."""
    k, v = view.keys, view.values
    return (
        k.data, k.scales, v.data, v.scales, view.table, view.end, k.fmt.name, v.fmt.name,
        view.page_size, view.most,
    )  # fmt: skip


def _whole(dims: tuple[int, int], parts: tuple[Any, ...]) -> KVView:
    """The view that ``_parts`` took apart."""
    k_data, k_scales, v_data, v_scales, table, ends, k_format, v_format, page_size, most = parts
    k, v = FORMATS[k_format], FORMATS[v_format]
    keys = Rows(k, k_data, k_scales, dims[0], k_data.dim() == 3, k.rotation(dims[0]))
    values = Rows(v, v_data, v_scales, dims[1], v_data.dim() == 3)
    return KVView(keys, values, table, page_size, None, ends, most)


_PARTS = 10


def _run_append(k: torch.Tensor, v: torch.Tensor, *parts: Any) -> None:
    _append(k, v, _whole((k.shape[3], v.shape[3]), parts))


def _run_attend(q: torch.Tensor, *given: Any) -> Found:
    parts, v_head_dim, flat = given[:_PARTS], given[_PARTS], given[_PARTS + 1 :]
    return _attend(q, _whole((q.shape[3], v_head_dim), parts), unflattened(flat), v_head_dim)


def _like_attend(q: torch.Tensor, *given: Any) -> Found:
    out = q.new_empty(*q.shape[:3], given[_PARTS])
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)


_OPERATORS.impl("cpu_append", _run_append, "CPU")
_OPERATORS.impl("cpu_append", lambda *given: None, "Meta")
_OPERATORS.impl("cpu_attend", _run_attend, "CPU")
_OPERATORS.impl("cpu_attend", _like_attend, "Meta")
