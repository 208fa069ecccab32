"""What a method makes of a whole layer for latent attention: one latent, one rotary key.

As in ``fold.heads`` the input is x~ = [x; 1], so that biases ride along, in X = C + 1 columns of
float64.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from kvfold.fold.heads import HeadGroup


@dataclass(frozen=True)
class LatentSizes:
    """How much room a layer has.

    Attributes:
        latent: numbers of the latent that hold content (n); one more of the rank holds a 1.
        nope: numbers of each query head that may read the latent (N), at most.
        frequencies: which of the layer's rotary frequencies the rotary key has, highest first;
            none in a layer without rotary.
    """

    latent: int
    nope: int
    frequencies: tuple[int, ...]


@dataclass
class SharedLatent:
    """The layer's latent c = down x~, its rotary key, and what reads them.

    The scores of query head h, before they are scaled as the *source* scales its own, are
    q_nope_h . up_k_h [c; 1] + q_rope_h . R k_rope; its output is o_h up_v_h [c; 1], averaged.

    Attributes:
        q_rope: ``[Hq, 2 F', X]``, the queries of the rotary key, half-split: dimensions j and
            j + F' turn by the j-th of ``LatentSizes.frequencies``.
        k_rope: ``[2 F', X]``, the one rotary key.
        q_nope: ``[Hq, N, X]``, the queries' position-free part; N up to ``LatentSizes.nope``.
        down: ``[n, X]``, the latent; n up to ``LatentSizes.latent``.
        up_k: ``[Hq, N, n + 1]``, position-free keys of [c; 1].
        up_v: ``[Hq, Dv, n + 1]``, values of [c; 1].
        o: ``[Hq, C, Dv]``.
    """

    q_rope: torch.Tensor
    k_rope: torch.Tensor
    q_nope: torch.Tensor
    down: torch.Tensor
    up_k: torch.Tensor
    up_v: torch.Tensor
    o: torch.Tensor


# All KV heads of a layer are one group here.
FoldLatent = Callable[[HeadGroup, LatentSizes, torch.Generator], SharedLatent]
