"""The gate: a result that is wrong has no speed."""

from dataclasses import dataclass

import torch

from kvfold.ops.reference import attend

_SLACK = 1e-5


@dataclass(frozen=True)
class Verdict:
    """The largest error of a result, and the largest allowed."""

    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        """False for NaN too."""
        return self.error <= self.allowed

    @property
    def reason(self) -> str:
        return f"error {self.error:.2g}, allowed {self.allowed:.2g}"


class Truth:
    """Attention in float64 over given keys and values, and how far PyTorch is from it.

    Args:
        q: ``[B, Hq, 1, D]`` bfloat16; k, v: ``[B, Hkv, S, D]``, what the cache holds, decoded.
        seen: bool ``[B, Hkv, S]``, those that attention is over; all of them by default.
    """

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        seen: torch.Tensor | None = None,
    ) -> None:
        batch, heads = k.shape[:2]
        groups = q.unflatten(1, (heads, -1))
        exact, plain = [], []
        for b in range(batch):
            for h in range(heads):  # one head at a time: float64 takes four times the memory
                own = slice(None) if seen is None else seen[b, h]
                one = groups[b, h][None], k[b, h, own][None, None], v[b, h, own][None, None]
                exact.append(attend(*(x.double() for x in one)).out[0])
                plain.append(_in_dtype(*(x.to(q.dtype) for x in one))[0])
        self._exact = torch.cat(exact).view(*q.shape[:3], -1)
        own_error = (torch.cat(plain).view(*q.shape[:3], -1) - self._exact).abs().max()
        # FlashAttention's criterion: twice the error of PyTorch in the same precision.
        self.allowed = 2 * float(own_error) + _SLACK

    def judge(self, out: torch.Tensor) -> Verdict:
        """Compare an output ``[B, Hq, 1, D]`` with the truth."""
        if out.shape != self._exact.shape:
            return Verdict(float("inf"), self.allowed)
        return Verdict(float((out.double() - self._exact).abs().max()), self.allowed)


def _in_dtype(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention with every step rounded to the inputs' dtype, as a plain program would do it."""
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
