"""The lock of a working folder: one run at a time holds it."""

import fcntl
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvfold import convert
from kvfold.checkpoint.places import MARK, working_folder
from kvfold.checkpoint.workspace import opened
from kvfold.errors import InputError
from tests.conftest import Kvfold
from tests.toolbox.runs import digests, tree

HOLDER = """
import sys
from pathlib import Path
from kvfold.checkpoint.workspace import opened
with opened(Path(sys.argv[1])) as work:
    work.start({})
    work.begin({})
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def held(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """Another process that is writing ``out``."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "out")],
        text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize("options", [[], ["--force"], ["--resume"], ["--force", "--resume"]])
@pytest.mark.parametrize("command", ["convert", "heal", "convert --heal", "demo"])
def test_a_second_run_to_the_same_out_is_told_at_once(
    command: str,
    options: list[str],
    held: "subprocess.Popen[str]",
    kvfold: Kvfold,
    llama_folder: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever its options, one line and a hint, before any work; the first goes on unharmed."""
    before = tree(tmp_path)
    monkeypatch.setattr("kvfold.fold.convert.take_prints", None)  # calling it would fail
    out: list[object] = [tmp_path / "out"]
    arguments: list[object] = {
        "convert": ["convert", llama_folder, *out, "--kv-heads", 2],
        "heal": ["heal", llama_folder, *out, "--teacher", llama_folder, "--text", text_file,
                 "--context", 64, "--tokens", 512],
        "convert --heal": ["convert", llama_folder, *out, "--kv-heads", 2, "--context", 64,
                           "--calibration", text_file, "--heal", 512],
        "demo": ["demo", "--out", *out],
    }[command]  # fmt: skip
    if command == "demo" and "--resume" in options:
        pytest.skip("demo has nothing to resume")
    run = kvfold(*arguments, *options)
    assert run.code == 2, run.err
    assert run.err.splitlines()[0] == f"error: another run of kvfold is writing {out[0]}"
    assert run.err.splitlines()[1].startswith("hint: ")
    assert len(run.err.splitlines()) == 2
    assert tree(tmp_path) == before


def test_the_lock_ends_with_its_run_however_that_ends(
    held: "subprocess.Popen[str]", llama_folder: Path, tmp_path: Path
) -> None:
    held.kill()
    held.wait()
    convert(llama_folder, tmp_path / "out", 2, calibrate=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_lock_that_was_just_removed_does_not_count(tmp_path: Path) -> None:
    """The mark may vanish between its opening and its locking: then it locks nothing."""
    real = fcntl.flock
    seen: list[int] = []

    def meanwhile(file: int, how: int) -> None:
        if not seen:
            seen.append(1)
            shutil.rmtree(working_folder(tmp_path / "out"))
        real(file, how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcntl, "flock", meanwhile)
        with opened(tmp_path / "out") as work:
            assert (work.folder / MARK).is_file()
            with pytest.raises(InputError, match="another run"):
                opened(tmp_path / "out").__enter__()
    assert not list(tmp_path.iterdir())


def test_two_runs_never_mix(llama_folder: Path, tmp_path: Path) -> None:
    """Started together, with different requests: OUT is one of them, byte by byte."""
    for heads in (1, 2):
        convert(llama_folder, tmp_path / f"{heads}", heads, calibrate=False)
    command = [sys.executable, "-m", "kvfold", "convert", str(llama_folder), str(tmp_path / "out")]
    command += ["--no-calibration", "--force", "--kv-heads"]
    runs = [
        subprocess.Popen([*command, str(heads)], stderr=subprocess.PIPE, text=True)
        for heads in (1, 2, 1, 2)
    ]
    errors = [run.communicate(timeout=120)[1] for run in runs]
    codes = [run.returncode for run in runs]
    assert 0 in codes
    for code, error in zip(codes, errors, strict=True):
        assert code in (0, 2), error
        assert code == 0 or "another run of kvfold is writing" in error
    assert digests(tmp_path / "out") in [digests(tmp_path / f"{heads}") for heads in (1, 2)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "out"]
