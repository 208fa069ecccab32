"""Keyword arguments of an attention module that kvfold's attention does not know."""

import sys
from collections.abc import Mapping
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import nn

from kvfold.errors import UnsupportedError

# Words of names that choose keys or change scores, in whichever architecture comes next.
_MATTERS = ("indices", "bias", "sink", "sinks")
_HARMLESS = {"position_ids", "cache_position"}  # in nearly every call


def refuse_unknown(module: nn.Module, given: Mapping[str, Any]) -> None:
    """Refuse tensors that the module's own attention would use.

    Much passes through a model's keyword arguments that no attention uses (position_ids, what a
    trainer adds …). What the module's own eager attention names matters, and what chooses keys or
    changes scores by its name.
    """
    if given.get("cache") is not None:
        raise UnsupportedError("kvfold's attention reads no paged cache of transformers'")
    for name, value in given.items():
        if name in _HARMLESS or not isinstance(value, torch.Tensor):
            continue
        if name.rpartition("_")[2] in _MATTERS or name in _eager_names(type(module).__module__):
            raise UnsupportedError(
                f"{type(module).__name__} gives its attention {name!r}, which kvfold does not know",
                "use attn_implementation='eager'",
            )


@cache
def _eager_names(source: str) -> frozenset[str]:
    """The arguments of the eager attention in a module of Python."""
    eager = getattr(sys.modules.get(source), "eager_attention_forward", None)
    return frozenset(signature(eager).parameters) if callable(eager) else frozenset()
