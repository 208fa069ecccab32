"""Architectures, found by themselves: a new one is one new file here; nothing else is edited.

Each file declares ``FAMILIES``; a tiny config in ``tests/toolbox/tiny.py`` makes every test run
over it. Anything special about a model is a field of its :class:`Family`, never an ``if``
somewhere else.
"""

import difflib
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from kvfold.arch.family import Family
from kvfold.arch.sizes import UNDECLARED
from kvfold.errors import UnsupportedError

_UNDECLARED = Family(("unknown",), keys=UNDECLARED)
_SEE = "`kvfold families` lists what can be folded"


def _declared() -> tuple[Family, ...]:
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    files = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return tuple(family for file in files for family in file.FAMILIES)


_DECLARED = _declared()
FAMILIES = tuple(family for family in _DECLARED if not family.unfoldable)
BY_TYPE = {name: family for family in _DECLARED for name in family.model_types}
# Architectures people will try, with the reason they cannot be folded and what to do.
REFUSALS = {
    name: (family.unfoldable, family.instead)
    for name, family in BY_TYPE.items()
    if family.unfoldable
}


def described_as(config: Mapping[str, Any]) -> Family:
    """The family that describes a config, or what most are like where none is declared."""
    return BY_TYPE.get(str(config.get("model_type")), _UNDECLARED)


def known_family(config: Mapping[str, Any]) -> Family:
    """The family of a config that can be folded, or is what folds are stored as.

    Raises:
        UnsupportedError: see :func:`family_of`.
    """
    family = described_as(config)
    return family if family.opens(config) else family_of(config)


def can_be_opened(config: Mapping[str, Any]) -> bool:
    """Whether :func:`known_family` has a family for a config."""
    try:
        known_family(config)
    except UnsupportedError:
        return False
    return True


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a config that can be folded.

    Raises:
        UnsupportedError: naming the architecture, why it cannot be folded, and what to do.
    """
    model_type = config.get("model_type")
    family = BY_TYPE.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        foldable = [name for each in FAMILIES for name in each.model_types]
        near = difflib.get_close_matches(str(model_type), foldable, n=1)
        guess = f"did you mean {near[0]}? " if near else ""
        raise UnsupportedError(f"unknown model_type {model_type!r} in config.json", guess + _SEE)
    if family.unfoldable:
        raise UnsupportedError(
            f"model_type {model_type} cannot be folded: {family.unfoldable}",
            family.instead or _SEE,
        )
    reason = family.refuse(config)
    if reason:
        raise UnsupportedError(f"this {model_type} model cannot be folded: {reason}", _SEE)
    return family
