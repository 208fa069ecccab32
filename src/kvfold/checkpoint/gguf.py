"""GGUF in: checked by its metadata, then dequantized once into a Hugging Face folder.

transformers knows each architecture's GGUF names and permutations; kvfold does not
repeat them. The folder lets everything else stream as it does for any other source.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvfold.checkpoint.source import read_config
from kvfold.errors import CheckpointError
from kvfold.geometry import AttentionGeometry

_ALONE = "model.gguf"


@dataclass(frozen=True)
class GGUFSummary:
    """What a GGUF file's metadata says of its attention."""

    architecture: str
    geometry: AttentionGeometry
    parameters: int


def is_gguf(source: str | Path) -> bool:
    """Whether a source is an existing GGUF file."""
    path = Path(source).expanduser()
    return path.suffix.lower() == ".gguf" and path.is_file()


def summarize(path: Path) -> GGUFSummary:
    """Read the metadata of a GGUF file (no torch).

    Raises:
        CheckpointError: if the file is not GGUF, is cut short, or lacks head counts.
    """
    from kvfold.checkpoint.gguf_lists import QuickReader

    try:
        reader = QuickReader(path)
        end = max(int(tensor.data_offset + tensor.n_bytes) for tensor in reader.tensors)
    except (ValueError, OSError, IndexError, KeyError) as error:
        raise CheckpointError(
            f"{path} is not a whole GGUF file ({error})", "download it again"
        ) from error
    if end > path.stat().st_size:
        raise CheckpointError(f"{path} is truncated", "download it again")

    def value(key: str) -> int:
        field = reader.get_field(f"{architecture}.{key}")
        if field is None:
            raise CheckpointError(f"{path}: the metadata has no {architecture}.{key}")
        number = field.contents()
        return int(number[0] if isinstance(number, list) else number)

    architecture = str(reader.fields["general.architecture"].contents())
    heads, hidden = value("attention.head_count"), value("embedding_length")
    has_key_length = reader.get_field(f"{architecture}.attention.key_length") is not None
    head_dim = value("attention.key_length") if has_key_length else hidden // heads
    has_kv = reader.get_field(f"{architecture}.attention.head_count_kv") is not None
    kv_heads = value("attention.head_count_kv") if has_kv else heads
    layers = value("block_count")
    geometry = AttentionGeometry(layers, heads, kv_heads, head_dim, head_dim, hidden)
    parameters = sum(int(tensor.n_elements) for tensor in reader.tensors)
    return GGUFSummary(architecture, geometry, parameters)


def read_gguf_config(path: Path) -> dict[str, Any]:
    """The config that the metadata makes, as a folder of the same model would hold it.

    Raises:
        InputError: if transformers cannot read it.
    """
    with tempfile.TemporaryDirectory(prefix="kvfold-") as apart:
        describe(path, Path(apart), tokenizer=False)
        return read_config(Path(apart))


def describe(path: Path, folder: Path, *, tokenizer: bool) -> None:
    """Save what the metadata says: the config and, if wanted, the tokenizer, but no weights.

    Raises:
        InputError: if transformers cannot read it.
    """
    from kvfold.checkpoint.pretrained import load_gguf_config, load_gguf_tokenizer

    with _alone(path) as apart:
        load_gguf_config(apart, _ALONE).save_pretrained(folder)
        if tokenizer:
            load_gguf_tokenizer(apart, _ALONE).save_pretrained(folder)


@contextmanager
def _alone(path: Path) -> Iterator[Path]:
    """A folder with the file alone: transformers also looks at what lies beside it.

    While it is there, transformers reads lists quickly.
    """
    from kvfold.checkpoint.gguf_lists import quick_lists

    with tempfile.TemporaryDirectory(prefix="kvfold-") as apart, quick_lists():
        (Path(apart) / _ALONE).symlink_to(path.resolve())
        yield Path(apart)


def transcode(path: Path, folder: Path) -> None:
    """Dequantize ``path`` to float32 and save it as a Hugging Face folder.

    The whole model is in memory while this runs; everything after it streams.
    """
    from kvfold.checkpoint.pretrained import load_gguf

    with _alone(path) as apart:
        model, tokenizer = load_gguf(apart, _ALONE)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
