"""The one writer of files: whole or not at all, and never through anything that is not a file.

A file is made beside its target under a name that nobody can guess, and takes its name when it
is whole. What is in the way and is no regular file (a link, a device, a folder) is left alone.
No torch.
"""

import errno
import json
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from kvfold.errors import InputError, RunError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_HINTS = {
    **dict.fromkeys(FULL, "free some space or write to another disk"),
    errno.EACCES: "choose a folder that you may write to",
    errno.EPERM: "choose a folder that you may write to",
    errno.EROFS: "this file system is read-only; choose another",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOENT: "name a file in a folder that exists",
    errno.ENOTDIR: "name a file in a folder that exists",
}
_FROM_RUST = re.compile(r"\(os error (\d+)\)")
_TEMPORARY = re.compile(r"\..*\.kvfold-[0-9a-f]{16}", re.DOTALL)  # a file that is being made
_OWN = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class WriteError(RunError):
    """A file could not be written (exit code 1).

    Attributes:
        errno: the system's reason.
    """

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(*_words(path, error))
        self.errno = error.errno


def _words(path: Path, error: OSError) -> tuple[str, str]:
    """What went wrong, and what to do about it."""
    why = "the disk is full" if error.errno in FULL else (error.strerror or str(error)).lower()
    return f"{path} cannot be written: {why}", _HINTS.get(error.errno or 0, "is the disk in order?")


def of_full_disk(error: BaseException | None) -> OSError | None:
    """The system's complaint of a full disk that led to an error, however it was wrapped."""
    while error is not None:
        told = _FROM_RUST.search(str(error))  # safetensors and tokenizers
        number = int(told[1]) if told else getattr(error, "errno", None)
        if number in FULL:
            return OSError(number, os.strerror(number))
        error = error.__cause__ or error.__context__
    return None


def check_file(path: Path, *, force: bool = False) -> None:
    """Refuse a file that cannot be written, before the work that fills it.

    Args:
        force: whether a regular file of that name may be replaced.

    Raises:
        InputError: saying what is in the way.
    """
    try:
        _check_folder(path)
        found = path.lstat()
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise InputError(*_words(path, _os_error(error))) from error
    if not stat.S_ISREG(found.st_mode):
        raise InputError(
            f"{path} cannot be written: it is {_kind(path, found.st_mode)}, and only files are "
            "replaced",
            "choose another name",
        )
    if not force:
        raise InputError(f"{path} exists already", "choose another name, or --force to replace it")


def _check_folder(path: Path) -> None:
    parent = path.parent
    if path.name in ("", ".."):
        raise OSError(errno.EISDIR, "it is a folder")
    if not parent.is_dir():
        raise OSError(errno.ENOTDIR, f"there is no folder {parent}")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))


def _os_error(error: OSError | ValueError) -> OSError:
    return error if isinstance(error, OSError) else OSError(errno.EINVAL, str(error))


def _kind(path: Path, mode: int) -> str:
    if stat.S_ISLNK(mode):
        return f"a link to {path.readlink()}"
    if stat.S_ISDIR(mode):
        return "a folder"
    return "a pipe" if stat.S_ISFIFO(mode) else "a device"


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name[:16]}.kvfold-{secrets.token_hex(8)}")


def is_temporary(path: Path) -> bool:
    """Whether ``path`` is named as a file that was being made when its run was killed."""
    return _TEMPORARY.fullmatch(path.name) is not None


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn the system's complaint about ``path`` into words."""
    try:
        yield
    except OSError as error:
        raise WriteError(path, error) from error


@contextmanager
def whole_file(path: Path, *, force: bool = True) -> Iterator[IO[bytes]]:
    """A file that takes its name when the block ends well, and else leaves nothing.

    Args:
        force: whether a regular file of that name is replaced.

    Raises:
        InputError: if something is in the way. WriteError: if the disk is full, or the like.
    """
    check_file(path, force=force)
    temporary = _temporary(path)
    with write_errors(path):
        file = os.fdopen(os.open(temporary, _NEW, 0o666), "wb")
    try:
        try:
            yield file
        except OSError as error:  # of the block's own, but for a full disk
            if error.errno in FULL:
                raise WriteError(path, error) from error
            raise
        with write_errors(path):
            file.flush()
            os.fsync(file.fileno())
            file.close()
            _publish(temporary, path, force)
    except BaseException:
        with suppress(OSError):  # what is left in the buffer cannot be written either
            file.close()
        with suppress(OSError):
            temporary.unlink()
        raise


def _publish(temporary: Path, path: Path, force: bool) -> None:
    if not force:  # a link, unlike a rename, never replaces anything
        try:
            os.link(temporary, path)
        except OSError as error:
            check_file(path)
            if error.errno == errno.EEXIST:
                raise
        else:
            temporary.unlink()
            return
    temporary.replace(path)  # a file system without hard links, or with force


def write_bytes(path: Path, data: bytes, *, force: bool = True) -> None:
    """Write a whole file; see :func:`whole_file`."""
    with whole_file(path, force=force) as file:
        file.write(data)


def write_text(path: Path, text: str, *, force: bool = True) -> None:
    """Write a whole file of UTF-8; see :func:`whole_file`.

    What UTF-8 cannot hold (parts of file names that are not text) is written as JSON and
    Python write it, ``\\udc80``.
    """
    write_bytes(path, text.encode("utf-8", "backslashreplace"), force=force)


def write_json(path: Path, value: Any, *, force: bool = True) -> None:
    """Write JSON for people to read too; see :func:`whole_file`."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n", force=force)


def copy_file(source: Path, path: Path) -> None:
    """Copy the content of a regular file to a whole file."""
    with source.open("rb") as opened, whole_file(path) as file:
        while block := opened.read(1 << 20):
            file.write(block)


def reserve(path: Path, size: int) -> None:
    """Make or take a file with ``size`` bytes of disk to it, to be mapped into memory.

    Writing to a mapped file on a full disk would end the process (SIGBUS).
    """
    with write_errors(path):
        opened = os.open(path, _OWN, 0o666)
        try:
            if hasattr(os, "posix_fallocate"):  # not on macOS
                os.posix_fallocate(opened, 0, size)
            else:
                os.truncate(opened, size)
        finally:
            os.close(opened)


def append_text(path: Path, text: str) -> None:
    """Add to a regular file, or make it; a failure leaves it as it was.

    Raises:
        InputError: if something else is in the way. WriteError: if the disk is full, or the like.
    """
    check_file(path, force=True)
    data = text.encode("utf-8", "backslashreplace")
    try:
        with os.fdopen(os.open(path, _OWN | os.O_APPEND, 0o666), "ab", buffering=0) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise OSError(errno.EINVAL, "it is no regular file")
            before = found.st_size
            try:
                _write_all(file, data)
                os.fsync(file.fileno())
            except OSError:
                file.truncate(before)
                raise
    except OSError as error:
        raise WriteError(path, error) from error


def _write_all(file: IO[bytes], data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
