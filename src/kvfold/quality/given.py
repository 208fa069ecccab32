"""Models and token ids that callers give, checked before anything is computed with them."""

from typing import TYPE_CHECKING, Any

from kvfold.arch.decoder import learned_positions
from kvfold.errors import InputError
from kvfold.names import shown

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def check_model(model: Any, name: str = "model") -> "PreTrainedModel":
    """A causal language model of transformers, with its weights.

    Raises:
        InputError: for anything else.
    """
    import torch

    hint = "AutoModelForCausalLM.from_pretrained(...) makes one"
    config = getattr(model, "config", None)
    if not isinstance(model, torch.nn.Module) or not hasattr(config, "to_dict"):
        raise InputError(f"{name} {shown(model)}: expected a model of transformers", hint)
    if not isinstance(vocabulary(model), int):
        raise InputError(f"{name} ({type(model).__name__}) has no vocabulary", hint)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise InputError(f"{name} ({type(model).__name__}) is on device meta: it has no weights",
                         "load it on a device that holds numbers")  # fmt: skip
    found: PreTrainedModel = model
    return found


def vocabulary(model: Any) -> Any:
    """How many tokens a model knows; of a model of more than text, its text half."""
    config = model.config
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    return getattr(text, "vocab_size", None)


def check_windows(windows: Any, model: Any, name: str = "windows") -> "torch.Tensor":
    """Token ids ``[N, T]`` that a model can read.

    Args:
        model: one that :func:`check_model` has passed.

    Raises:
        InputError: for another shape or dtype, ids beyond the vocabulary, or windows beyond the
            positions that the model has learned.
    """
    import torch

    hint = "pass token ids [N, T], int64, as torch.tensor(tokenizer(text).input_ids)[None]"
    if not isinstance(windows, torch.Tensor):
        raise InputError(f"{name} {shown(windows)}: expected a tensor", hint)
    shape = list(windows.shape)
    if windows.dtype not in (torch.int64, torch.int32):
        raise InputError(f"{name} of {windows.dtype}: expected int64", hint)
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise InputError(f"{name} of shape {shape}: expected [N, T], N at least 1, T 2", hint)
    if windows.is_meta:
        raise InputError(f"{name} are on device meta: they hold no numbers", hint)
    low, high, size = int(windows.min()), int(windows.max()), vocabulary(model)
    if low < 0 or high >= size:
        raise InputError(
            f"{name} hold token ids from {low} to {high}; the model has {size}, from 0",
            "use the model's own tokenizer",
        )
    positions = learned_positions(model.config.to_dict())
    if positions is not None and windows.shape[1] > positions:
        raise InputError(
            f"{name} of shape {shape}: the model has {positions} positions", "use shorter windows"
        )
    return windows.long()
