"""Where an output may lie: not on, in or around anything that is read. No torch."""

import errno
import os
import shutil
import stat
from collections.abc import Iterable
from pathlib import Path

from kvfold.errors import InputError

MARK = ".kvfold-working-folder"  # a file that only working folders hold
CONFIG = "config.json"


def working_folder(out: Path) -> Path:
    """Where ``out`` is worked on."""
    place = full_path(out)
    return place.with_name(f".{place.name}.kvfold-partial")


def full_path(out: Path) -> Path:
    """``out`` with its folder's links resolved, not its own.

    Raises:
        InputError: if nothing can be made there.
    """
    path = out.expanduser().absolute()
    if path.name in ("", ".."):
        raise InputError(f"{out} is no name for a new folder", "name a folder to be made")
    return path.parent.resolve() / path.name


def check_out(
    out: Path, sources: Iterable[Path], force: bool = False, *, older: str = CONFIG
) -> None:
    """Refuse an OUT that cannot be made, or would overwrite or swallow something.

    Args:
        sources: what is read: folders and files; they may also be names that are no paths.
        older: the file that tells a folder which ``force`` may replace.

    Raises:
        InputError: saying what is in the way.
    """
    check_apart(out, sources)
    check_place(out)
    check_older(out, force, older)


def check_apart(out: Path, sources: Iterable[Path]) -> None:
    """Refuse an OUT whose making would touch a source.

    Raises:
        InputError: naming both.
    """
    place = full_path(out)
    if any((parent / MARK).exists() for parent in place.parents):
        raise InputError(f"OUT {out} is inside a working folder of kvfold", "choose another OUT")
    for source in sources:
        if not source.exists():
            continue
        if source.is_dir() and inside(place, source):
            raise InputError(
                f"OUT {out} is inside SRC {source}", "write to a folder outside the source"
            )
        for path in _what_is_read(source):
            _check_reading(out, place, source, path)


def _what_is_read(source: Path) -> list[Path]:
    """A source, and what the links in it point to."""
    links = [path for path in source.iterdir() if path.is_symlink()] if source.is_dir() else []
    return [source, *links]


def _check_reading(out: Path, place: Path, source: Path, path: Path) -> None:
    if inside(path, place):
        what = "" if path == source else f" links to {path.resolve()}, which"
        raise InputError(
            f"SRC {source}{what} is inside OUT {out}, which would be replaced",
            "choose another OUT",
        )
    working = working_folder(place)
    real = path.resolve()
    if inside(path, working) or any((p / MARK).exists() for p in (real, *real.parents)):
        raise InputError(
            f"SRC {source} is inside a working folder of kvfold", "finish that run with --resume"
        )


def inside(path: Path, folder: Path) -> bool:
    """Whether ``path`` is ``folder`` or lies in it, whatever they are called.

    Through links, ``..`` and file systems that do not tell capitals apart.
    """
    real, wanted = path.resolve(), folder.resolve()
    return any(one == wanted or _same(one, wanted) for one in (real, *real.parents))


def _same(a: Path, b: Path) -> bool:
    try:
        return a.samefile(b)
    except OSError:
        return False


def check_place(out: Path) -> None:
    """Refuse a name that cannot be made.

    Raises:
        InputError: if a file is where a folder must be, its folder is not writable, or the name
        is too long.
    """
    place = full_path(out)
    try:
        working_folder(place).lstat()
    except FileNotFoundError:
        pass
    except OSError as error:
        hint = "choose a shorter name" if error.errno == errno.ENAMETOOLONG else "choose another"
        raise InputError(f"{out} cannot be made: {_reason(error)}", hint) from error
    parent = next(parent for parent in place.parents if parent.exists())
    if not parent.is_dir():
        raise InputError(f"{out} cannot be made: {parent} is a file", "choose another OUT")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(
            f"{out} cannot be made: {parent} is not writable", "choose a folder of your own"
        )


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def check_older(out: Path, force: bool, older: str = CONFIG) -> None:
    """Refuse to replace anything but an older folder of the same kind, and that only if asked.

    Raises:
        InputError: saying what is in the way.
    """
    place = full_path(out)
    try:
        found = place.lstat()
    except OSError:
        return
    if stat.S_ISLNK(found.st_mode):
        raise InputError(f"{out} is a link to {place.readlink()}", "name the folder itself")
    if not force:
        raise InputError(f"{out} exists already", "choose another OUT, or --force to replace it")
    if not is_older(place, older):
        kind = "checkpoint folder" if older == CONFIG else f"folder with {older}"
        raise InputError(
            f"{out} is not a {kind}; --force replaces only those", "choose another OUT"
        )
    if place.is_mount():
        raise InputError(f"{out} is a mount point", "write to a folder in it")


def is_older(place: Path, older: str) -> bool:
    """Whether a folder is one that ``force`` may replace: empty, or with the file ``older``."""
    if place.is_symlink() or not place.is_dir():
        return False
    return (place / older).is_file() or not any(place.iterdir())


def check_disk(out: Path, needed: int) -> int:
    """The bytes free where ``out`` will be.

    Raises:
        InputError: if they are fewer than ``needed``.
    """
    parent = next(parent for parent in out.absolute().parents if parent.exists())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise InputError(
            f"not enough disk space for {out}: {needed / 1e6:,.0f} MB needed, "
            f"{free / 1e6:,.0f} MB free",
            "free some space or write to another disk",
        )
    return free
