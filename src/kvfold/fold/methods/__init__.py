"""Folding methods. A new method is one new file here; nothing else is edited.

A method is a function ``(HeadGroup, torch.Generator) -> SharedHead`` decorated with
:func:`method`. Base code validates, regroups, runs it group by group, and skips groups of
one head, which are returned bit for bit.
"""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from kvfold.arguments import choice

if TYPE_CHECKING:
    from kvfold.fold.heads import FoldGroup


@dataclass(frozen=True)
class Method:
    """A registered method.

    Attributes:
        regroups: heads that fit together are found first; otherwise neighbours share, as in
            the GQA paper.
        candidate: ``auto`` may choose it.
    """

    name: str
    fold: "FoldGroup"
    summary: str
    paper: str
    regroups: bool
    candidate: bool


_METHODS: dict[str, Method] = {}
AUTO = "auto"
AUTO_SUMMARY = "per layer, the candidate that captures the most energy"


def method(
    name: str, *, paper: str = "", regroups: bool = True, candidate: bool = False
) -> Callable[["FoldGroup"], "FoldGroup"]:
    """Register a folding method; its docstring's first line is its summary."""

    def register(fold: "FoldGroup") -> "FoldGroup":
        summary = (fold.__doc__ or "").strip().splitlines()[0]
        _METHODS[name] = Method(name, fold, summary, paper, regroups, candidate)
        return fold

    return register


@cache
def all_methods() -> dict[str, Method]:
    """Every method by name (imports torch)."""
    for name in method_names():
        importlib.import_module(f"{__name__}.{name}")
    return dict(sorted(_METHODS.items()))


def method_names() -> list[str]:
    """The names of all methods but ``auto``, without importing any."""
    return sorted(
        module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")
    )


def check_method(name: str) -> None:
    """Refuse an unknown method, with the nearest name as a hint (no torch).

    Raises:
        InputError: if there is no such method.
    """
    choice(name, "--method", [AUTO, *method_names()])
