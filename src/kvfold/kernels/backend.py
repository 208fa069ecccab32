"""What every backend is asked, and what it answers. ``registry`` lists them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from kvfold.kernels.limits import MAX_TOKENS
from kvfold.kernels.move import move_by_pytorch
from kvfold.kernels.selection import Chosen, Question, choose_by_pytorch
from kvfold.kernels.view import Angles, KVView, Positions
from kvfold.ops.options import FIELDS, Options

# Queries this many times fewer than keys are a decoding step: bound by memory, not arithmetic.
_DECODE_RATIO = 4

Found = tuple[torch.Tensor, torch.Tensor | None]


class Call(NamedTuple):
    """One call of attention, checked.

    Attributes:
        q: ``[B, Hq, T, D]``.
        tensors: keys ``[B, Hkv, S, D]`` and values ``[B, Hkv, S, Dv]``, or None if there are views.
        views: disjoint positions of the same sequences.
        lengths: of the sequences in ``views``; the last query stands at ``lengths[b] - 1``. Those
            of ``tensors`` are among the options.
        keys: S, or the most positions of a sequence.
        gradients: whether somebody waits for them.
        home: the name of the kernels of q's device.
        splits: of the keys, to override the rule of kernels that split them.
        out: where the output goes, ``[B, Hq, T, Dv]`` in q's dtype with contiguous rows; a new
            tensor if None.
        kept: what a backend keeps for the next call, which differs from this one in q, ``out`` and
            the rows of its view, as layers of a model do within a step, and in nothing else.
    """

    q: torch.Tensor
    tensors: tuple[torch.Tensor, torch.Tensor] | None
    views: Sequence[KVView]
    lengths: Positions
    options: Options
    num_kv_heads: int
    v_head_dim: int
    keys: int
    gradients: bool
    home: str
    return_lse: bool = False
    dropout: float = 0.0
    splits: int | None = None
    out: torch.Tensor | None = None
    kept: dict[str, Any] | None = None

    @property
    def few(self) -> bool:
        """Whether it is a step of decoding, for kernels that read each key and value once."""
        tokens = self.q.shape[2]
        return tokens <= MAX_TOKENS and tokens * _DECODE_RATIO <= self.keys


class Backend:
    """A way to compute attention.

    Attributes:
        name: what ``KVFOLD_BACKEND`` calls it.
        path: what ``explain`` calls it.
    """

    name: str
    path: str = "kernel"

    @property
    def knows(self) -> frozenset[str]:
        """The options that it can do something about: names of ``ops.options.FIELDS``."""
        return frozenset(FIELDS)

    def lacks(self, options: Options) -> str | None:
        """What was asked for that it does not know; None if it knows everything."""
        names = options.beyond(self.knows)
        return f"{self.name} has no {' and no '.join(names)}" if names else None

    def why_not(self, call: Call) -> str | None:
        """Why it cannot, or should not, compute this; None if it does."""
        raise NotImplementedError

    def why(self, call: Call) -> str:
        """Why it does; nothing, where that is what the one before it lacks."""
        return ""

    def attend(self, call: Call) -> Found:
        """The output ``[B, Hq, T, Dv]`` and, if it was asked for, the log-sum-exp.

        Who cannot write into ``call.out`` hands out another tensor: ``registry`` copies it.
        """
        raise NotImplementedError


class Kernels(Backend):
    """A backend that stores can be kept for: it also says how pages lie, and writes them.

    Attributes:
        max_dim: the largest head it reads.
        replays: whether a call reads lengths where they are, so that a CUDA graph or a compiled
            one can hold it.
        turns: whether ``append`` takes ``angles``.
        prompts: whether it takes many queries over pages.
    """

    max_dim: int
    replays: bool = False
    turns: bool = False
    prompts: bool = False

    def here(self, device: torch.device) -> bool:
        """Whether it has kernels for memory there."""
        raise NotImplementedError

    def packs(self, page_size: int) -> bool:
        """Whether it wants such pages packed (``layout``), and not as rows."""
        return False

    def append(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        view: KVView,
        angles: Angles | None = None,
        kept: dict[str, Any] | None = None,
    ) -> None:
        """Write ``[B, Hkv, T, D]`` and ``[B, Hkv, T, Dv]`` from the view's ends on.

        Positions without a page are skipped.

        Args:
            angles: the keys' rotary embedding, in the same pass; only where it ``turns``.
            kept: as in ``Call``, for calls that differ in k, v and the rows of the view.
        """
        raise NotImplementedError

    def move(self, view: KVView, sources: list[torch.Tensor]) -> None:
        """Move stored tokens as they are to where the view holds positions.

        Args:
            view: of one KV head. sources: int64, of each sequence as many as the view holds,
                ascending, none of them later than where it goes.
        """
        move_by_pytorch(view, sources)

    def choose(self, question: Question) -> Chosen:
        """Which pages a step of decoding reads."""
        return choose_by_pytorch(question)


def need_gradients(*tensors: torch.Tensor | None) -> bool:
    """Whether anyone waits for the gradient of one of these."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
