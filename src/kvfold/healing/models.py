"""The student and its teacher: loading, what is trained, and at what rate."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kvfold.arch.families import known_family
from kvfold.arch.family import Family
from kvfold.checkpoint.pretrained import load_config, load_model
from kvfold.checkpoint.source import Checkpoint, TensorDict, open_checkpoint, resolve
from kvfold.errors import CheckpointError, InputError
from kvfold.healing.balance import balanced_tensors
from kvfold.healing.placing import own_parts
from kvfold.healing.request import HealRequest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LORA_ALPHA_PER_RANK = 2


def load_teacher(request: HealRequest, dtype: torch.dtype) -> "PreTrainedModel":
    """The frozen source, in the dtype that is computed with."""
    return _load(request.teacher, dtype).requires_grad_(False)


def use_kvfold(model: Any) -> None:
    """Have a model attend as kvfold does, whose gradients CPUs have sooner, if it takes that."""
    import kvfold.transformers

    if model.config._attn_implementation == "sdpa":
        kvfold.transformers.enable()
        model.set_attn_implementation(kvfold.transformers.NAME)


def load_student(
    request: HealRequest, replaced: dict[str, torch.Tensor] | None = None
) -> "PreTrainedModel":
    """The folded model in float32 (its master weights), balanced; only what is trained moves.

    Args:
        replaced: tensors that the local stage has changed.
    """
    model = _load(request.folded, torch.float32)
    if replaced:
        own = own_parts(open_checkpoint(resolve(request.folded)), model)
        unknown = sorted(replaced.keys() - own.keys())
        if unknown:
            raise CheckpointError(
                f"{request.folded} has no tensor {unknown[0]}, which the local stage has kept",
                "what an interrupted run left is damaged; --force starts over",
            )
        state = {own[name].name: tensor.float() for name, tensor in replaced.items()}
        model.load_state_dict(state, strict=False)
    checkpoint = Checkpoint("the folded model", model.config.to_dict(), TensorDict(_own(model)))
    model.load_state_dict(balanced_tensors(checkpoint), strict=False)
    attention = checkpoint.family.attention_parameters()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(request.train == "all" or bool(attention.search(name)))
    if request.lora_rank:
        model = _with_lora(model, checkpoint.family, request.lora_rank, request.seed)
    if request.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()  # transformers checkpoints only in training mode; dropout is off anyway
    return model


def _load(source: str, dtype: torch.dtype) -> "PreTrainedModel":
    folder = resolve(source)
    config = load_config(folder)
    for name in vars(config):  # healing is deterministic: distillation needs no dropout
        if re.fullmatch(r"(attention|attn|resid|embd|hidden|residual)_?(dropout|pdrop)", name):
            setattr(config, name, 0.0)
    return load_model(folder, dtype, config).eval()


def _own(model: "PreTrainedModel") -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def _with_lora(model: Any, family: Family, rank: int, seed: int) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise InputError(
            "--lora-rank needs the peft library, which is not installed",
            "pip install 'kvfold[heal]', or drop --lora-rank",
        ) from error
    inside = family.attention_parameters()
    targets = [
        name
        for name, module in model.named_modules()
        if inside.search(name) and type(module).__name__ in ("Linear", "Conv1D")
    ]
    config = LoraConfig(
        r=rank, lora_alpha=_LORA_ALPHA_PER_RANK * rank, target_modules=targets, lora_dropout=0.0
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def without_lora(model: Any) -> Any:
    """The plain model, with any LoRA weights merged into it."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a peak learning rate."""

    lr: float
    parameters: list[torch.nn.Parameter]


def parameter_groups(model: Any, family: Family, request: HealRequest) -> list[ParameterGroup]:
    """Attention at ``lr``, everything else that is trained at ``lr_rest``."""
    inside = family.attention_parameters()
    attention: list[torch.nn.Parameter] = []
    rest: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (attention if inside.search(name) else rest).append(parameter)
    groups = [ParameterGroup(request.lr, attention), ParameterGroup(request.lr_rest, rest)]
    return [group for group in groups if group.parameters]


def family_of_model(model: Any) -> Family:
    """The family of a model in memory, with or without LoRA around it."""
    return known_family(model.config.to_dict())


def decoder_layers(model: Any, family: Family) -> list[torch.nn.Module]:
    """The model's decoder layers: the units that are sharded."""
    pattern = family.decoder_layers()
    return [module for name, module in model.named_modules() if pattern.search(name)]
