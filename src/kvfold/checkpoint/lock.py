"""The lock of a working folder: its mark, which one run at a time holds. No torch.

The lock is the operating system's: it ends with the run, however that ends.
"""

import errno
import fcntl
import json
import os
import stat
import warnings
from contextlib import suppress
from pathlib import Path

from kvfold.checkpoint.places import MARK
from kvfold.checkpoint.records import MARKS
from kvfold.errors import InputError

_TRIES = 8  # to lock a folder that other runs are just leaving


def lock(folder: Path, out: Path) -> int:
    """Make or find the working folder, and lock its mark.

    Returns:
        the open file that holds the lock.
    """
    for _ in range(_TRIES):
        try:
            with suppress(FileExistsError):
                folder.mkdir()
            _check_ours(folder)
            mark = _open_mark(folder)
        except FileNotFoundError:  # the run that has just ended removed it
            continue
        except OSError as error:
            raise cannot_be_made(folder, error) from error
        try:
            _take(mark, folder, out)
            if _is_at(mark, folder / MARK):
                _sign(mark, folder, out)
                return mark
        except BaseException:
            os.close(mark)
            raise
        os.close(mark)
    raise InputError(f"another run of kvfold is writing {out}", "wait until it has ended")


def _open_mark(folder: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    return os.open(folder / MARK, flags, 0o666)


def _check_ours(folder: Path) -> None:
    """Refuse what is called like a working folder and is not one of ours."""
    found = folder.lstat()
    names = set(os.listdir(folder)) if stat.S_ISDIR(found.st_mode) else {""}  # noqa: PTH208
    if names and MARK not in names:
        raise InputError(
            f"{folder} is in the way, and is no working folder of kvfold",
            "move it away, or choose another OUT",
        )
    parent = folder.parent.stat()
    if parent.st_mode & stat.S_ISVTX and found.st_uid not in (os.geteuid(), parent.st_uid):
        raise InputError(f"{folder} belongs to another user", "choose another OUT")


def _take(mark: int, folder: Path, out: Path) -> None:
    try:
        fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise InputError(
                f"another run of kvfold is writing {out}",
                "wait until it has ended, or choose another OUT",
            ) from error
        warnings.warn(f"{folder} cannot be locked; start no second run to {out}", stacklevel=2)


def _is_at(opened: int, path: Path) -> bool:
    """Whether the open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(opened), path.lstat())
    except FileNotFoundError:
        return False


def _sign(mark: int, folder: Path, out: Path) -> None:
    """Write for which OUT the folder is, or check that it is for this one."""
    try:
        owner = MARKS.parse(os.pread(mark, 4096, 0) or b"{}", MARK).get("out")
    except InputError:
        owner = None
    alone = os.listdir(folder) == [MARK]  # noqa: PTH208
    if owner != out.name and not alone:
        raise InputError(
            f"{folder} is a working folder for {owner or 'another OUT'}, not for {out.name}",
            "move it away, or choose another OUT",
        )
    if owner != out.name:
        os.ftruncate(mark, 0)
        os.pwrite(mark, json.dumps({"kvfold": "working folder", "out": out.name}).encode(), 0)


def cannot_be_made(path: Path, error: OSError) -> InputError:
    """What is said of a folder that the system refuses."""
    return InputError(f"{path} cannot be made: {why(error)}", "choose another OUT")


def why(error: OSError) -> str:
    """The system's reason, in the middle of a sentence."""
    return (error.strerror or str(error)).lower()
