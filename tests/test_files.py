"""The one writer: whole or not at all, never through a link or a device, never a file too many."""

import errno
import json
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfold.errors import InputError
from kvfold.files import (
    WriteError,
    append_text,
    check_file,
    is_temporary,
    whole_file,
    write_json,
    write_text,
)
from tests.toolbox.in_the_way import KINDS, in_the_way, largest_file


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "write",
    [check_file, lambda path: write_text(path, "x"), lambda path: append_text(path, "x")],
    ids=["check", "write", "append"],
)
def test_only_files_are_written(write: Callable[..., None], kind: str, tmp_path: Path) -> None:
    """Nothing else is replaced, opened, followed or waited for."""
    target = in_the_way(tmp_path, kind)
    before = target.lstat(), sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match="cannot be written: it is a") as error:
        write(target)
    assert error.value.hint
    assert (target.lstat()[:6], sorted(tmp_path.iterdir())) == (before[0][:6], before[1])
    if kind == "link to a file":
        assert (tmp_path / "aside").read_text() == "precious"
    assert not (kind == "dangling link" and (tmp_path / "aside").exists())


def test_a_file_takes_its_name_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with whole_file(path) as file:
        file.write(b"half")
        file.flush()
        assert not path.exists()
        beside = list(tmp_path.iterdir())
        assert [is_temporary(each) for each in beside] == [True]
        file.write(b" and half")
    assert path.read_bytes() == b"half and half"
    assert list(tmp_path.iterdir()) == [path]


def test_names_on_the_way_cannot_be_guessed(tmp_path: Path) -> None:
    names = set()
    for _ in range(8):
        with whole_file(tmp_path / "file"):
            names |= {each.name for each in tmp_path.iterdir() if is_temporary(each)}
    assert len(names) == 8


def test_files_have_ordinary_permissions(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "file", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, OSError])
def test_a_failure_leaves_what_was_there(failure: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("older")

    def write() -> None:
        with whole_file(path) as file:
            file.write(b"newer")
            raise failure

    with pytest.raises(failure):
        write()
    assert path.read_text() == "older"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("append", [False, True])
@pytest.mark.parametrize("size", [1, 100_000, 3_000_000])
def test_a_full_disk_leaves_what_was_there(append: bool, size: int, tmp_path: Path) -> None:
    """Whether it fills up in a write, in the last flush or in the middle of a line."""
    path = tmp_path / "file"
    path.write_text("older\n")
    text = "x" * (size + 10)
    with largest_file(size + 6), pytest.raises(WriteError, match="disk is full") as error:
        (append_text if append else write_text)(path, text)
    assert (error.value.exit_code, bool(error.value.hint)) == (1, True)
    assert path.read_text() == "older\n"
    assert list(tmp_path.iterdir()) == [path]


def test_without_force_nothing_is_replaced_even_late(tmp_path: Path) -> None:
    """Somebody else may make the file while ours is being filled."""
    path = tmp_path / "file"

    def write() -> None:
        with whole_file(path, force=False) as file:
            file.write(b"ours")
            path.write_text("theirs")

    with pytest.raises(InputError, match="exists already"):
        write()
    assert path.read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(InputError, match="exists already"):
        check_file(path)
    write_text(path, "ours", force=True)
    assert path.read_text() == "ours"


@pytest.mark.parametrize(
    "name", ["", "..", "nowhere/file", "file/below", "n" * 300, "null\0byte", "n" * 255]
)
def test_names_that_cannot_be_are_told_at_once(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    if name == "n" * 255:  # the longest name there can be
        write_text(tmp_path / name, "x")
        return
    with pytest.raises(InputError) as error:
        check_file(tmp_path / name)
    assert error.value.hint


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_a_folder_of_others_is_refused(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from kvfold.files import check_file\n"
        "os.setuid(65534)\n"
        "try: check_file(Path('/etc/kvfold-test'))\n"
        "except Exception as error: print(type(error).__name__, error, error.hint)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("InputError /etc/kvfold-test cannot be written: permission denied")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_every_reason_is_words(number: int, tmp_path: Path) -> None:
    def fail(*arguments: object) -> int:
        raise OSError(number, os.strerror(number))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", fail)
        with pytest.raises(WriteError, match="cannot be written") as error:
            write_text(tmp_path / "file", "x")
    assert error.value.errno == number


@given(st.text(), st.sampled_from([None, "\udc80", "é\udcff"]))
def test_json_reads_back_whatever_names_are_in_it(text: str, odd: str | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        value = {"name": text.encode("utf-8", "ignore").decode() + (odd or "")}
        write_json(Path(folder) / "file.json", value)
        assert json.loads((Path(folder) / "file.json").read_bytes()) == value


def test_appending_adds(tmp_path: Path) -> None:
    for line in ("a\n", "b\n"):
        append_text(tmp_path / "file", line)
    assert (tmp_path / "file").read_text() == "a\nb\n"
