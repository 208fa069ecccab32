"""Keeping an eye on training: metrics on disk, and stopping before a run is ruined."""

import json
import math
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from kvfold.checkpoint.records import METRICS_ROW
from kvfold.documents import shortened
from kvfold.errors import CheckpointError, InputError, RunError
from kvfold.files import append_text, write_text
from kvfold.record import METRICS

Row = dict[str, Any]
Watch = Callable[[Row], None]

_HISTORY = 64  # steps whose median a spike is measured against
_SPIKE = 3.0  # times that median …
_PATIENCE = 8  # … for so many steps running


def unwatched(row: Row) -> None:
    """A watcher that looks away."""


class MetricsFile:
    """Appends rows to a JSON-lines file; a resumed run first drops the rows it will repeat."""

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        self._path = path
        rows = read_metrics(path) if path.is_file() else []
        before = [json.dumps(row) + "\n" for row in rows if row["step"] < resume_step]
        write_text(path, "".join(before))

    def __call__(self, row: Row) -> None:
        append_text(self._path, json.dumps(row) + "\n")


def read_metrics(path: Path) -> list[Row]:
    """The rows of a metrics file; a line cut short by a crash is left out."""
    rows: list[Row] = []
    for number, row in METRICS_ROW.lines(path, torn=True):
        for name, value in row.items():
            if name.startswith("kl ") and not isinstance(value, int | float):
                raise CheckpointError(
                    f"{path} line {number}: {name} is {shortened(value)}; expected a number",
                    METRICS_ROW.hint,
                )
        rows.append(dict(row))
    return rows


def tensorboard(folder: Path) -> Watch:
    """A watcher that writes to TensorBoard.

    Raises:
        InputError: if it is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError(
            "--tensorboard needs the tensorboard library, which is not installed",
            f"pip install 'kvfold[heal]', or read the {METRICS} that is always written",
        ) from error
    writers: list[Any] = []  # made with the first step: a run that is refused leaves no file

    def write(row: Row) -> None:
        if not writers:
            writers.append(SummaryWriter(str(folder)))
        for name, value in row.items():
            if isinstance(value, float):
                writers[0].add_scalar(f"heal/{name}", value, row["tokens"])
        writers[0].flush()

    return write


@dataclass
class Guard:
    """Stops a run that diverges.

    Attributes:
        history: the loss of recent steps.
    """

    history: list[float] = field(default_factory=list)
    _high: int = 0

    def check(self, step: int, loss: float, norm: float, last_save: str) -> None:
        """Look at a step before its update is applied.

        Args:
            norm: the gradient's, before clipping. last_save: says where the last checkpoint is.

        Raises:
            RunError: if the loss is no number, or has stayed at several times its recent median.
        """
        hint = f"{last_save}; --resume with a lower --lr goes on from there"
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise RunError(
                f"healing diverged at step {step}: loss {loss:g}, gradient norm {norm:g}", hint
            )
        usual = statistics.median(self.history) if len(self.history) >= _PATIENCE else math.inf
        self._high = self._high + 1 if loss > _SPIKE * usual else 0
        if self._high >= _PATIENCE:
            raise RunError(
                f"healing diverged: the loss has been above {_SPIKE:g} times its median "
                f"{usual:.3g} for {_PATIENCE} steps (step {step}: {loss:.3g})",
                hint,
            )
        if not self._high:
            self.history = [*self.history, loss][-_HISTORY:]


class Stopwatch:
    """Time spent computing, and altogether: their difference is the loop's overhead."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.started, self.computing, self.aside = time.perf_counter(), 0.0, 0.0

    @contextmanager
    def compute(self) -> Iterator[None]:
        """Forward, backward and the optimizer's step."""
        start = time.perf_counter()
        yield
        self.computing += time.perf_counter() - start

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Evaluations and checkpoints, which are no part of a step."""
        start = time.perf_counter()
        yield
        self.aside += time.perf_counter() - start

    @property
    def elapsed(self) -> float:
        """Seconds of steps since the last reset."""
        return time.perf_counter() - self.started - self.aside

    @property
    def overhead(self) -> float:
        """The fraction of the steps' time that was not computing."""
        return 1 - self.computing / self.elapsed if self.elapsed else 0.0


class StopSignal:
    """Ctrl-C or SIGTERM ask for a stop after this step; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def listening(self) -> Iterator["StopSignal"]:
        """Listen while the block runs (in the main thread; elsewhere signals cannot be heard)."""
        previous: dict[int, Any] = {}
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                previous[number] = signal.signal(number, self._hear)
        except ValueError:
            pass
        try:
            yield self
        finally:
            for heard, handler in previous.items():
                signal.signal(heard, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
