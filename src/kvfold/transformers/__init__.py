"""Drop-in for transformers: an attention implementation named ``kvfold``, and a cache.

    import kvfold.transformers  # registers the name; changes nothing else

    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="kvfold")
    cache = kvfold.transformers.KVCache(model.config, dtype="int4")
    model.generate(**inputs, past_key_values=cache)

The implementation alone works with every transformers cache; it then reads plain tensors. With
``KVCache`` keys and values are stored as the kernels read them, in any format, and never copied.
"""

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from kvfold.errors import InputError
from kvfold.transformers.attend import attend
from kvfold.transformers.cache import KVCache, KVLayer

__all__ = ["NAME", "KVCache", "KVLayer", "attend", "check_implementation", "enable"]

NAME = "kvfold"


# Architectures without sdpa in transformers: their decoders do not say that they are causal.
_SILENT = ("bigbird_pegasus", "nllb-moe", "pegasus_x")


def _mask(*sizes: Any, config: Any = None, **options: Any) -> torch.Tensor | None:
    """The mask of ``sdpa``, which is left out where a module says itself that it is causal."""
    if getattr(config, "model_type", None) in _SILENT:
        options["allow_is_causal_skip"] = False
    return sdpa_mask(*sizes, config=config, **options)


def enable() -> None:
    """Register the implementation ``kvfold`` with transformers; importing this module does it.

    It patches nothing: models use it only when loaded with ``attn_implementation="kvfold"`` or
    told to by ``model.set_attn_implementation("kvfold")``.
    """
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, _mask)


def check_implementation(model: nn.Module) -> None:
    """Refuse a model that would decode the whole cache at every step.

    Raises:
        InputError: if the model does not use kvfold's attention.
    """
    used = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if used != NAME:
        raise InputError(
            f"the model uses {used!r} attention", "load it with attn_implementation='kvfold'"
        )


enable()
