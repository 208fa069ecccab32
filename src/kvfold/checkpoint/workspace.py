"""The folder in which a checkpoint is made until it is whole. No torch.

A run towards OUT works in ``.OUT.kvfold-partial`` beside it and renames the finished part into
place, so a killed run leaves either nothing of OUT's name or something that ``--resume`` takes
up. In that folder lie

    .kvfold-working-folder  says that the folder is kvfold's, and for which OUT; carries the lock
    request.json            what was asked, and what everything that is read was then
    out/                    what will be OUT
    old/                    an older OUT, from when it is renamed aside until it is removed

and whatever the command keeps on its way. The mark is made first and goes last, so a folder that
holds anything but no mark is somebody else's, and is left alone (``checkpoint.lock``).
"""

import json
import os
import resource
import shutil
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from kvfold.checkpoint.inputs import Files, changed
from kvfold.checkpoint.lock import cannot_be_made, lock, why
from kvfold.checkpoint.places import (
    CONFIG,
    MARK,
    check_older,
    check_place,
    full_path,
    is_older,
    working_folder,
)
from kvfold.checkpoint.records import REQUESTS
from kvfold.errors import InputError, RunError
from kvfold.files import is_temporary, of_full_disk, write_json

REQUEST, NEW, OLD = "request.json", "out", "old"
# What is worth going on from: what was compared or tried, a layer, a checkpoint, a shard, a
# dequantized source, an older OUT.
_WORTH = (
    "compared.json", "tried.json", "layers/*.json", "tries/*/*.json", "checkpoints/step-????????",
    f"{NEW}/*", "source", OLD,
)  # fmt: skip
_INPUTS, _FOLDER = "inputs", "folder"


class Workspace:
    """A working folder that this process has locked; made by :func:`opened`.

    Attributes:
        out: what is made. folder: where. new: what will be ``out``.
        finished: an earlier run has made ``out`` from the same request, and was killed after.
    """

    def __init__(self, out: Path, older: str) -> None:
        self.out, self._older = out, older
        self.folder = working_folder(out)
        self.new = self.folder / NEW
        self.finished = False
        self._force = False
        self._parents = _make_parents(out)
        try:
            self._lock = lock(self.folder, out)
        except BaseException:
            self._remove_parents()
            raise

    # -- beginning ---------------------------------------------------------------------------

    def start(
        self,
        asked: Mapping[str, Any],
        *,
        resume: bool = False,
        force: bool = False,
        free: tuple[str, ...] = (),
        files: Files | None = None,
    ) -> bool:
        """Take up what an interrupted run has left, or make room for a new one.

        Args:
            asked: the request; a resumed run must ask for the same. free: keys that may differ.
            files: everything that is read; a resumed run must read the same.

        Returns:
            whether there is an earlier run to go on from. If not, call :meth:`begin` next.

        Raises:
            InputError: if there is another run's work, or nothing to resume.
        """
        self._force = force
        self._recover()
        if resume:
            self._check_same(json.loads(json.dumps(asked)), free, files or {})
            self.finished = self._is_published()
            if self.finished:
                self.remove()
                return True
        elif self._is_published():
            self._empty()
        elif self.kept and not force:
            raise InputError(
                f"{self.folder} is left from an interrupted run",
                "--resume to go on with it, --force to start over",
            )
        check_older(self.out, force, self._older)
        if resume:
            self._sweep()
        return resume

    def begin(self, asked: Mapping[str, Any], prints: Mapping[str, Any] | None = None) -> None:
        """Empty the folder, and write down what was asked and what is read."""
        self._empty()
        self.new.mkdir()
        own = {_INPUTS: prints or {}, _FOLDER: self.new.stat().st_ino}
        write_json(self.folder / REQUEST, {**asked, **own})

    def fresh(self) -> Path:
        """``new``, emptied of what an earlier run has put there."""
        _clear(self.new.iterdir())
        return self.new

    @property
    def prints(self) -> dict[str, Any]:
        """What everything that is read was when the run began; see ``checkpoint.inputs``."""
        found: dict[str, Any] = self._stored()[_INPUTS]
        return found

    @property
    def kept(self) -> bool:
        """Whether there is something to go on from."""
        return any(True for pattern in _WORTH for _ in self.folder.glob(pattern))

    def _is_published(self) -> bool:
        """Whether a run was killed after it renamed its folder to ``out``, which is still it."""
        if not is_begun(self.out) or self.new.exists() or not _is_there(self.out):
            return False
        found = self._read()
        return found is not None and found[_FOLDER] == self.out.lstat().st_ino

    def _stored(self) -> dict[str, Any]:
        if not is_begun(self.out):
            raise InputError(f"nothing to resume for {self.out}", "run without --resume")
        found = self._read()
        if found is None:
            raise InputError(
                f"{self.folder / REQUEST} is damaged", "--force instead of --resume starts over"
            )
        return found

    def _read(self) -> dict[str, Any] | None:
        """The request of an earlier run; None if it is damaged."""
        try:
            return dict(REQUESTS.read(self.folder / REQUEST))
        except InputError:
            return None

    def _check_same(self, wanted: dict[str, Any], free: tuple[str, ...], files: Files) -> None:
        hint = "repeat the first command's arguments, or --force to start over"
        found = self._stored()
        prints, _ = found.pop(_INPUTS), found.pop(_FOLDER)
        for key in sorted(found.keys() | wanted.keys()):
            if key not in free and found.get(key) != wanted.get(key):
                raise InputError(
                    f"{self.folder} belongs to another run; cannot resume it "
                    f"({key}: {found.get(key)!r} then, {wanted.get(key)!r} now)",
                    hint,
                )
        difference = changed(prints, files)
        if difference is not None:
            raise InputError(
                f"cannot resume: {difference} (since the run in {self.folder} began)",
                "put back what was read then, or --force instead of --resume to start over",
            )

    def _recover(self) -> None:
        """Undo half of an exchange: a run was killed while it replaced an older OUT."""
        old = self.folder / OLD
        if not old.exists():
            return
        if not _is_there(self.out):
            old.rename(self.out)
        elif self.new.exists():
            raise InputError(
                f"{self.out} was made by something else, while {old} waits to be put back there",
                f"move {self.out} away, or remove {old}",
            )

    def _sweep(self) -> None:
        """Remove files that were being made when the earlier run was killed."""
        for path in self.folder.rglob("*"):
            if is_temporary(path):
                path.unlink()

    # -- ending ------------------------------------------------------------------------------

    def publish(self, files: Files | None = None) -> None:
        """Rename the finished folder into place; an older OUT goes only then.

        Args:
            files: everything that was read, which must still be what it was.

        Raises:
            RunError: if something was changed, or made at OUT, while the run went on.
        """
        difference = changed(self.prints, files or {})
        if difference is not None:
            raise RunError(
                f"{difference}, changed while it was read; {self.out} was not made",
                "--force starts over",
            )
        older = _is_there(self.out)
        if older and not (self._force and is_older(self.out, self._older)):
            raise RunError(
                f"{self.out} was made by something else meanwhile; the result is in {self.new}",
                "move that away and repeat the command with --resume",
            )
        for path in (self.new, *self.new.rglob("*")):
            if path.is_dir():
                _flush(path)
        try:
            if older:
                self.out.rename(self.folder / OLD)
            self.new.rename(self.out)
        except OSError as error:
            self._recover()
            raise RunError(
                f"{self.out} cannot be made: {why(error)}; the result is in {self.new}",
                "--resume tries again",
            ) from error
        _flush(self.out.parent)
        self.remove()

    def remove(self) -> None:
        """Remove the folder: the mark last, so that it is ours as long as it is there."""
        rest = [path for path in self.folder.iterdir() if path.name not in (MARK, REQUEST)]
        _clear(rest, quietly=True)
        left = [path for path in rest if _is_there(path)]
        if left:
            warnings.warn(f"{left[0]} could not be removed", stacklevel=2)
            return
        (self.folder / REQUEST).unlink(missing_ok=True)
        (self.folder / MARK).unlink()
        with suppress(OSError):  # another run is using it already
            self.folder.rmdir()

    def _empty(self) -> None:
        """Remove everything but the mark; the request first, for it would vouch for the rest."""
        (self.folder / REQUEST).unlink(missing_ok=True)
        _clear(path for path in self.folder.iterdir() if path.name != MARK)

    def close(self) -> None:
        """Give the lock back; remove the folder if there is nothing in it to go on from."""
        if (self.folder / MARK).exists() and not self.kept:
            self.remove()
        os.close(self._lock)
        self._remove_parents()

    def _remove_parents(self) -> None:
        for parent in reversed(self._parents):
            with suppress(OSError):  # it is in use now
                parent.rmdir()


