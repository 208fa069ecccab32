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

from kvfold.arch.target import Latent, Target
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
        candidate: ``auto`` may choose it: for targets and fits that it ``suits``.
    """

    name: str
    fold: Callable[..., Any]
    summary: str
    paper: str
    targets: tuple[type, ...]
    regroups: bool
    candidate: bool
    suits: Callable[[Target, str], bool]


def _any(target: Target, fit: str) -> bool:
    return True


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
    suits: Callable[[Target, str], bool] = _any,
) -> Callable[[Fold], Fold]:
    """Register a folding method; its docstring's first line is its summary."""

    def register(fold: Fold) -> Fold:
        summary = (fold.__doc__ or "").strip().splitlines()[0]
        _METHODS[name] = Method(name, fold, summary, paper, targets, regroups, candidate, suits)
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


def methods_for(name: str, target: Target, fit: str) -> list[Method]:
    """The named method, or those that ``auto`` chooses from (imports torch).

    Args:
        fit: a name in ``fold.fit.FITS``: what is the best closed form need not be the best to fit.

    Raises:
        UnsupportedError: if it cannot make the target, naming those that can.
    """
    able = {key: each for key, each in all_methods().items() if isinstance(target, each.targets)}
    if name != AUTO and name not in able:
        raise UnsupportedError(
            f"--method {name} cannot make {target.label}",
            f"those that can: {', '.join([AUTO, *able])}",
        )
    if name != AUTO:
        return [able[name]]
    return [each for each in able.values() if each.candidate and each.suits(target, fit)]


def is_fitted_with_gaps(target: Target, fit: str) -> bool:
    """Whether layers will be fitted to latents that keep every so-manieth rotary frequency.

    Fitted, these lose least from where TransMLA begins, whose closed form loses more than others
    (``benchmarks/README.md``: 0.19 nats and 0.33 at 4,096 tokens beside 0.22 and 0.75).
    """
    return isinstance(target, Latent) and target.stride > 1 and fit == "local"
