"""What an engine is asked, and what its script may use. Needs only the standard library."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec

#: Says what is being done, for people who wait.
Stage = Callable[[str], None]
#: Greedy tokens after prompts, or the text they make where an engine tells no tokens.
Answer = list[list[int]] | list[str]


class AbsentError(Exception):
    """What is needed is not on this machine; the message says what, and how to get it."""


@dataclass(frozen=True)
class Task:
    """A checkpoint, and prompts to go on from.

    Attributes:
        folder: the Hugging Face folder, only read. work: an empty folder, removed afterwards.
        prompts: token ids; texts: the same in words. tokens: how many to add to each.
        dtype: ``float32``, ``bfloat16`` or ``float16``. model_type: as its config says.
        llama_cpp: a checkout of llama.cpp, or nothing.
    """

    folder: str = ""
    work: str = ""
    prompts: tuple[tuple[int, ...], ...] = ()
    texts: tuple[str, ...] = ()
    tokens: int = 0
    dtype: str = "float32"
    model_type: str = ""
    llama_cpp: str = ""

    @property
    def length(self) -> int:
        """Tokens of the longest prompt and what is added to it."""
        return max(map(len, self.prompts)) + self.tokens


def installed(module: str, *distributions: str) -> str:
    """A package's version.

    Raises:
        AbsentError: if it cannot be imported.
    """
    if find_spec(module) is None:
        raise AbsentError("not installed")
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "of unknown version"