def is_begun(out: Path) -> bool:
    """Whether an earlier run towards ``out`` has left its request."""
    return (working_folder(out) / REQUEST).is_file()


@contextmanager
def opened(out: Path, *, older: str = CONFIG) -> Iterator[Workspace]:
    """Lock the working folder of ``out`` for as long as the block runs.

    What the block leaves there is kept only if a resumed run could use it.

    Args:
        older: the file that tells a folder which may be replaced with ``--force``.

    Raises:
        InputError: if another run is writing ``out``, or a folder that is not ours is in the way.
    """
    place = full_path(out)
    check_place(out)
    work = Workspace(place, older)
    try:
        yield work
    except Exception as error:
        if of_full_disk(error) is None:
            raise
        raise _full_disk(work) from error
    finally:
        work.close()


def _full_disk(work: Workspace) -> RunError:
    if not work.kept:
        return RunError(f"the disk is full; {work.out} was not made", "free some space")
    return RunError(
        f"the disk is full; what is done so far is kept in {work.folder}",
        "free some space and repeat the command with --resume",
    )


def _make_parents(out: Path) -> list[Path]:
    """The folders above ``out`` that had to be made."""
    missing = [parent for parent in out.parents if not parent.exists()][::-1]
    try:
        for parent in missing:
            parent.mkdir(exist_ok=True)
    except OSError as error:
        raise cannot_be_made(out, error) from error
    return missing


def _clear(paths: Iterable[Path], quietly: bool = False) -> None:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=quietly)
        else:
            path.unlink()


def _is_there(path: Path) -> bool:
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    return True


def _flush(folder: Path) -> None:
    """See to it that the names in a folder outlive a power cut."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # not every file system can
            os.fsync(opened)
    finally:
        os.close(opened)


def peak_memory() -> int:
    """The largest resident size of this process, bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
