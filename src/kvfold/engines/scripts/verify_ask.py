"""Asks one engine, in whatever Python it is installed. Stand-alone: needs no kvfold.

    python verify_ask.py ENGINE FILE < task.json

``FILE`` is the number of an open file, to which lines of JSON are written: the version, what is
being done, how the checkpoint was loaded, and in the end the answer or why there is none. What the
engine itself prints goes to stdout and stderr. A task without prompts only asks for the version.
"""

import importlib
import json
import os
import sys

from verify_task import AbsentError, Task

_LONGEST = 300  # characters of a reason


def main(engine: str, file: int) -> None:
    """Ask, and write down what comes back."""

    def tell(**what: object) -> None:
        os.write(file, f"{json.dumps(what)}\n".encode())

    task = Task(**json.load(sys.stdin))
    script = importlib.import_module(f"verify_{engine}")
    try:
        tell(version=script.version(task))
        if not task.prompts:
            return
        generate, how = script.load(task, lambda words: tell(stage=words))
    except AbsentError as error:
        tell(absent=str(error))
        return
    except Exception as error:
        tell(refused=_reason(error))
        raise
    tell(how=how)
    tell(stage="generating")
    answer = generate()
    tell(answer=answer)
    # Engines may hang or crash while they are torn down; that is not what was asked.
    sys.stdout.flush()
    os._exit(0)


def _reason(error: BaseException) -> str:
    """The first cause of an error: what engines wrap around it tells less."""
    while error.__cause__ is not None:
        error = error.__cause__
    words = " ".join(str(error).split())[:_LONGEST]
    return words if " " in words else f"{type(error).__name__}: {words}"


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
