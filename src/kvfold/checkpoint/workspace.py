"""``OUT.partial``: where a checkpoint is made until it is whole. No torch.

A run works in a folder beside OUT and renames the finished part into place, so a killed run
leaves either nothing of that name or something that ``--resume`` takes up.
"""

import errno
import json
import resource
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvfold.checkpoint.writer import write_json
from kvfold.errors import InputError, RunError

REQUEST = "request.json"


def check_out(out: Path, source: Path, force: bool) -> None:
    """Refuse an OUT that would overwrite or swallow something.

    Args:
        source: the checkpoint that is read; it may also be a name that is no path.

    Raises:
        InputError: saying what is in the way.
    """
    here, there = out.resolve(), source.resolve()
    if source.exists() and there.is_dir() and (here == there or there in here.parents):
        raise InputError(
            f"OUT {out} is inside SRC {source}", "write to a folder outside the source"
        )
    if source.exists() and here in there.parents:
        raise InputError(
            f"SRC {source} is inside OUT {out}, which would be replaced", "choose another OUT"
        )
    if not out.exists():
        return
    if not force:
        raise InputError(f"{out} exists already", "choose another OUT, or --force to replace it")
    if not out.is_dir() or (any(out.iterdir()) and not (out / "config.json").is_file()):
        raise InputError(
            f"{out} is not a checkpoint folder; --force replaces only those", "choose another OUT"
        )


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


def partial_folder(out: Path) -> Path:
    """Where ``out`` is worked on."""
    return out.with_name(out.name + ".partial")


def prepare(
    partial: Path,
    asked: Mapping[str, Any],
    *,
    resume: bool,
    force: bool,
    free: tuple[str, ...] = (),
) -> None:
    """Make or take up the working folder, with ``out/`` for what will be published.

    Args:
        asked: the request; a resumed run must ask for the same. free: keys that may differ.

    Raises:
        InputError: if the folder is another run's, or is not there to resume.
    """
    wanted = json.loads(json.dumps(asked))
    stored = partial / REQUEST
    if partial.exists() and resume:
        _check_same(partial, stored, wanted, free)
        return
    if partial.exists():
        if not force:
            raise InputError(
                f"{partial} is left from an interrupted run",
                "--resume to go on with it, --force to start over",
            )
        shutil.rmtree(partial)
    if resume:
        raise InputError(f"nothing to resume: there is no {partial}", "run without --resume")
    (partial / "out").mkdir(parents=True)
    write_json(stored, wanted)


def _check_same(partial: Path, stored: Path, wanted: dict[str, Any], free: tuple[str, ...]) -> None:
    hint = "repeat the first command's arguments, or --force to start over"
    if not stored.is_file():
        raise InputError(f"{partial} belongs to another kind of run; cannot resume it", hint)
    found = json.loads(stored.read_text(encoding="utf-8"))
    differing = sorted(
        key
        for key in found.keys() | wanted.keys()
        if key not in free and found.get(key) != wanted.get(key)
    )
    if differing:
        key = differing[0]
        raise InputError(
            f"{partial} belongs to another run; cannot resume it "
            f"({key}: {found.get(key)!r} then, {wanted.get(key)!r} now)",
            hint,
        )


@contextmanager
def disk_errors(partial: Path) -> Iterator[None]:
    """Turn a full disk into words."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RunError(
            f"the disk is full; what is done so far is kept in {partial}",
            "free some space and repeat the command with --resume",
        ) from error


def publish(partial: Path, out: Path) -> None:
    """Rename the finished folder into place; an older OUT goes only then."""
    old = out.with_name(out.name + ".old")
    if out.exists():
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
    (partial / "out").rename(out)
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(partial, ignore_errors=True)


def peak_memory() -> int:
    """The largest resident size of this process, bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
