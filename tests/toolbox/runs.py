"""Runs that are killed, what they leave, and what a folder holds."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvfold import convert

CALIBRATION: dict[str, Any] = {"calibration_tokens": 1024, "context": 64}


def tree(folder: Path) -> dict[str, str]:
    """Everything below a folder: what it is, and its content."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        elif path.is_dir():
            found[name] = "folder"
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


class Stop(BaseException):
    """Stands for a kill."""


def stop_at(moment: str, number: int = 1) -> Callable[[str, int, int], None]:
    def progress(label: str, done: int, total: int) -> None:
        if (label, done) == (moment, number):
            raise Stop

    return progress


def stopped(source: Path, out: Path, moment: str = "writing", **options: Any) -> None:
    """A conversion that was killed."""
    with pytest.raises(Stop):
        convert(source, out, 2, calibrate=False, progress=stop_at(moment), **options)


def rewrite(path: Path) -> None:
    """Other content of the same size and times."""
    found = path.stat()
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def digests(folder: Path) -> dict[str, str]:
    """The content of every file; the record without what a run may differ in."""
    result = {}
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        if path.name == "kvfold.json":
            record = json.loads(data)
            del record["run"]
            data = json.dumps(record).encode()
        result[path.name] = hashlib.sha256(data).hexdigest()
    return result


def rank_of(parent: int, rank: int) -> int:
    """The process that torchrun gave this rank."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "environ").read_bytes().split(b"\0")
            own = int((path / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
        if own == parent and f"RANK={rank}".encode() in words:
            return int(path.name)
    raise AssertionError(f"no rank {rank} below {parent}")
