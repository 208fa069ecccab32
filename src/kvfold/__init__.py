"""kvfold: how many key/value heads a transformer keeps.

The public names load when first used, so that ``import kvfold`` stays light and never imports
torch by itself.
"""

from kvfold.version import __version__

TYPE_CHECKING = False  # importing typing takes longer than all the rest

if TYPE_CHECKING:
    from typing import Any

    from kvfold.cache.fixed import FixedKVCache
    from kvfold.cache.kv import KVCache
    from kvfold.cache.latent import LatentCache
    from kvfold.engines.run import Verification, verify
    from kvfold.errors import KVFoldError
    from kvfold.fold.convert import convert
    from kvfold.fold.inspect import inspect
    from kvfold.fold.model import FoldedModel, fold_model
    from kvfold.geometry import AttentionGeometry
    from kvfold.healing.run import heal
    from kvfold.kernels.dispatch import attention, explain
    from kvfold.kernels.varlen import attention_varlen
    from kvfold.ops.evict import Evict
    from kvfold.ops.reference import merge
    from kvfold.ops.select import Select
    from kvfold.quality.run import evaluate
    from kvfold.quality.scores import Quality, compare

_HOMES = {
    "AttentionGeometry": "kvfold.geometry",
    "Evict": "kvfold.ops.evict",
    "FixedKVCache": "kvfold.cache.fixed",
    "FoldedModel": "kvfold.fold.model",
    "KVCache": "kvfold.cache.kv",
    "KVFoldError": "kvfold.errors",
    "LatentCache": "kvfold.cache.latent",
    "Quality": "kvfold.quality.scores",
    "Select": "kvfold.ops.select",
    "Verification": "kvfold.engines.run",
    "attention": "kvfold.kernels.dispatch",
    "attention_varlen": "kvfold.kernels.varlen",
    "compare": "kvfold.quality.scores",
    "convert": "kvfold.fold.convert",
    "evaluate": "kvfold.quality.run",
    "explain": "kvfold.kernels.dispatch",
    "fold_model": "kvfold.fold.model",
    "heal": "kvfold.healing.run",
    "inspect": "kvfold.fold.inspect",
    "merge": "kvfold.ops.reference",
    "verify": "kvfold.engines.run",
}

# Modules that users name after ``import kvfold``: ``kvfold.nn``, ``kvfold.transformers``.
_ROOMS = ("nn", "transformers")

__all__ = [
    "AttentionGeometry",
    "Evict",
    "FixedKVCache",
    "FoldedModel",
    "KVCache",
    "KVFoldError",
    "LatentCache",
    "Quality",
    "Select",
    "Verification",
    "__version__",
    "attention",
    "attention_varlen",
    "compare",
    "convert",
    "evaluate",
    "explain",
    "fold_model",
    "heal",
    "inspect",
    "merge",
    "verify",
]


def __getattr__(name: str) -> "Any":
    from importlib import import_module

    if name in _ROOMS:
        return import_module(f"kvfold.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'kvfold' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
