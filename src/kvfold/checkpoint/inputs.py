"""Whether what a run reads is still what it was when the run began. No torch.

Every file that is read has its size, its times and the hash of its content kept with the
request. Times first: a file that has not been touched is not read again. One that has been
(copied, downloaded again) is, and only its content counts.
"""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from kvfold.errors import InputError

Files = Mapping[str, Mapping[str, Path]]  # what it is to the command -> name -> file


class Print(TypedDict):
    """What tells a file from a changed one."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    sha256: str


Prints = dict[str, dict[str, Print]]
_TIMES = ("mtime_ns", "ctime_ns", "inode")  # ctime cannot be set back


def files_of(path: Path) -> dict[str, Path]:
    """A file under its name, or all files below a folder under theirs."""
    if not path.is_dir():
        return {path.name: path}
    found = sorted(each for each in path.rglob("*") if each.is_file())
    return {str(each.relative_to(path)): each for each in found}


def take_prints(
    files: Files,
    progress: Callable[[str, int, int], None] = lambda label, done, total: None,
    taken: Mapping[Path, Print] | None = None,
) -> Prints:
    """Sizes, times and hashes of files; reads them once.

    Args:
        taken: the prints of files that have been read already.
    """
    prints: Prints = {}
    total = sum(len(group) for group in files.values())
    done = 0
    for what, group in files.items():
        prints[what] = {}
        for name, path in group.items():
            prints[what][name] = (taken or {}).get(path) or _print(path)
            done += 1
            progress("hashing what is read", done, total)
    return prints


def _print(path: Path) -> Print:
    times = _times(path)  # before its content: what changes meanwhile is seen the next time
    return Print(**times, sha256=_digest(path))  # type: ignore[typeddict-item]


def read_printed(path: Path, read: Callable[[Path], bytes]) -> tuple[bytes, Print]:
    """A file's content and its print, from one reading by ``read``."""
    try:
        times = _times(path)
    except (OSError, ValueError):
        times = {}  # reading it says what is the matter
    data = read(path)
    return data, Print(**times, sha256=hashlib.sha256(data).hexdigest())  # type: ignore[typeddict-item]


def changed(prints: Mapping[str, Any], files: Files) -> str | None:
    """The first thing that is not what it was, in words; None if all is the same."""
    for what, group in files.items():
        before = prints.get(what, {})
        for name in sorted(before.keys() | group.keys()):
            found = _difference(before.get(name), group.get(name))
            if found is not None:
                return f"{name} of {what} {found}" if len(group) > 1 else f"{what} {found}"
    return None


def _difference(before: Mapping[str, Any] | None, path: Path | None) -> str | None:
    if before is None:
        return "is new"
    if path is None or not path.is_file():
        return "is gone"
    now = _times(path)
    if now["size"] != before["size"]:
        return f"had {before['size']:,} bytes, and has {now['size']:,} now"
    if all(now[name] == before[name] for name in _TIMES):
        return None
    return None if _digest(path) == before["sha256"] else "has other content now"


def _times(path: Path) -> dict[str, Any]:
    found = path.stat()
    return {
        "size": found.st_size,
        "mtime_ns": found.st_mtime_ns,
        "ctime_ns": found.st_ctime_ns,
        "inode": found.st_ino,
    }


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise InputError(f"cannot read {path}: {why}", "is it yours to read?") from error
