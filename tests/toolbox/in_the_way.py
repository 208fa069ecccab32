"""What stands where a file shall be written: other kinds of things, and full disks."""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """While the block runs, no file can grow beyond ``size``: a disk that fills up."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def in_the_way(folder: Path, kind: str) -> Path:
    """Something called ``target`` that is no regular file."""
    target, aside = folder / "target", folder / "aside"
    if kind == "folder":
        target.mkdir()
    elif kind == "pipe":
        os.mkfifo(target)
    elif kind == "device":
        target = Path("/dev/full")
    else:
        if kind == "link to a file":
            aside.write_text("precious")
        target.symlink_to(aside)
    return target


KINDS = ["folder", "pipe", "device", "link to a file", "dangling link"]
