"""How kvfold's formats lie in the blocks of vLLM's memory.

A block of vLLM's holds the keys and values of ``page_size`` tokens; in it each KV head has one run
of bytes: its keys, its values, and the scales of both, each as ``kernels.layout`` has it. vLLM is
told their exact number (``PageFormat.token_bytes``), gives out, shares, swaps and frees blocks, and
never looks into them.
"""

from functools import cached_property
from typing import NamedTuple

import torch

from kvfold.errors import InputError
from kvfold.kernels.layout import Layout
from kvfold.kernels.view import Rows
from kvfold.ops.format import Format
from kvfold.ops.formats import format_of

#: vLLM's names of cache dtypes (``--kv-cache-dtype``), and kvfold's formats; None is the model's.
FORMATS: dict[str, str | None] = {
    "auto": None,
    "float16": "fp16",
    "bfloat16": "bf16",
    "fp8": "fp8",
    "fp8_e4m3": "fp8",
    "fp8_per_token_head": "fp8",
    "int8_per_token_head": "int8",
    "int4_per_token_head": "int4",
}
_SCALE = 2  # bytes


def format_named(name: str, dtype: torch.dtype) -> Format:
    """The format that vLLM's name means for a model of some dtype.

    Raises:
        InputError: for a name that stands for none.

    >>> format_named("int4_per_token_head", torch.bfloat16).name
    'int4'
    """
    if name not in FORMATS:
        raise InputError(
            f"--kv-cache-dtype {name}: not a format of kvfold's", f"choose one of {list(FORMATS)}"
        )
    return format_of(FORMATS[name] or dtype)


class Sides(NamedTuple):
    """Where the parts of a head's page begin, in bytes, and where the last one ends."""

    keys: int
    values: int
    key_scales: int
    value_scales: int
    end: int


class PageFormat:
    """What a block holds of one KV head.

    Args:
        fmt: of keys and values. head_dim, v_head_dim: their numbers. page_size: tokens.
        packed: for the CPU kernels; otherwise one row per token.
    """

    def __init__(
        self, fmt: Format, head_dim: int, v_head_dim: int, page_size: int, packed: bool
    ) -> None:
        self.fmt, self.packed = fmt, packed
        self.keys = Layout(fmt, head_dim, page_size, packed, key=True)
        self.values = Layout(fmt, v_head_dim, page_size, packed, key=False)

    @cached_property
    def sides(self) -> Sides:
        at = [0, self.keys.page_bytes, self.values.page_bytes]
        at += [_SCALE * layout.page_scales for layout in (self.keys, self.values)]
        return Sides(*(sum(at[: i + 1]) for i in range(len(at))))

    @property
    def token_bytes(self) -> int:
        """Bytes of one token of one KV head, keys and values, with scales and padding.

        >>> from kvfold.ops.formats import format_of
        >>> PageFormat(format_of("int8"), 64, 64, 128, packed=True).token_bytes
        132
        """
        size, rest = divmod(self.sides.end, self.keys.page_size)
        if rest:
            raise InputError(f"{self.keys.page_size} tokens of {self.fmt.name} fill no whole bytes")
        return size

    def rows(self, memory: torch.Tensor) -> tuple[Rows, Rows]:
        """Keys and values in memory ``[blocks, Hkv, page_size * token_bytes]``, uint8; no copy.

        Raises:
            InputError: for memory of another size.
        """
        if memory.dtype != torch.uint8 or memory.dim() != 3 or memory.shape[2] != self.sides.end:
            raise InputError(
                f"blocks {memory.dtype} {list(memory.shape)}: expected uint8 [blocks, KV heads,"
                f" {self.sides.end}] for {self.keys.page_size} tokens of {self.fmt.name}"
            )
        at = self.sides
        keys = self._rows(memory, self.keys, at.keys, at.key_scales)
        return keys, self._rows(memory, self.values, at.values, at.value_scales)

    def _rows(self, memory: torch.Tensor, layout: Layout, data_at: int, scales_at: int) -> Rows:
        fmt, size = self.fmt, layout.page_size
        data = memory[..., data_at : data_at + layout.page_bytes]
        scales = memory[..., scales_at : scales_at + _SCALE * layout.page_scales]
        scales = scales.view(torch.bfloat16)
        if not self.packed:
            data = data.unflatten(-1, (size, -1)).view(fmt.dtype)
            scales = scales.unflatten(-1, (size, fmt.groups(layout.dim)))
        rotation = fmt.rotation(layout.dim) if layout.key else 0
        return Rows(fmt, data, scales, layout.dim, self.packed, rotation)


def memory_of(cache: torch.Tensor) -> torch.Tensor:
    """vLLM's view of a layer ``[blocks, Hkv, tokens, C]`` as uint8 ``[blocks, Hkv, bytes]``.

    Raises:
        InputError: if tokens of a head do not lie behind one another (layout LBHNC).
    """
    raw = cache.view(torch.uint8)
    blocks, heads, tokens, size = raw.shape
    if raw.stride(2) != size or raw.stride(3) != 1:
        raise InputError(f"blocks with strides {list(raw.stride())}: expected the layout LBHNC")
    return raw.as_strided((blocks, heads, tokens * size), (*raw.stride()[:2], 1))
