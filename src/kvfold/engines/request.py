"""What ``kvfold verify`` is asked to check, checked value by value. No torch."""

import os
import sys
from dataclasses import dataclass

from kvfold.arguments import choice, location, text
from kvfold.engines.known import ENGINES
from kvfold.errors import InputError
from kvfold.names import shown
from kvfold.numbers import ANSWER, NEAR, SECONDS
from kvfold.quality.request import DTYPES
from kvfold.requests import DEVICE, Choice, Listed, Model, Place, Request, Several, Text, option

#: Prose, code and a fact; the model goes on from each.
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n",
    "Water boils at a temperature of",
)
_PYTHON = "--python"
_CHECKOUT = "KVFOLD_LLAMA_CPP"  # an environment variable


def _python(value: object, name: str) -> str:
    """``ENGINE=PATH``: the Python that an engine is installed in."""
    engine, equals, path = text(value, name).partition("=")
    if not equals or not path:
        raise InputError(
            f"{name} {shown(value)}: expected an engine and a Python",
            "for instance vllm=/path/to/python",
        )
    choice(engine, name, ENGINES)
    _check_program(path, name)
    return f"{engine}={path}"


def _check_program(path: str, name: str) -> None:
    found = location(path, name)
    if not (found.is_file() and os.access(found, os.X_OK)):
        raise InputError(
            f"{name} {shown(path)}: no such program", "give the python of its environment"
        )


def _prompt(value: object, name: str) -> str:
    if not text(value, name).strip():
        raise InputError(f"{name} is empty", "give a few words to go on from")
    return str(value)


@dataclass(frozen=True)
class VerifyRequest(Request):
    """A checkpoint, engines, and what they are to go on from.

    Attributes:
        engines: all that are found by default. prompts: the built-in ones if there are none, and
            no file, whose lines are one each.
        tokens: greedy ones after each prompt. dtype: that engines compute in; transformers, the
            reference, takes float32.
        near: a difference counts as none where the reference's own two logits differ by no more.
        pythons: ``ENGINE=PATH`` for engines that are installed in other environments;
            ``vllm+kvfold`` is where ``vllm`` is, unless it has its own.
        llama_cpp: a checkout of llama.cpp, for its converter. timeout: seconds for each engine.

    Raises:
        InputError: naming the option and what it expects.
    """

    command = "verify"

    source: str = option("OUT", Model())
    engines: tuple[str, ...] | None = option(
        "--engines",
        Listed(Choice(ENGINES)),
        None,
        f"Of {', '.join(ENGINES)}.  [default: all that are found]",
        metavar="ENGINE,...",
    )
    prompts: tuple[str, ...] = option(
        "--prompt", Several(Text(_prompt)), (), "To go on from; repeatable.  [default: three]"
    )
    file: str | None = option("--prompts", Place(), None, "UTF-8 file with a prompt in each line.")
    tokens: int = option("--tokens", ANSWER, 32, "Greedy ones, after each prompt.")
    dtype: str = option("--dtype", Choice(DTYPES), "float32", "That engines compute in.")
    near: float = option(
        "--near", NEAR, 0.0, "A difference counts as none if transformers' two logits are so close."
    )
    pythons: tuple[str, ...] = option(
        _PYTHON,
        Several(Text(_python)),
        (),
        "The Python that an engine is installed in; repeatable.  [default: this one]",
        metavar="ENGINE=PATH",
    )
    llama_cpp: str | None = option(
        "--llama-cpp", Place(), None, "A checkout of llama.cpp, for its converter."
    )
    timeout: float = option("--timeout", SECONDS, 1800.0, "Seconds, for each engine.")
    device: str | None = option(
        "--device", DEVICE, None, "torch device of the reference.  [default: a GPU if there is one]"
    )

    @property
    def given(self) -> tuple[str, ...]:
        """The prompts besides those of the file."""
        return self.prompts or (() if self.file else PROMPTS)

    @property
    def checkout(self) -> str:
        """Where llama.cpp lies, or nothing."""
        return self.llama_cpp or os.environ.get(_CHECKOUT, "")

    def python_of(self, engine: str) -> str:
        """The Python to ask an engine with: its own, that of the one beside it, or this one.

        Raises:
            InputError: for one that the environment names and that is not there.
        """
        beside = ENGINES[engine].beside
        found = self._named_for(engine) or (self._named_for(beside) if beside else None)
        return found or sys.executable

    def _named_for(self, engine: str) -> str | None:
        """As given, or as the environment says."""
        for each in reversed(self.pythons):
            name, _, path = each.partition("=")
            if name == engine:
                return os.path.expanduser(path)  # noqa: PTH111  # links are kept: they say which
        variable = ENGINES[engine].variable
        path = os.environ.get(variable, "")
        if path:
            _check_program(path, variable)
        return path or None
