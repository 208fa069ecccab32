"""Perplexity and divergence of several models on the same windows, paired.

All standard errors treat windows, not tokens, as the independent samples: tokens of one
window share their context.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import exp
from typing import TYPE_CHECKING, Any

from kvfold.arch.config import plain_config
from kvfold.arch.decoder import describe
from kvfold.arguments import callback, several
from kvfold.arguments import text as check_text
from kvfold.errors import CheckpointError, InputError
from kvfold.names import shown
from kvfold.progress import Progress, no_progress
from kvfold.quality.given import check_model, check_windows, vocabulary

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Quality:
    """One model on one text, against the first model of the comparison.

    Attributes:
        tokens: predicted tokens. nll: mean negative log-likelihood, nats per token.
        nats_lost: nll minus the first model's; ratio: exp of it (paired perplexity ratio).
        kl: mean KL(first || this) in nats per token; kl_p95, kl_p99: percentiles over tokens.
        top1: fraction of positions where both models' most likely token agrees.
        *_error: one standard error.
    """

    name: str
    text: str
    tokens: int
    nll: float
    perplexity: float
    perplexity_error: float
    nats_lost: float
    nats_lost_error: float
    ratio: float
    ratio_error: float
    kl: float
    kl_error: float
    kl_p95: float
    kl_p99: float
    top1: float
    kv_bytes_per_token: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    models: "Sequence[tuple[str, PreTrainedModel]]",
    windows: "torch.Tensor",
    text: str = "text",
    progress: Progress = no_progress,
) -> list[Quality]:
    """Score every model on ``windows`` (``[N, T]`` int64) and compare it with the first.

    Raises:
        InputError: for models that are none or do not share a vocabulary, or windows of another
            shape or dtype, or with ids beyond the vocabulary.

    >>> compare([("source", model), ("folded", folded)], windows)  # doctest: +SKIP
    """
    import torch

    models = several(models, "models", _named_model)
    if not models:
        raise InputError("no models to compare", "the first is the one to compare with")
    _check_vocabularies(models)
    windows = check_windows(windows, models[0][1])
    check_text(text, "text")
    callback(progress, "progress")
    samples: list[list[dict[str, torch.Tensor]]] = [[] for _ in models]
    with torch.inference_mode():
        for index, window in enumerate(windows):
            reference = None
            for position, (_, model) in enumerate(models):
                logits = _logits(model, window)
                reference = logits if reference is None else reference
                samples[position].append(score_window(logits, reference, window[1:]))
            progress(f"evaluating on {text}", index + 1, len(windows))
    first = torch.stack([sample["nll"] for sample in samples[0]])
    return [
        _summary(name, text, model, scored, first)
        for (name, model), scored in zip(models, samples, strict=True)
    ]


def _named_model(value: object, name: str) -> "tuple[str, PreTrainedModel]":
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise InputError(f"{name} {shown(value)}: expected pairs", 'models=[("a name", model)]')
    return check_text(value[0], name), check_model(value[1], name)


def _check_vocabularies(models: "Sequence[tuple[str, PreTrainedModel]]") -> None:
    sizes = {name: vocabulary(model) for name, model in models}
    if len(set(sizes.values())) > 1:
        raise InputError(
            f"the models have different vocabularies: {sizes}",
            "compare models that share one tokenizer",
        )


def _logits(model: "PreTrainedModel", window: "torch.Tensor") -> "torch.Tensor":
    """Log-probabilities ``[T - 1, vocabulary]`` in float32 of the tokens after the first."""
    import torch

    logits = model(window[None].to(model.device), use_cache=False).logits[0, :-1]
    result: torch.Tensor = logits.float().log_softmax(-1)
    return result


def divergence(logits: "torch.Tensor", reference: "torch.Tensor") -> "torch.Tensor":
    """KL(reference || logits) of every token, ``[…]`` of log-probabilities ``[…, vocabulary]``."""
    return (reference.exp() * (reference - logits)).sum(-1)


def score_window(
    logits: "torch.Tensor", reference: "torch.Tensor", targets: "torch.Tensor"
) -> "dict[str, torch.Tensor]":
    """One model on one window: nats per token, KL of every token, agreement.

    Args:
        logits, reference: log-probabilities ``[T, vocabulary]``, this model's and the first's.
        targets: the tokens that came, ``[T]``.
    """
    targets = targets.to(logits.device)
    same = logits is reference
    kl = divergence(logits, reference) if not same else logits.new_zeros(())
    return {
        "nll": -logits.gather(-1, targets[:, None])[:, 0].double().mean().cpu(),
        "kl": kl.double().expand(len(targets)).cpu(),
        "top1": (logits.argmax(-1) == reference.argmax(-1)).double().mean().cpu(),
    }


def _summary(
    name: str,
    text: str,
    model: "PreTrainedModel",
    scored: "list[dict[str, torch.Tensor]]",
    first: "torch.Tensor",
) -> Quality:
    import torch

    nll = torch.stack([window["nll"] for window in scored])
    kl = torch.stack([window["kl"] for window in scored])
    lost = nll - first
    mean, loss = float(nll.mean()), float(lost.mean())
    return Quality(
        name=name,
        text=text,
        tokens=kl.numel(),
        nll=mean,
        perplexity=exp(mean),
        perplexity_error=exp(mean) * standard_error(nll),
        nats_lost=loss,
        nats_lost_error=standard_error(lost),
        ratio=exp(loss),
        ratio_error=exp(loss) * standard_error(lost),
        kl=float(kl.mean()),
        kl_error=standard_error(kl.mean(-1)),
        kl_p95=float(kl.flatten().quantile(0.95)),
        kl_p99=float(kl.flatten().quantile(0.99)),
        top1=float(torch.stack([window["top1"] for window in scored]).mean()),
        kv_bytes_per_token=kv_bytes_per_token(model),
    )


def standard_error(samples: "torch.Tensor") -> float:
    """The standard error of the mean; 0 for a single sample, which has none to show."""
    return float(samples.std() / len(samples) ** 0.5) if len(samples) > 1 else 0.0


def kv_bytes_per_token(model: "PreTrainedModel", bits: int = 16) -> int:
    """Bytes that a token adds to the KV cache, by the model's config; 0 where it knows no heads."""
    try:
        decoder = describe(plain_config(model.config.get_text_config(decoder=True)))
    except CheckpointError:  # recurrent models
        return 0
    return decoder.kv_bytes_per_token(bits)
