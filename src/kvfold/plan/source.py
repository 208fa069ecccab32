"""Reading a model's sizes from a folder or the hub without its weights: configs and headers."""

from math import prod
from pathlib import Path
from typing import Any

from kvfold.arch.config import CONFIG
from kvfold.arguments import source as source_name
from kvfold.checkpoint.gguf import is_gguf, summarize
from kvfold.checkpoint.language import language_config
from kvfold.checkpoint.schemas import INDEX_FILE
from kvfold.checkpoint.source import INDEX, SINGLE, peek_config, resolve
from kvfold.checkpoint.tensors import read_header
from kvfold.documents import file_within
from kvfold.errors import InputError, KVFoldError
from kvfold.plan.model import Model, read_model


def open_model(source: str | Path) -> Model:
    """The model of a folder (with or without weights), a ``config.json``, or a hub name.

    Of a hub model only the config and the headers of its safetensors files are fetched.

    Raises:
        InputError: if there is no such thing.
    """
    source = source_name(source, "SRC")
    path = Path(source).expanduser()
    if is_gguf(source):
        found = summarize(path)
        raise InputError(
            f"{path} is a GGUF file of {found.parameters:,} parameters; plan reads configs",
            "give the original model's folder or its config.json",
        )
    config = read_config(source)
    if path.is_file():
        return read_model(config, path.parent.name or path.name)
    if path.is_dir():
        return read_model(config, path.name, *_weights(resolve(source)))
    return read_model(config, str(source), *_hub_weights(str(source)))


def read_config(source: str | Path) -> dict[str, Any]:
    """The ``config.json`` of what ``open_model`` opens: of its language model, if that is a part.

    Raises:
        InputError: if there is no such thing.
    """
    path = Path(source).expanduser()
    if path.is_file() and path.suffix == ".json":
        return language_config(CONFIG.read(path))
    return language_config(peek_config(source))


def _weights(folder: Path) -> tuple[int | None, int | None]:
    """Count and bytes of the weights in a folder's headers; None where there are none."""
    index = folder / INDEX
    if index.exists():
        names = sorted(set(INDEX_FILE.read(index)["weight_map"].values()))
        files = [file_within(folder, name, str(index)) for name in names]
    else:
        files = [folder / SINGLE]
    if not all(file.is_file() for file in files):
        return None, None
    entries = [entry for file in files for entry in read_header(file).values()]
    return sum(prod(e.shape) for e in entries), sum(e.nbytes for e in entries)


def _hub_weights(name: str) -> tuple[int | None, int | None]:
    """The same of a hub model, by range requests; None if it has no safetensors."""
    try:
        from huggingface_hub import get_safetensors_metadata

        found = get_safetensors_metadata(name)
    except KVFoldError:
        raise
    except Exception:  # offline with only the config cached, pickled weights …: sizes will do
        return None, None
    count = sum(found.parameter_count.values())
    sizes = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1}
    nbytes = sum(sizes.get(kind, 2) * number for kind, number in found.parameter_count.items())
    return count, nbytes
