"""Folding a transformers model that is already in memory."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from kvfold.arch.carried import carry
from kvfold.arch.families import family_of
from kvfold.arch.latent import LAYOUTS
from kvfold.arch.target import Grouped, Latent, Target
from kvfold.arguments import callback, choice, text
from kvfold.checkpoint.pretrained import built_model
from kvfold.checkpoint.source import Checkpoint, TensorDict
from kvfold.errors import InputError
from kvfold.fold.layer import FoldPlan
from kvfold.fold.loop import fold_all
from kvfold.fold.methods import AUTO, check_method, methods_for
from kvfold.fold.passes import Calibration
from kvfold.fold.request import DEFAULT_STEPS, check_fit
from kvfold.numbers import FIT_STEPS, SEED
from kvfold.progress import Progress, no_progress
from kvfold.quality.device import COMPUTED_IN, pick_device, pick_dtype
from kvfold.quality.given import check_model, check_windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class FoldedModel:
    """A folded model and, layer by layer, what folding did."""

    model: "PreTrainedModel"
    record: list[dict[str, Any]]


def fold_model(
    model: "PreTrainedModel",
    num_kv_heads: int | Latent | None = None,
    method: str = AUTO,
    fit: str = "local",
    windows: torch.Tensor | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
    *,
    latent: str | None = None,
    layout: str = "deepseek_v3",
    device: str | None = None,
    dtype: str | None = None,
    fit_steps: int = DEFAULT_STEPS,
) -> FoldedModel:
    """Fold an in-memory causal language model to fewer KV heads or to a latent, in a copy.

    Args:
        model: of a supported family (``kvfold families``).
        num_kv_heads: a divisor of the model's number of KV heads.
        latent, layout: in place of it, as of :func:`kvfold.convert`: ``latent="160+32"``.
        windows: token ids ``[N, T]`` (int64) for calibration. Without them the fold is
            data-free and ``fit`` must be ``none``.
        device, dtype, fit_steps: as of :func:`kvfold.convert`; the folded model lies where
            ``model`` does.

    Raises:
        InputError: for anything that cannot be folded as asked.

    >>> folded = fold_model(model, 1, fit="none").model  # doctest: +SKIP
    """
    check_method(method)
    check_fit(fit)
    if windows is None and fit != "none":
        raise InputError(f"fit={fit!r} needs calibration windows", "pass windows, or fit='none'")
    check_model(model)
    windows = None if windows is None else check_windows(windows, model)
    where = pick_device(device)
    dtype = None if dtype is None else choice(dtype, "dtype", COMPUTED_IN)
    target = _target(num_kv_heads, latent, layout)
    seed, steps = SEED.check(seed, "seed"), FIT_STEPS.check(fit_steps, "fit_steps")
    callback(progress, "progress")
    config = model.config.to_dict()
    family = family_of(config)
    checkpoint = Checkpoint(type(model).__name__, config, TensorDict(model.state_dict()))
    target.geometry(checkpoint.geometry, checkpoint.family, config)
    methods_for(method, target, fit)
    folded = {**config}
    state = {name: checkpoint.tensor(name) for name in model.state_dict()}
    reports: list[dict[str, Any]] = []
    if not target.is_source(checkpoint.geometry):
        folded = target.config(family, config)
        others = {n: t for n, t in state.items() if n not in checkpoint.attention_names}
        state = carry(target, family, config, others)
        plan = FoldPlan(target, method, fit, seed, steps=steps)
        calibration = None
        if windows is not None:
            calibration = Calibration(windows, device=where, dtype=pick_dtype(dtype, where))
        for layer in fold_all(checkpoint, plan, calibration, progress=progress):
            state.update(layer.tensors)
            reports.append(layer.as_dict())
    own = {name: tensor.clone() for name, tensor in state.items()}
    built = built_model(folded, own, torch.float32).to(model.device)
    built.generation_config = model.generation_config
    return FoldedModel(built, reports)


def _target(asked: object, latent: object, layout: object) -> Target:
    layout = choice(layout, "layout", LAYOUTS)
    if latent is None:
        return asked if isinstance(asked, Latent) else Grouped.asked(asked, "num_kv_heads")
    if asked is not None:
        raise InputError("num_kv_heads and latent exclude each other", "give one of them")
    return replace(Latent.read(text(latent, "latent"), "latent"), layout=layout)
