"""Reading the index of a training checkpoint without trusting it.

``torch.distributed.checkpoint`` pickles its index (``.metadata``), and a pickle may call
anything. Here it is read by an unpickler that knows the few classes such an index is made of, and
what comes out is checked: tensors only (anything else would be unpickled later on), in files of
the checkpoint's own folder.
"""

import io
import pickle
import pickletools
import re
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)

from kvfold.documents import MEGABYTE, open_regular, read_bytes
from kvfold.errors import CheckpointError

HINT = "remove it to resume from the one before"
_LARGEST = 256 * MEGABYTE
_DATA_FILE = re.compile(r"__\d+_\d+\.distcp")
_ROOM = "torch.distributed.checkpoint"
# Plain data, all of them: making one calls nothing else.
_KNOWN = {
    (f"{_ROOM}.metadata", "Metadata"),
    (f"{_ROOM}.metadata", "MetadataIndex"),
    (f"{_ROOM}.metadata", "StorageMeta"),
    (f"{_ROOM}.metadata", "TensorStorageMetadata"),
    (f"{_ROOM}.metadata", "ChunkStorageMetadata"),
    (f"{_ROOM}.metadata", "TensorProperties"),
    (f"{_ROOM}.metadata", "_MEM_FORMAT_ENCODING"),
    (f"{_ROOM}.filesystem", "_StorageInfo"),
    ("pathlib", "PosixPath"),  # where the checkpoint was written
    ("pathlib._local", "PosixPath"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    *(("torch", str(d).removeprefix("torch.")) for d in vars(torch).values()
      if isinstance(d, torch.dtype)),
}  # fmt: skip


# What pickling such data needs. Others can ask for memory without end (PUT, BYTEARRAY8).
_OPERATIONS = {
    "PROTO", "FRAME", "STOP", "MARK", "MEMOIZE", "BINGET", "LONG_BINGET",
    "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT",
    "SHORT_BINUNICODE", "BINUNICODE", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3",
    "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS",
    "STACK_GLOBAL", "NEWOBJ", "REDUCE", "BUILD",
}  # fmt: skip


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"{module}.{name} is no part of a checkpoint's index")
        return super().find_class(module, name)


def read_index(folder: Path) -> Metadata:
    """The index of the checkpoint in ``folder``.

    Raises:
        CheckpointError: if it is damaged, or holds anything but tensors of its own files.
    """
    path = folder / ".metadata"
    data = read_bytes(path, _LARGEST, HINT)
    try:
        strange = {operation.name for operation, _, _ in pickletools.genops(data)} - _OPERATIONS
        if strange:
            raise pickle.UnpicklingError(f"{min(strange)} is no part of a checkpoint's index")
        index = _Unpickler(io.BytesIO(data)).load()
    except Exception as error:  # a damaged pickle may raise anything
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path} is damaged ({first[:160]})", HINT) from error
    if not _is_sound(index, folder):
        raise CheckpointError(f"{path} is not the index of a checkpoint of tensors", HINT)
    for name in {place.relative_path for place in index.storage_data.values()}:
        open_regular(folder / name, HINT).close()
    return index


def _is_sound(index: Any, folder: Path) -> bool:
    tensors, places = getattr(index, "state_dict_metadata", None), getattr(index, "storage_data", 0)
    if not (isinstance(index, Metadata) and isinstance(tensors, dict) and isinstance(places, dict)):
        return False
    return all(
        isinstance(name, str) and isinstance(tensor, TensorStorageMetadata)
        for name, tensor in tensors.items()
    ) and all(
        isinstance(key, MetadataIndex) and key.fqn in tensors and _is_place(place, folder)
        for key, place in places.items()
    )


def _is_place(place: Any, folder: Path) -> bool:
    """Whether bytes of a data file that lies here, stored as they are."""
    name = getattr(place, "relative_path", None)
    offset, length = getattr(place, "offset", None), getattr(place, "length", None)
    return (
        isinstance(name, str)
        and _DATA_FILE.fullmatch(name) is not None
        and not (folder / name).is_symlink()
        and type(offset) is int
        and type(length) is int
        and offset >= 0
        and length >= 0
        and not getattr(place, "transform_descriptors", None)
    )


class Reader(FileSystemReader):
    """PyTorch's reader of checkpoints, with an index that was read as above.

    Tensors themselves it reads by ``torch.load(weights_only=True)``.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self._folder = folder

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        index = read_index(self._folder)
        index.storage_meta = StorageMeta()
        index.storage_meta.load_id = self.load_id
        return index
