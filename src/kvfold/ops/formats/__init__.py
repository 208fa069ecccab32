"""Cache formats. A file here is the one definition of its format, which every kernel is tested by.

Each declares a ``FORMAT``. The order, for lists and for the kernels' numbers, is that of the codes.
"""

import importlib
import pkgutil
from functools import cache
from typing import TYPE_CHECKING

from kvfold.errors import InputError
from kvfold.ops.format import Format

if TYPE_CHECKING:
    import torch


def _declared() -> list[Format]:
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    found = [importlib.import_module(f"{__name__}.{name}").FORMAT for name in names]
    return sorted(found, key=lambda fmt: fmt.code)


FORMATS: dict[str, Format] = {fmt.name: fmt for fmt in _declared()}


@cache
def format_of(dtype: "str | torch.dtype") -> Format:
    """Look a cache format up by name, or by the torch dtype of an unquantized one.

    Raises:
        InputError: if there is no such format.

    >>> format_of("int4").row_bytes(128)
    64
    """
    if isinstance(dtype, str):
        found = FORMATS.get(dtype)
    else:
        name = str(dtype).removeprefix("torch.")
        found = next((f for f in FORMATS.values() if f.plain and f.stored == name), None)
    if found is None:
        raise InputError(f"unknown cache dtype {dtype!r}", f"choose one of {', '.join(FORMATS)}")
    return found


def encode(rows: "torch.Tensor", fmt: Format) -> "tuple[torch.Tensor, torch.Tensor]":
    """Encode rows.

    Args:
        rows: ``[..., D]``, any float dtype.

    Returns:
        bytes ``[..., fmt.row_bytes(D)]`` uint8, and scales ``[..., fmt.groups(D)]`` bfloat16.
    """
    return fmt.encode(rows.float())


def decode(data: "torch.Tensor", scales: "torch.Tensor", fmt: Format, dim: int) -> "torch.Tensor":
    """Float32 rows ``[..., dim]`` of what ``encode`` gave."""
    return fmt.decode(data, scales, dim)
