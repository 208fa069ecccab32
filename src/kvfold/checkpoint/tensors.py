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
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from kvfold.errors import CheckpointError

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
_LARGEST_HEADER = 100_000_000  # the limit of the safetensors package


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
    again = "download or copy that file again"
    if not path.is_file():
        raise CheckpointError(f"shard {path.name} is missing from {path.parent}", again)
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(_LARGEST_HEADER, max(size - 8, 0)):
            raise CheckpointError(f"{path} is not a whole safetensors file ({size} bytes)", again)
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise CheckpointError(f"{path} has a corrupt safetensors header", again) from error
    entries = {}
    for name, info in header.items():
        if name == "__metadata__":
            continue
        entries[name] = _entry(name, info, path, 8 + length)
    end = max((entry.stop for entry in entries.values()), default=8 + length)
    if end != size:
        state = "truncated" if size < end else "too long"
        raise CheckpointError(f"{path} is {state}: {size} bytes, its header needs {end}", again)
    return entries


def _entry(name: str, info: dict[str, Any], path: Path, data_start: int) -> TensorEntry:
    try:
        dtype, shape, (start, stop) = info["dtype"], info["shape"], info["data_offsets"]
        entry = TensorEntry(
            name, str(dtype), tuple(shape), path, data_start + start, data_start + stop
        )
        expected = DTYPE_BYTES.get(entry.dtype)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the header entry of {name} is corrupt") from error
    if expected is not None and entry.nbytes != expected * prod(entry.shape):
        raise CheckpointError(f"{path}: {name} has {entry.nbytes} bytes, not those of its shape")
    return entry


def torch_dtype(name: str) -> "torch.dtype":
    """The torch dtype of a safetensors dtype name; KeyError-free by header checks."""
    import torch

    dtype = getattr(torch, TORCH_NAMES[name])
    assert isinstance(dtype, torch.dtype)
    return dtype


def dtype_name(dtype: "torch.dtype") -> str:
    """The safetensors name of a torch dtype, for instance ``BF16``."""
    wanted = str(dtype).removeprefix("torch.")
    return next(name for name, torch_name in TORCH_NAMES.items() if torch_name == wanted)


def read_tensor(entry: TensorEntry) -> "torch.Tensor":
    """Read one tensor into memory of its own (no mapping of the file is kept)."""
    import torch

    if entry.dtype not in TORCH_NAMES:
        raise CheckpointError(f"{entry.name} has the unknown dtype {entry.dtype}")
    raw = torch.empty(entry.nbytes, dtype=torch.uint8)
    with entry.file.open("rb", buffering=0) as file:
        file.seek(entry.start)
        view, done = raw.numpy().data, 0
        while done < entry.nbytes:
            count = file.readinto(view[done:])
            if not count:
                raise CheckpointError(f"{entry.file} ended inside {entry.name}")
            done += count
    return raw.view(torch_dtype(entry.dtype)).reshape(entry.shape)


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

    The file appears under its name only when it is whole: it is written beside
    itself, flushed to disk, then renamed.
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
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for spec, tensor in zip(specs, tensors, strict=True):
            if tuple(tensor.shape) != spec.shape or dtype_name(tensor.dtype) != spec.dtype:
                raise AssertionError(f"{spec} was planned, got {tensor.dtype} {tensor.shape}")
            flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
            file.write(flat.numpy().data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
