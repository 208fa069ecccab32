"""What a run leaves behind: its files' names, the command that repeats it, versions. No torch."""

import platform
import shlex
from importlib import metadata
from typing import Any

from kvfold.requests import Flag, Option, Request, Several, options_of

RECORD = "kvfold.json"  # in every folder that is made
METRICS = "healing.jsonl"  # beside it, of healing: a line for every step
DEMO = "demo.json"  # in the demo's folder, instead


def versions() -> dict[str, str]:
    """Versions of everything that touches the numbers."""
    packages = ("kvfold", "torch", "transformers", "safetensors", "numpy")
    return {"python": platform.python_version()} | {
        name: metadata.version(name) for name in packages
    }


def command_line(request: Request, *, brief: bool = False) -> str:
    """The command that repeats a request (to a folder called OUT, if it makes one).

    Args:
        brief: leave out what is as it would be by default.
    """
    arguments: list[str] = []
    words: list[str] = []
    for name, option in options_of(type(request)).items():
        value = getattr(request, name)
        if option.is_argument:
            arguments += _each(option, value)
        elif not (brief and value == option.default):
            words += _given(option, value)
    arguments += ["OUT"] if request.makes_folder else []
    ends = any(word.startswith("-") for word in arguments)  # else they would be taken for options
    words = [*words, "--", *arguments] if ends else [*arguments, *words]
    return shlex.join(["kvfold", *request.command.split(), *words])


def _each(option: Option, value: Any) -> list[str]:
    """The words of one or several values."""
    if value is None:
        return []
    if isinstance(option.kind, Several):
        return [option.kind.each.written(each) for each in value]
    return [option.kind.written(value)]


def _given(option: Option, value: Any) -> list[str]:
    """The words that give an option a value; none for what a command without them means."""
    if isinstance(option.kind, Flag):
        return [option.name] if value else []
    if option.off is not None and value == option.off.value:
        return [option.off.name]
    return [word for each in _each(option, value) for word in (option.name, each)]
