"""Ctrl-C and SIGTERM while a command runs: one line and exit code 130.

Both raise ``KeyboardInterrupt`` in the command, so that its temporary files go. While the program
starts and ends, when there is nothing to clean up, it just leaves (``cli.leave``).
"""

import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from kvfold.cli.leave import SIGNALS

_SOON = 0.01  # seconds

_asked = False


class Interrupted(BaseException):
    """A command was interrupted; unlike ``KeyboardInterrupt``, click leaves it alone.

    Attributes:
        hint: what can be done about it, or nothing.
    """

    def __init__(self, hint: str = "") -> None:
        super().__init__()
        self.hint = hint


@contextmanager
def interruptible() -> Iterator[None]:
    """Run a command: a signal raises ``KeyboardInterrupt`` in it, which leaves as ``Interrupted``.

    Where a library drops the exception (a destructor, a callback from C), it is raised again; where
    one turns it into another error, it is still an interruption.
    """
    global _asked
    _asked = False
    hook, before = sys.unraisablehook, _heard()
    try:
        sys.unraisablehook = _again(hook)
        _listen(_raise, (*before, signal.SIGALRM))
        yield
    except KeyboardInterrupt as error:
        raise Interrupted(getattr(error, "hint", "")) from error
    except Exception as error:
        if _asked:
            raise Interrupted from error
        raise
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            _listen(handler, (number,))
        _listen(signal.SIG_DFL, (signal.SIGALRM,))


@contextmanager
def resumable(folder: Callable[[], Path]) -> Iterator[None]:
    """Promise ``--resume`` on an interruption, if there is then something to go on with.

    Args:
        folder: says where the run works.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        if folder().exists():
            error.hint = "the same command with --resume goes on"  # type: ignore[attr-defined]
        raise


def _raise(number: int, frame: FrameType | None) -> None:
    global _asked
    _asked = True
    raise KeyboardInterrupt


def _heard() -> dict[int, Any]:
    """The handlers there are, of the signals that are not ignored (as under nohup)."""
    found: dict[int, Any] = {number: signal.getsignal(number) for number in SIGNALS}
    return {number: handler for number, handler in found.items() if handler != signal.SIG_IGN}


def _listen(handler: Any, numbers: Iterable[int]) -> None:
    with suppress(ValueError):  # only the main thread hears signals
        for number in numbers:
            signal.signal(number, handler)


def _again(hook: Callable[[Any], Any]) -> Callable[[Any], None]:
    def unraisable(found: Any) -> None:
        if isinstance(found.exc_value, KeyboardInterrupt):
            with suppress(ValueError):
                signal.setitimer(signal.ITIMER_REAL, _SOON)  # not here: hooks may not raise
        else:
            hook(found)

    return unraisable
