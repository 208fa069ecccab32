"""Drop-in for transformers: an attention implementation named ``kvfold``, and a cache.

    import kvfold.transformers  # registers the name; changes nothing else

    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="kvfold")
    cache = kvfold.transformers.KVCache(model.config, dtype="int4")
    model.generate(**inputs, past_key_values=cache)

The implementation alone works with every transformers cache; it then reads plain tensors. With
``KVCache`` keys and values are stored as the kernels read them, in any format, and never copied.
"""

from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from kvfold.errors import InputError, UnsupportedError
from kvfold.transformers.attend import attend
from kvfold.transformers.cache import KVCache
from kvfold.transformers.fixed import FixedKVCache, FixedKVLayer
from kvfold.transformers.layer import KVLayer
from kvfold.transformers.linear import Prepacked, prepack
from kvfold.transformers.masks import mask_of

__all__ = [
    "NAME", "FixedKVCache", "FixedKVLayer", "KVCache", "KVLayer", "Prepacked", "attend",
    "check_implementation", "enable", "prepack",
]  # fmt: skip

NAME = "kvfold"


def enable() -> None:
    """Register the implementation ``kvfold`` with transformers; importing this module does it.

    It patches nothing: models use it only when loaded with ``attn_implementation="kvfold"`` or
    told to by ``model.set_attn_implementation("kvfold")``.
    """
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, mask_of)


def check_implementation(model: nn.Module) -> None:
    """Refuse a model that would decode the whole cache at every step.

    Raises:
        InputError: if the model does not use kvfold's attention.
        UnsupportedError: if it cannot: GPT-J, Falcon and a few more do not ask transformers for
            an implementation but have a table of their own.
    """
    used = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if used == NAME:
        return
    can_be_set = getattr(model, "_can_set_attn_implementation", None)
    if can_be_set is not None and not can_be_set():
        raise UnsupportedError(
            f"{type(model).__name__} takes no attention implementation from outside",
            "use transformers' own attention and cache for this model",
        )
    raise InputError(
        f"the model uses {used!r} attention", "load it with attn_implementation='kvfold'"
    )


enable()
