"""Folding methods. A new method is one new file here; nothing else is edited.

A method is a function decorated with :func:`method`, which says what targets it can make
(``arch.target``). To make ``Grouped`` it is a function ``(HeadGroup, torch.Generator) ->
SharedHead``: base code validates, regroups, runs it group by group, and skips groups of one head,
which are returned bit for bit. To make ``Latent`` it is a function ``(HeadGroup, LatentSizes,
torch.Generator) -> SharedLatent`` of all heads of a layer (``fold.latents``).
"""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

from kvfold.arch.target import Target
from kvfold.arguments import choice
from kvfold.errors import UnsupportedError

Fold = TypeVar("Fold", bound=Callable[..., Any])


@dataclass(frozen=True)
class Method:
    """A registered method.

    Attributes:
        fold: what makes them; its arguments are those of the targets' kind.
        targets: the kinds of target that it can make.
        regroups: heads that fit together are found first; otherwise neighbours share, as in
            the GQA paper.
        candidate: ``auto`` may choose it.
    """

    name: str
    fold: Callable[..., Any]
    summary: str
    paper: str
    targets: tuple[type, ...]
    regroups: bool
    candidate: bool


_METHODS: dict[str, Method] = {}
AUTO = "auto"
AUTO_SUMMARY = "per layer, the candidate that captures the most energy"


def method(
    name: str,
    *,
    targets: tuple[type, ...],
    paper: str = "",
    regroups: bool = True,
    candidate: bool = False,
) -> Callable[[Fold], Fold]:
    """Register a folding method; its docstring's first line is its summary."""

    def register(fold: Fold) -> Fold:
        summary = (fold.__doc__ or "").strip().splitlines()[0]
        _METHODS[name] = Method(name, fold, summary, paper, targets, regroups, candidate)
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


def methods_for(name: str, target: Target) -> list[Method]:
    """The named method, or those that ``auto`` chooses from (imports torch).

    Raises:
        UnsupportedError: if it cannot make the target, naming those that can.
    """
    able = {key: each for key, each in all_methods().items() if isinstance(target, each.targets)}
    if name != AUTO and name not in able:
        raise UnsupportedError(
            f"--method {name} cannot make {target.label}",
            f"those that can: {', '.join([AUTO, *able])}",
        )
    return [each for each in able.values() if each.candidate] if name == AUTO else [able[name]]
