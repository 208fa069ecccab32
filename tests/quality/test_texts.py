"""Text files that are given: whatever is wrong is told in one line, and nothing is waited for."""

import os
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfold.errors import InputError
from kvfold.quality.text import LARGEST_TEXT, read_texts
from tests.conftest import Kvfold


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """Files that hold no text, by what they are."""
    os.mkfifo(tmp_path / "FIFO")
    (tmp_path / "folder").mkdir()
    (tmp_path / "device").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
    with (tmp_path / "large").open("wb") as file:
        file.truncate(LARGEST_TEXT + 1)  # a hole that takes no space
    (tmp_path / "UTF-8").write_bytes(b"abc\xff" * 10_000)
    return tmp_path


KINDS = ("FIFO", "folder", "device", "socket", "large", "UTF-8")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_text_is_told(odd: Path, kind: str) -> None:
    with pytest.raises(InputError, match=kind) as error:
        read_texts([odd / kind], 1)
    assert str(odd / kind) in error.value.message
    assert error.value.hint
    assert "\n" not in error.value.message


@pytest.mark.parametrize("kind", KINDS)
def test_commands_tell_it_too(kvfold: Kvfold, odd: Path, llama_folder: Path, kind: str) -> None:
    out, path = odd / "out", odd / kind
    for command in (
        ("convert", llama_folder, out, "--kv-heads", 2, "--calibration", path),
        ("eval", llama_folder, "--text", path),
        ("look", llama_folder, "--file", path, "--png", out),
        ("heal", llama_folder, out, "--teacher", llama_folder, "--text", path),
    ):
        if kind == "folder" and command[0] == "heal":
            continue  # a folder of datasets.save_to_disk
        run = kvfold(*command)
        assert run.code == 2, (command, run.err)
        assert kind in run.err
        assert "hint: " in run.err
        assert not out.exists()


@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_texts_are_read_as_python_reads_them(
    text: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.txt"
    path.write_bytes(text.encode())
    assert read_texts([path], 1) == path.read_text(encoding="utf-8")


def test_files_without_a_size_are_read() -> None:
    """/proc says 0 bytes of each of its files."""
    assert "Linux" in read_texts(["/proc/version"], 1)
