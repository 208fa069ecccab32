"""What healing minimises: the divergence from the teacher, token by token.

    L = (1 - c) τ² KL(p_t^τ || p_s^τ) + c CE(s, next token) + w · hidden

with p^τ = softmax(logits / τ) (Hinton et al., arXiv 1503.02531: τ² keeps the gradient's size).
The gradient with respect to the student's logits has a closed form,

    dL/ds = (1 - c) τ (p_s^τ - p_t^τ) + c (p_s - onehot),

so it is computed together with the loss, some tokens at a time; no array of the size of the
logits is kept for the backward pass besides the gradient itself.
"""

from dataclasses import dataclass
from typing import Any

import torch

_CHUNK_ELEMENTS = 2**24  # float32 logits looked at together: 64 MB


@dataclass(frozen=True)
class Objective:
    """The weights of the loss; see the module."""

    temperature: float = 1.0
    cross_entropy: float = 0.0
    hidden: float = 0.0


def distillation(
    student: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor, objective: Objective
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss summed over tokens, and the plain KL(teacher || student) summed over tokens.

    Args:
        student, teacher: logits ``[N, V]``, any floating dtype. targets: ``[N]``, next tokens.

    Returns:
        two scalars in float32; gradients flow to ``student`` from the first.

    >>> s = torch.zeros(1, 4, requires_grad=True)
    >>> loss, kl = distillation(s, torch.zeros(1, 4), torch.tensor([0]), Objective())
    >>> loss.item(), kl.item()
    (0.0, 0.0)
    """
    loss, kl = _Distillation.apply(  # type: ignore[no-untyped-call]
        student, teacher, targets, objective.temperature, objective.cross_entropy
    )
    return loss, kl


class _Distillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: torch.Tensor,
        teacher: torch.Tensor,
        targets: torch.Tensor,
        temperature: float,
        mix: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = max(1, _CHUNK_ELEMENTS // student.shape[-1])
        loss = student.new_zeros((), dtype=torch.float32)
        plain = loss.clone()
        gradients = []
        for s, t, target in zip(
            student.split(rows), teacher.split(rows), targets.split(rows), strict=True
        ):
            part, kl, gradient = _one_chunk(s, t, target, temperature, mix)
            loss, plain = loss + part, plain + kl
            gradients.append(gradient.to(student.dtype))
        ctx.save_for_backward(torch.cat(gradients))
        ctx.mark_non_differentiable(plain)
        return loss, plain

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outputs[0], None, None, None, None


def _one_chunk(
    student: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor, tau: float, mix: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, plain KL and gradient of some tokens."""
    s, t = student.float(), teacher.float()
    log_s, log_t = s.log_softmax(-1), t.log_softmax(-1)
    plain = (log_t.exp() * (log_t - log_s)).sum()
    if tau == 1.0:
        kl, gradient = plain, log_s.exp() - log_t.exp()
    else:
        soft_s, soft_t = (s / tau).log_softmax(-1), (t / tau).log_softmax(-1)
        kl = (soft_t.exp() * (soft_t - soft_s)).sum() * tau**2
        gradient = (soft_s.exp() - soft_t.exp()) * tau
    if not mix:
        return kl, plain, gradient
    entropy = -log_s.gather(-1, targets[:, None]).sum()
    hot = torch.zeros_like(s).scatter_(-1, targets[:, None], 1.0)
    loss = (1 - mix) * kl + mix * entropy
    return loss, plain, (1 - mix) * gradient + mix * (log_s.exp() - hot)


def hidden_error(student: tuple[torch.Tensor, ...], teacher: tuple[torch.Tensor, ...]) -> Any:
    """Squared error of the hidden states ``[B, T, C]`` after each layer, per token.

    Relative to the teacher's mean energy at each layer; tokens of giant norm (attention sinks)
    are damped by the square root of their energy above the median, as in ``fold.fit``.

    Returns:
        ``[B, T]``, the mean over layers.
    """
    total: Any = 0.0
    for s, t in zip(student[1:], teacher[1:], strict=True):
        energy = t.float().square().mean(-1)
        usual = energy.median().clamp_min(1e-30)
        error = (s.float() - t.float()).square().mean(-1)
        total = total + error * (energy / usual).clamp_min(1).rsqrt() / usual
    return total / (len(student) - 1)
