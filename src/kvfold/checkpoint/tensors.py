"""Safetensors, one tensor at a time.

The safetensors package saves a shard from a dictionary that holds all of it, and
maps whole files into memory when reading. Folding streams instead: headers are
parsed without torch, tensors are read and written one by one, and the peak is one
tensor rather than one shard. Format: https://huggingface.co/docs/safetensors
(8-byte little-endian header length, JSON header, data without holes).
"""

import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from kvfold.checkpoint.schemas import ENTRIES, HEADER, HeaderEntry
from kvfold.documents import open_regular, shortened
from kvfold.errors import CheckpointError
from kvfold.files import whole_file

if TYPE_CHECKING:
    import torch

DTYPE_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
}
# What the format knows besides, and kvfold only counts; None where values share bytes.
_OTHER_BYTES: dict[str, int | None] = {
    "U64": 8, "U32": 4, "U16": 2, "C64": 8, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "F4": None, "F6_E2M3": None, "F6_E3M2": None,
}  # fmt: skip
TORCH_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
FLOATING = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: its safetensors dtype name, shape, file and byte range."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


class TensorSource(Protocol):
    """Named tensors that are loaded when asked for."""

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> str: ...

    def tensor(self, name: str) -> "torch.Tensor": ...


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Parse the header of one safetensors file.

    Raises:
        CheckpointError: naming the file, if it is missing, truncated or not safetensors.
    """
    if not path.exists():
        raise CheckpointError(f"shard {path.name} is missing from {path.parent}", HEADER.hint)
    with open_regular(path, HEADER.hint) as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(HEADER.largest, max(size - 8, 0)):
            raise CheckpointError(
                f"{path} is not a whole safetensors file ({size} bytes)", HEADER.hint
            )
        text = file.read(length)
    what = f"the header of {path}"
    header = HEADER.parse(text, what)
    header.pop("__metadata__", None)
    found = ENTRIES.check(header, what)
    entries = {name: _entry(name, info, path, 8 + length) for name, info in found.items()}
    _check_layout(entries, path, 8 + length, size)
    return entries


def _entry(name: str, info: HeaderEntry, path: Path, data_start: int) -> TensorEntry:
    dtype, shape, (start, stop) = info["dtype"], info["shape"], info["data_offsets"]
    if dtype not in DTYPE_BYTES and dtype not in _OTHER_BYTES:
        raise CheckpointError(
            f"{path}: {name} has the unknown dtype {shortened(dtype)}; expected one of "
            f"{', '.join(DTYPE_BYTES)}",
            HEADER.hint,
        )
    entry = TensorEntry(name, dtype, tuple(shape), path, data_start + start, data_start + stop)
    each = DTYPE_BYTES.get(dtype) or _OTHER_BYTES[dtype]
    if each is not None and entry.nbytes != each * prod(entry.shape):
        raise CheckpointError(
            f"{path}: {name} has {entry.nbytes} bytes; its shape {shape} in {dtype} needs "
            f"{each * prod(shape)}",
            HEADER.hint,
        )
    return entry


def _check_layout(entries: dict[str, TensorEntry], path: Path, data_start: int, size: int) -> None:
    """Tensors fill the rest of the file, each beginning where another ends."""
    end = data_start
    for entry in sorted(entries.values(), key=lambda each: (each.start, each.stop)):
        if entry.start != end or entry.stop < entry.start:
            raise CheckpointError(
                f"{path}: {entry.name} lies at bytes {entry.start} to {entry.stop}; expected it "
                f"to begin at {end}, where the tensor before it ends",
                HEADER.hint,
            )
        end = entry.stop
    if end != size:
        state = "truncated" if size < end else "too long"
        raise CheckpointError(
            f"{path} is {state}: {size} bytes, its header needs {end}", HEADER.hint
        )


def torch_dtype(name: str) -> "torch.dtype":
    """The torch dtype of a safetensors dtype name.

    Raises:
        CheckpointError: for a dtype that kvfold only counts.
    """
    import torch

    if name not in TORCH_NAMES:
        raise CheckpointError(
            f"the dtype {shortened(name)} cannot be read; expected one of {', '.join(TORCH_NAMES)}",
            "save the checkpoint again from transformers, in one of these",
        )
    dtype: torch.dtype = getattr(torch, TORCH_NAMES[name])
    return dtype


def dtype_name(dtype: "torch.dtype") -> str:
    """The safetensors name of a torch dtype, for instance ``BF16``."""
    wanted = str(dtype).removeprefix("torch.")
    return next(name for name, torch_name in TORCH_NAMES.items() if torch_name == wanted)


def read_tensor(entry: TensorEntry) -> "torch.Tensor":
    """Read one tensor into memory of its own (no mapping of the file is kept)."""
    import torch

    dtype = torch_dtype(entry.dtype)
    raw = torch.empty(entry.nbytes, dtype=torch.uint8)
    with open_regular(entry.file, HEADER.hint) as file:
        file.seek(entry.start)
        view, done = raw.numpy().data, 0
        while done < entry.nbytes:
            count = file.readinto(view[done:])
            if not count:
                raise CheckpointError(f"{entry.file} ended inside {entry.name}", HEADER.hint)
            done += count
    return raw.view(dtype).reshape(entry.shape)


@dataclass(frozen=True)
class TensorFiles:
    """The tensors of safetensors files: a :class:`TensorSource` that reads from disk."""

    entries: dict[str, TensorEntry] = field(repr=False)

    def names(self) -> list[str]:
        return list(self.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entries[name].shape

    def dtype(self, name: str) -> str:
        return self.entries[name].dtype

    def tensor(self, name: str) -> "torch.Tensor":
        return read_tensor(self.entries[name])

    @property
    def files(self) -> list[Path]:
        """The shard files that hold them, in order."""
        return sorted({entry.file for entry in self.entries.values()})

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries.values())


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written: name, safetensors dtype name, shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return DTYPE_BYTES[self.dtype] * prod(self.shape)


def write_tensors(path: Path, specs: list[TensorSpec], tensors: Iterator["torch.Tensor"]) -> None:
    """Write ``tensors`` in the order of ``specs``, holding one at a time.

    The file appears under its name only when it is whole.
    """
    import torch

    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        header[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data starts on a multiple of 8, as the format asks
    with whole_file(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for spec, tensor in zip(specs, tensors, strict=True):
            if tuple(tensor.shape) != spec.shape or dtype_name(tensor.dtype) != spec.dtype:
                raise CheckpointError(
                    f"{spec.name}: expected {spec.dtype} {list(spec.shape)}, "
                    f"got {dtype_name(tensor.dtype)} {list(tensor.shape)}",
                    "what an interrupted run left is damaged; --force starts over",
                )
            flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
            file.write(flat.numpy().data)
