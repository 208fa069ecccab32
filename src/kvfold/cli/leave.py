"""Leaving at once on Ctrl-C and SIGTERM. Imported before anything else: nothing slow here."""

import os
import signal

INTERRUPTED = 130
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def leave_at_once() -> None:
    """From now on a signal says that the program was interrupted, and ends it.

    Signals that are ignored (as under nohup) stay so.
    """
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _leave)


def ignore_signals() -> None:
    """From now on signals are not heard."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _leave(number: int, frame: object) -> None:
    os.write(2, b"error: interrupted\n")
    os._exit(INTERRUPTED)
