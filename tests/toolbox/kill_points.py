"""Kills a conversion just before its n-th change of the file system: see test_kills.py.

``python -m tests.toolbox.kill_points SOURCE FOLDER fresh|replace FIRST STEP`` prints a line
of JSON for each n = FIRST, FIRST + STEP …, until a run ends by itself. A child is forked for each
run, so that PyTorch is imported once.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from kvfold import convert
from kvfold.errors import InputError
from tests.toolbox.runs import digests, tree

KILLED = 77
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate",
           "os.symlink", "shutil.rmtree"}  # fmt: skip


def dies_before(number: int, folder: Path) -> None:
    """End this process, without a word, when it is about to make its n-th change in ``folder``."""
    counted = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal counted
        if event == "open":
            path, _, flags = arguments
            changes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        else:
            path, changes = (arguments or ("",))[0], event in CHANGES
        below = isinstance(path, str | os.PathLike) and str(folder) in os.fspath(path)
        # What rmtree removes is named from within its folder.
        if changes and (below or not str(path).startswith("/")):
            counted += 1
            if counted == number:
                os._exit(KILLED)

    sys.addaudithook(hook)


def run(source: Path, out: Path, number: int = 0, **options: Any) -> int:
    """Convert in a child; its exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        if number:
            dies_before(number, out.parent)
        convert(source, out, 2, calibrate=False, max_shard_bytes=50_000, **options)
        code = 0
    except InputError as error:
        print(error, file=sys.stderr)
        code = 2
    finally:
        os._exit(code)


def one(source: Path, root: Path, older: Path | None, whole: dict[str, str], n: int) -> Any:
    """Kill one run, look at what it left, and finish it as a person would."""
    place = root / "place"
    shutil.rmtree(place, ignore_errors=True)
    foreign = place / "out.partial"
    foreign.mkdir(parents=True)
    (foreign / "thesis.txt").write_text("years of work")
    out, before = place / "out", tree(source)
    force = older is not None
    if older is not None:
        shutil.copytree(older, out)
    first = run(source, out, n, force=force)
    left = digests(out) if out.is_dir() else None
    resumed = run(source, out, resume=True, force=force)
    again = run(source, out, force=force) if resumed == 2 else None
    return {
        "n": n,
        "killed": first == KILLED,
        "codes": [first, resumed, again],
        "out": "new" if left == whole else "none" if left is None
               else "old" if older and left == digests(older) else "half",
        "same": digests(out) == whole,
        "source": tree(source) == before,
        "foreign": (foreign / "thesis.txt").read_text() == "years of work",
        "names": sorted(path.name for path in place.iterdir()),
    }  # fmt: skip


def main() -> None:
    source, root, kind = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    number, step = int(sys.argv[4]), int(sys.argv[5])
    torch.set_num_threads(1)
    assert run(source, root / "whole") == 0
    older = None
    if kind == "replace":
        older = root / "older"
        shutil.copytree(root / "whole", older)
        (older / "README.md").write_text("an older one")
    while True:
        found = one(source, root, older, digests(root / "whole"), number)
        print(json.dumps(found), flush=True)
        if not found["killed"]:
            return
        number += step


if __name__ == "__main__":
    main()
