"""Errors meant for people: what was given, what was expected, and a hint.

Raised everywhere, printed in one place (``kvfold.cli``), which turns each into
one line, one ``hint:`` line and the exit code of its class.
"""


class KVFoldError(Exception):
    """Base of every error kvfold raises on purpose.

    Args:
        message: one line naming the value given and what was expected.
        hint: what to do about it; one line.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class InputError(KVFoldError, ValueError):
    """The input cannot be used as given (exit code 2)."""

    exit_code = 2


class CheckpointError(InputError):
    """A checkpoint is missing, corrupt, or contradicts itself (exit code 2)."""


class UnsupportedError(InputError):
    """The architecture cannot hold what was asked for (exit code 2)."""


class RunError(KVFoldError, RuntimeError):
    """Work started and then failed, for instance on a full disk (exit code 1)."""


class ThresholdError(KVFoldError):
    """A quality threshold that was asked for was not met (exit code 3)."""

    exit_code = 3
