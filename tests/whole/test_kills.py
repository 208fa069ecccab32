"""Kills before every single change of the file system: nothing is lost, and all is taken up."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("kind", ["fresh", "replace"])
@pytest.mark.parametrize(
    ("first", "step"),
    [pytest.param(1, 1, marks=pytest.mark.slow), pytest.param(5, 31)],
    ids=["all", "some"],
)
def test_a_conversion_survives_a_kill_at_any_moment(
    kind: str, first: int, step: int, sharded_folder: Path, tmp_path: Path
) -> None:
    """OUT is absent, the older one or the new one; the source and what is not ours untouched;
    ``--resume``, or the plain command where that says so, makes the same bytes."""
    command = [
        sys.executable,
        "-m",
        "tests.toolbox.kill_points",
        str(sharded_folder),
        str(tmp_path),
        kind,
    ]
    run = subprocess.run(
        [*command, str(first), str(step)], cwd=ROOT, capture_output=True, text=True, timeout=500
    )
    assert run.returncode == 0, run.stderr[-3000:]
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(rows) > 3
    for row in rows:
        assert row["source"], row
        assert row["foreign"], row
        assert row["out"] in (("none", "new") if kind == "fresh" else ("old", "none", "new")), row
        assert row["same"], row
        assert row["names"] == ["out", "out.partial"], row
        assert row["codes"][1] in (0, 2), row
    if kind == "replace":  # OUT is away between two renames, not longer
        assert sum(row["out"] == "none" for row in rows) <= 1
    assert [row["killed"] for row in rows] == [True] * (len(rows) - 1) + [False]
