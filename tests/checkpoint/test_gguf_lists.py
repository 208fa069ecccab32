"""The quick reader of GGUF files finds what gguf's own finds, and refuses what it refuses."""

import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from kvfold.checkpoint.gguf_lists import QuickReader, quick_lists

LISTS: dict[str, list[Any]] = {
    "words": ["", "a", "\N{GREEK SMALL LETTER ALPHA} b", "c" * 300],
    "numbers": [1, -2, 3],
    "scores": [0.5, -1.25],
    "kinds": [True, False],
    "one": ["alone"],
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "model.gguf", LISTS)


def write(path: Path, lists: dict[str, list[Any]]) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for name, values in lists.items():
        writer.add_array(name, values)
    writer.add_string("last", "what follows the lists")
    writer.add_tensor("weight", np.arange(6, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_same_fields(file: Path) -> None:
    own, quick = gguf.GGUFReader(file), QuickReader(file)
    assert list(own.fields) == list(quick.fields)
    for name, field in own.fields.items():
        other = quick.fields[name]
        assert (other.offset, other.data, other.types) == (field.offset, field.data, field.types)
        assert other.contents() == field.contents()
        assert [p.tobytes() for p in other.parts] == [p.tobytes() for p in field.parts]
    assert quick.data_offset == own.data_offset
    np.testing.assert_array_equal(quick.tensors[0].data, own.tensors[0].data)
    for name, values in LISTS.items():
        assert quick.fields[name].contents() == values


@pytest.mark.parametrize("words", [10, 60, 90, 130, 250])
def test_files_that_were_cut(file: Path, words: int) -> None:
    file.write_bytes(file.read_bytes()[:words])
    for reader in (gguf.GGUFReader, QuickReader):
        with pytest.raises((ValueError, IndexError, KeyError)):
            reader(file)


def test_a_count_that_lies(file: Path) -> None:
    """As many words as 2**60 are not looked for beyond the end."""
    raw = file.read_bytes()
    at = raw.index(b"words") + 5 + 4 + 4
    assert int.from_bytes(raw[at : at + 8], "little") == len(LISTS["words"])
    file.write_bytes(raw[:at] + (1 << 60).to_bytes(8, "little") + raw[at + 8 :])
    began = time.monotonic()
    with pytest.raises((ValueError, IndexError, KeyError)):
        QuickReader(file)
    assert time.monotonic() - began < 10


def test_only_for_a_while() -> None:
    own = gguf.GGUFReader
    with quick_lists():
        assert gguf.GGUFReader is QuickReader
    assert gguf.GGUFReader is own
