"""Ctrl-C and SIGTERM: exit code 130, one line, whenever they come."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Kvfold

# Sends a signal to itself at the N-th import, which Python's audit events tell.
_AT_IMPORT = """
import os, sys
left = int(sys.argv.pop(1))
number = int(sys.argv.pop(1))
def hook(event, arguments):
    global left
    if event == "import":
        left -= 1
        if left == 0:
            os.kill(os.getpid(), number)
from kvfold.cli.leave import leave_at_once
leave_at_once()  # as kvfold.__main__ does in its first line
sys.addaudithook(hook)
from kvfold.__main__ import run
run()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("imports", [1, 2, 7, 25, 60, 61, 150, 400, 700])
def test_a_signal_at_any_import(imports: int, number: signal.Signals) -> None:
    arguments = [sys.executable, "-c", _AT_IMPORT, str(imports), str(int(number)), "methods"]
    run = subprocess.run(arguments, capture_output=True, text=True, timeout=60)
    assert run.returncode == 130, run.stderr
    assert run.stderr.startswith("error: interrupted")
    assert len(run.stderr.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_after_any_delay(number: signal.Signals) -> None:
    """From when Python itself has started (some 20 ms here) until after the command's end."""
    for delay in [0.05 * step for step in range(2, 60)]:
        process = subprocess.Popen(
            [sys.executable, "-m", "kvfold", "methods"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            process.wait(delay)
        except subprocess.TimeoutExpired:
            process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert process.returncode in (0, 130), (delay, err)
        assert "Traceback" not in err, delay
        assert process.returncode == 130 or out, delay


def test_a_signal_that_a_destructor_swallows_comes_again(
    kvfold: Kvfold, monkeypatch: pytest.MonkeyPatch
) -> None:
    import time

    class Swallows:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

    def methods() -> None:
        Swallows()
        time.sleep(20)

    monkeypatch.setattr("kvfold.fold.methods.all_methods", methods)
    run = kvfold("methods")
    assert run.code == 130
    assert run.err == "error: interrupted; nothing was overwritten\n"


def test_a_signal_that_becomes_another_error(
    kvfold: Kvfold, monkeypatch: pytest.MonkeyPatch
) -> None:
    def methods() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt as error:
            raise ImportError("something failed") from error

    monkeypatch.setattr("kvfold.fold.methods.all_methods", methods)
    before = signal.getsignal(signal.SIGTERM)
    run = kvfold("methods")
    assert (run.code, run.err) == (130, "error: interrupted; nothing was overwritten\n")
    assert signal.getsignal(signal.SIGTERM) is before


def _interrupt(*arguments: object, **options: object) -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    ("place", "resumable"), [("preview", False), ("_run", False), ("_write", True)]
)
def test_resume_is_promised_only_if_there_is_something_to_resume(
    place: str, resumable: bool, kvfold: Kvfold, llama_folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(f"kvfold.fold.convert.{place}", _interrupt)
    command = ("convert", llama_folder, tmp_path / "out", "--kv-heads", 2, "--no-calibration")
    run = kvfold(*command)
    assert run.code == 130
    assert ("--resume" in run.err) == resumable
    monkeypatch.undo()
    assert kvfold(*command, *(["--resume"] if resumable else [])).code == 0


def test_ignored_signals_stay_ignored() -> None:
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN);"
        "sys.argv = ['kvfold', 'families'];"
        "import kvfold.cli.output as o; show = o.emit;"
        "from kvfold.__main__ import run;"
        "import click; command = __import__('kvfold.cli.families', fromlist=['x']);"
        "command.emit = lambda *a: (signal.raise_signal(signal.SIGINT), show(*a));"
        "run()"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_cannot_be_written_is_said() -> None:
    with Path("/dev/full").open("w") as full:
        run = subprocess.run(
            [sys.executable, "-m", "kvfold", "families"], stdout=full, stderr=subprocess.PIPE,
            text=True, timeout=60,
        )  # fmt: skip
    assert run.returncode == 1
    assert run.stderr.startswith("error: No space left on device\nhint: free")
    assert len(run.stderr.splitlines()) == 2
