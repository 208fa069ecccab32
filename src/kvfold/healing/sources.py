"""Where training text comes from: documents of text files, JSONL, Parquet and datasets. No torch.

A source is written ``NAME`` or ``NAME=WEIGHT``. NAME is a ``.jsonl`` or ``.parquet`` file (the
column ``text``), any other file (plain UTF-8 text), a folder of ``datasets.save_to_disk``, or
the name of a dataset on the hub (``org/name`` or ``org/name:config``).
"""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from kvfold.documents import MEGABYTE, Document
from kvfold.errors import InputError, RunError
from kvfold.numbers import SHARE

COLUMN = "text"
_LINES: Document[dict[str, Any]] = Document(
    dict[str, Any], "expected one JSON object per line", largest=64 * MEGABYTE, error=InputError
)
_PIECES = 64  # a long text is cut into about so many, to be shuffled and held out
_LEAST_PIECE, _LARGEST_PIECE = 2_000, 32_000  # characters
_SHUFFLE_BUFFER = 1_000


@dataclass(frozen=True)
class TextSource:
    """A source of documents and its share of the training sequences."""

    name: str
    weight: float = 1.0


def parse_source(words: str) -> TextSource:
    """``NAME`` or ``NAME=WEIGHT``.

    Raises:
        InputError: for a weight that is not above zero.

    >>> parse_source("code.jsonl=0.5")
    TextSource(name='code.jsonl', weight=0.5)
    """
    name, found, last = words.rpartition("=")
    if not found or Path(words).expanduser().exists():
        return TextSource(words)
    try:
        float(last)
    except ValueError:
        return TextSource(words)
    return TextSource(name, SHARE.read(last, f"the weight of --text {name}:"))


def text_words(source: TextSource) -> str:
    """The words that name a source; the inverse of :func:`parse_source`."""
    plain = source.weight == 1.0 and "=" not in source.name
    return source.name if plain else f"{source.name}={source.weight!r}"


class Corpus(Protocol):
    """Documents in an order that is the same each time."""

    def documents(self, epoch: int, start: int = 0) -> Iterator[str]:
        """The documents of an epoch from number ``start`` on; epoch 0 is not shuffled."""


def check_source(source: TextSource) -> None:
    """Refuse what cannot be read, as far as that is known without reading it all.

    Raises:
        InputError: naming the file.
    """
    path = Path(source.name).expanduser()
    there = path.exists() and not path.is_dir()  # a FIFO or a device is refused by name
    if there and path.suffix == ".jsonl":
        next(_json_documents(path), None)
    elif there and not (path.suffix == ".parquet" and path.is_file()):
        _read_text(path)
    else:
        _datasets()
        if not path.exists() and source.name.count("/") != 1:
            raise InputError(
                f"no such text: {source.name}",
                "give a text, .jsonl or .parquet file, or a dataset's name like org/name",
            )


def open_corpus(source: TextSource, seed: int) -> Corpus:
    """The documents of a source.

    Raises:
        InputError: if it cannot be read.
    """
    path = Path(source.name).expanduser()
    if path.is_file() and path.suffix == ".jsonl":
        return _InMemory(list(_json_documents(path)), seed)
    if path.is_file() and path.suffix != ".parquet":
        return _InMemory(pieces(_read_text(path)), seed)
    return _FromDatasets(_load_dataset(source.name, path), source.name, seed)


def pieces(text: str) -> list[str]:
    """Cut a long text between paragraphs, so that it can be shuffled and partly held out."""
    size = min(max(len(text) // _PIECES, _LEAST_PIECE), _LARGEST_PIECE)
    result, held, length = [], [], 0
    for paragraph in text.split("\n\n"):
        held.append(paragraph)
        length += len(paragraph) + 2
        if length >= size:
            result.append("\n\n".join(held))
            held, length = [], 0
    if held:
        result.append("\n\n".join(held))
    return [piece for piece in result if piece.strip()]


def fingerprint(document: str) -> bytes:
    """Tells documents apart, and finds those that occur twice."""
    return hashlib.blake2b(document.encode(), digest_size=16).digest()


@dataclass(frozen=True)
class _InMemory:
    """Local text: shuffled anew in every epoch after the first."""

    texts: list[str]
    seed: int

    def documents(self, epoch: int, start: int = 0) -> Iterator[str]:
        order = list(range(len(self.texts)))
        if epoch:
            random.Random(f"{self.seed}/{epoch}").shuffle(order)
        return (self.texts[index] for index in order[start:])


@dataclass(frozen=True)
class _FromDatasets:
    """A dataset that is read as a stream, through a shuffling buffer."""

    dataset: Any
    name: str
    seed: int

    def documents(self, epoch: int, start: int = 0) -> Iterator[str]:
        stream = self.dataset
        if epoch:
            stream = stream.shuffle(seed=self.seed + epoch, buffer_size=_SHUFFLE_BUFFER)
        for row in stream.skip(start):
            yield _text_of(row, self.name)


def _text_of(row: Any, name: str) -> str:
    text = row.get(COLUMN) if isinstance(row, dict) else None
    if not isinstance(text, str):
        columns = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise InputError(
            f"{name} has no column {COLUMN!r} of strings; it has: {columns}",
            f"rename the column that holds the text to {COLUMN!r}",
        )
    return text


def _json_documents(path: Path) -> Iterator[str]:
    for number, row in _LINES.lines(path):
        yield _text_of(row, f"{path} line {number}")


def _read_text(path: Path) -> str:
    from kvfold.quality.text import read_texts

    return read_texts([path], least_tokens=1)


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            "Parquet files and datasets need the datasets library, which is not installed",
            "pip install 'kvfold[heal]', or give .txt or .jsonl files",
        ) from error
    return datasets


def _load_dataset(name: str, path: Path) -> Any:
    datasets = _datasets()
    try:
        if path.is_file():
            return datasets.load_dataset(
                "parquet",
                data_files=str(path),
                split="train",
                streaming=True,
                trust_remote_code=False,
            )
        if path.is_dir():
            return datasets.load_from_disk(str(path)).to_iterable_dataset()
        bare, _, config = name.partition(":")
        return datasets.load_dataset(
            bare, config or None, split="train", streaming=True, trust_remote_code=False
        )
    except (OSError, ValueError, RuntimeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RunError(
            f"the dataset {name} cannot be opened ({first[:160]})",
            "check the name and the network, or give a local file",
        ) from error
