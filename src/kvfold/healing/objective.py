"""What healing minimises: the divergence from the teacher, token by token.

    L = (1 - c) τ² KL(p_t^τ || p_s^τ) + c CE(s, next token) + w · hidden

with p^τ = softmax(logits / τ) (Hinton et al., arXiv 1503.02531: τ² keeps the gradient's size).
The gradient with respect to the student's logits has a closed form,

    dL/ds = (1 - c) τ (p_s^τ - p_t^τ) + c (p_s - onehot),

so it is computed together with the loss, some tokens at a time; no array of the size of the
logits is kept for the backward pass besides the gradient itself. On a CPU so few tokens that their
logits stay in its caches: each is looked at ten times over.
"""

from dataclasses import dataclass
from typing import Any

import torch

_CHUNK_ELEMENTS = 2**24  # float32 logits looked at together: 64 MB
_CHUNK_ELEMENTS_CPU = 2**20


@dataclass(frozen=True)
class Objective:
    """The weights of the loss; see the module."""

    temperature: float = 1.0
    cross_entropy: float = 0.0
    hidden: float = 0.0


def distillation(
    student: torch.Tensor,
    teacher: torch.Tensor,
    targets: torch.Tensor,
    objective: Objective,
    counted: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss summed over tokens, and the plain KL(teacher || student) summed over tokens.

    Args:
        student, teacher: logits ``[N, V]``, any floating dtype. targets: ``[N]``, next tokens.
        counted: ``[N]`` bool, which tokens count; all by default. (Taking them out of the logits
            beforehand would copy those, and scatter their gradient.)

    Returns:
        two scalars in float32; gradients flow to ``student`` from the first.

    >>> s = torch.zeros(1, 4, requires_grad=True)
    >>> loss, kl = distillation(s, torch.zeros(1, 4), torch.tensor([0]), Objective())
    >>> loss.item(), kl.item()
    (0.0, 0.0)
    """
    if counted is None:
        counted = torch.ones_like(targets, dtype=torch.bool)
    loss, kl = _Distillation.apply(  # type: ignore[no-untyped-call]
        student, teacher, targets, counted, objective.temperature, objective.cross_entropy
    )
    return loss, kl


class _Distillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: torch.Tensor,
        teacher: torch.Tensor,
        targets: torch.Tensor,
        counted: torch.Tensor,
        temperature: float,
        mix: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        limit = _CHUNK_ELEMENTS_CPU if student.device.type == "cpu" else _CHUNK_ELEMENTS
        rows = max(1, limit // student.shape[-1])
        gradient = torch.empty_like(student)
        sums = student.new_zeros(2, dtype=torch.float32)
        for s, t, target, counts, out in zip(
            *(each.split(rows) for each in (student, teacher, targets, counted, gradient)),
            strict=True,
        ):
            sums += _one_chunk(s, t, target, counts.float(), temperature, mix, out)
        ctx.save_for_backward(gradient)
        loss, plain = sums[0].clone(), sums[1].clone()
        ctx.mark_non_differentiable(plain)
        return loss, plain

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * outputs[0], None, None, None, None, None


def _one_chunk(
    student: torch.Tensor,
    teacher: torch.Tensor,
    targets: torch.Tensor,
    counts: torch.Tensor,
    tau: float,
    mix: float,
    out: torch.Tensor,
) -> torch.Tensor:
    """Loss and plain KL ``[2]`` of the tokens that count; their gradient is written to ``out``."""
    s, t, targets = student.float(), teacher.float(), targets[:, None]
    log_s = s.log_softmax(-1)
    entropy = -log_s.gather(-1, targets)[:, 0]
    p_s = log_s.exp() if mix else None
    plain, gradient = _divergence(log_s, t.log_softmax(-1))
    kl = plain
    if tau != 1.0:
        kl, gradient = _divergence((s / tau).log_softmax(-1), (t / tau).log_softmax(-1))
        kl, gradient = kl * tau**2, gradient.mul_(tau)
    if p_s is not None:
        gradient.mul_(1 - mix).add_(p_s, alpha=mix)
        gradient.scatter_add_(-1, targets, torch.full_like(gradient[:, :1], -mix))
    out.copy_(gradient.mul_(counts[:, None]))
    return torch.stack([(1 - mix) * kl + mix * entropy, plain]) @ counts


def _divergence(log_s: torch.Tensor, log_t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(t || s) of each token, and its gradient p_s - p_t; both arguments are used up."""
    p_t = log_t.exp()
    kl = torch.linalg.vecdot(p_t, log_t.sub_(log_s))
    return kl, log_s.exp_().sub_(p_t)


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
