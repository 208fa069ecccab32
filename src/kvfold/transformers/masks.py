"""Masks as transformers' models expect them of an attention implementation."""

from typing import Any

import torch
from transformers.masking_utils import causal_mask_function, eager_mask, sdpa_mask
from transformers.models.auto import modeling_auto

# Models without sdpa whose modules leave the mask to the implementation all the same.
_LEAVE_MASKS = {
    "flint",
    "gemma2",
    "gpt_oss",
    "granite_swa",
    "granitemoe_swa",
    "mimo_v2_flash",
    "t5gemma",
    "t5gemma_module",
    "vaultgemma",
}
# Models that know only sdpa, by name, to leave masks out; they slice queries where none is.
_ONLY_SDPA = {"gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"}


def mask_of(*sizes: Any, config: Any = None, **options: Any) -> Any:
    """The mask that a model reads: boolean or none as for sdpa, or additive as for eager.

    A model that was never run with sdpa may add the mask to its scores, extend it with others,
    or not say that it is causal; it always gets the additive mask of eager attention.
    """
    if _expects_eager(type(config), getattr(config, "model_type", None)):
        return eager_mask(*sizes, config=config, **options)
    if _is_step_of_fixed_cache(options):
        if _hides_nothing(options):
            return None
        # Numbers, which every layer adds as they are.
        return eager_mask(*sizes, config=config, **{**options, "dtype": torch.float32})
    return sdpa_mask(*sizes, config=config, **options)


def _expects_eager(config_class: Any, model_type: str | None) -> bool:
    if model_type in _ONLY_SDPA:
        return True
    return model_type not in _LEAVE_MASKS and not _supports_sdpa(config_class)


def _supports_sdpa(config_class: Any) -> bool:
    """Whether the model of a config does; true of those that transformers does not list."""
    for mapping in (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        modeling_auto.MODEL_MAPPING,
    ):
        if config_class in mapping:
            return bool(getattr(mapping[config_class], "_supports_sdpa", True))
    return True


def _is_step_of_fixed_cache(options: dict[str, Any]) -> bool:
    """Whether a mask is for one query over kvfold's own fixed cache, whose lengths are int32."""
    offset = options.get("q_offset")
    fixed = isinstance(offset, torch.Tensor) and offset.dtype == torch.int32
    return fixed and options.get("q_length") == 1


def _hides_nothing(options: dict[str, Any]) -> bool:
    """Whether a query sees all that a cache holds, which such a cache knows by itself."""
    if options.get("mask_function") is not causal_mask_function:
        return False
    padding = options.get("attention_mask")
    return padding is None or (not torch.compiler.is_compiling() and bool(padding.all()))
