"""Asking one engine, in a process of its own: other engines need other versions of everything."""

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from kvfold.engines.known import Engine

SCRIPT = Path(__file__).parent / "scripts" / "verify_ask.py"
Verdict = Literal["answered", "absent", "refused", "failed"]
_GRACE = 2.0  # seconds to end in
_POLL = 0.05
_LONGEST = 1 << 16  # bytes of a log's end


@dataclass
class Reply:
    """What came back.

    Attributes:
        verdict: ``absent`` if something is not on this machine, ``refused`` if the engine does not
            open the checkpoint, ``failed`` if it crashed, hung or answered something else.
        why: there is no answer. how: the checkpoint was given to it.
        answer: token ids for each prompt, or text.
    """

    verdict: Verdict = "failed"
    why: str = ""
    version: str | None = None
    how: str = ""
    answer: Any = None
    seconds: float = 0.0


def ask(
    engine: Engine,
    python: str,
    task: dict[str, Any],
    seconds: float,
    stage: Callable[[str], None] = lambda words: None,
) -> Reply:
    """Give an engine a task (``scripts/verify_task.py``); one without prompts asks what is there.

    Args:
        python: the one it is installed in. stage: is told what it is doing.
    """
    started = time.monotonic()
    with tempfile.TemporaryFile() as told, tempfile.TemporaryFile() as log:
        try:
            process = _start(engine, python, task, told, log)
        except OSError as error:
            return Reply("absent", f"{python} cannot be run: {error.strerror}")
        try:
            ended = _wait(process, told, started + seconds, stage)
        finally:
            _end(process)
        reply = _read(told)
        reply.seconds = time.monotonic() - started
        if not reply.why and reply.verdict == "failed":
            reply.why = _last_words(process, log) if ended else f"no answer in {seconds:g} seconds"
        return reply


def _start(
    engine: Engine, python: str, task: dict[str, Any], told: IO[bytes], log: IO[bytes]
) -> "subprocess.Popen[bytes]":
    """The process, with its task on stdin; it leads a group, so that all it starts ends with it."""
    with tempfile.TemporaryFile() as given:
        given.write(json.dumps(task).encode())
        given.seek(0)
        return subprocess.Popen(
            [python, str(SCRIPT), engine.script, str(told.fileno())],
            stdin=given,
            stdout=log,
            stderr=log,
            pass_fds=(told.fileno(),),
            start_new_session=True,
        )


def _wait(
    process: "subprocess.Popen[bytes]",
    told: IO[bytes],
    deadline: float,
    stage: Callable[[str], None],
) -> bool:
    """Wait for the end, and pass on what is told meanwhile; False if it does not come in time."""
    seen = 0
    while True:
        running = process.poll() is None
        lines = _lines(told)
        for line in lines[seen:]:
            if "stage" in line:
                stage(str(line["stage"]))
        seen = len(lines)
        if not running:
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL)


def _lines(told: IO[bytes]) -> list[dict[str, Any]]:
    """What was told so far. The file's place is shared with the process that writes it."""
    size = os.fstat(told.fileno()).st_size
    found = []
    for line in os.pread(told.fileno(), size, 0).split(b"\n")[:-1]:
        with suppress(ValueError):
            document = json.loads(line)
            if isinstance(document, dict):
                found.append(document)
    return found


def _read(told: IO[bytes]) -> Reply:
    reply = Reply()
    for line in _lines(told):
        for verdict in ("absent", "refused"):
            if verdict in line:
                reply.verdict, reply.why = verdict, str(line[verdict])
        if "version" in line:
            reply.version = str(line["version"])
        reply.how = str(line.get("how", reply.how))
        if "answer" in line:
            reply.verdict, reply.answer = "answered", line["answer"]
    return reply


def _last_words(process: "subprocess.Popen[bytes]", log: IO[bytes]) -> str:
    """How it ended, and the last that it said."""
    code = process.returncode
    how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
    size = os.fstat(log.fileno()).st_size
    end = os.pread(log.fileno(), _LONGEST, max(0, size - _LONGEST)).decode(errors="replace")
    lines = [line.strip() for line in end.splitlines() if line.strip()]
    return f"{how}: {lines[-1]}" if lines else how


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End the process and all that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError, PermissionError):  # it has ended
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)
