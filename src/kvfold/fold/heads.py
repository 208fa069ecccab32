"""What a folding method sees: one group of KV heads that will share one.

Biases ride along: the input is x~ = [x; 1], so every q, k, v row has C + 1 columns (X).
All tensors are float64.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from kvfold.arch.projections import AttentionWeights
from kvfold.fold.norms import NormedRows, NormWeights, WideRows
from kvfold.fold.pairs import Pairs
from kvfold.fold.sample import Sample
from kvfold.fold.statistics import AttendedKeys, LayerStatistics


@dataclass
class HeadGroup:
    """g KV heads and the R query heads of each.

    Attributes:
        q: ``[g, R, D, X]``; k: ``[g, D, X]``; v: ``[g, Dv, X]``; o: ``[g, R, C, Dv]``.
        moment: ``[X, X]``, E[x~ x~ᵀ] at the layer's input; ``[X]``, ones, without calibration.
        value_moment: ``[X, X]``, the same after x~ has been averaged with the attention weights:
            what V really sees.
        key_moments: ``[g, F, g, g]`` complex, or None; see ``LayerStatistics``.
        covariance: ``[X, X]``, or None; see ``LayerStatistics``.
        attended: of a group of all KV heads, or None; see ``LayerStatistics``.
        sample: some of the layer's inputs, or None.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    o: torch.Tensor
    moment: torch.Tensor
    value_moment: torch.Tensor
    pairs: Pairs
    norm: NormWeights | None = None
    key_moments: torch.Tensor | None = None
    covariance: torch.Tensor | None = None
    attended: AttendedKeys | None = None
    sample: Sample | None = None


@dataclass
class SharedHead:
    """The group's one KV head, and its query heads rewritten to fit.

    Attributes:
        q: ``[g, R, D, X]``; k: ``[D, X]``; v: ``[Dv, X]``; o: ``[g, R, C, Dv]``.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    o: torch.Tensor


FoldGroup = Callable[[HeadGroup, torch.Generator], SharedHead]


@dataclass
class LayerHeads:
    """All heads of a layer with bias columns, in float64; cut into groups to be folded.

    Attributes:
        q: ``[Hkv, R, D, X]``; k: ``[Hkv, D, X]``; v: ``[Hkv, Dv, X]``; o: ``[Hkv, R, C, Dv]``.
        rows: of heads that hold the weights of the norms behind them.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    o: torch.Tensor
    o_bias: torch.Tensor | None
    has_bias: bool
    pairs: Pairs
    norm: NormWeights | None
    rows: WideRows | NormedRows | None = None

    @classmethod
    def of(cls, weights: AttentionWeights, pairs: Pairs, norm: NormWeights | None) -> "LayerHeads":
        w = weights
        rows: WideRows | None = None
        group_size = w.q.shape[0] // w.k.shape[0]
        q, k = _with_bias(w.q, w.q_bias).unflatten(0, (-1, group_size)), _with_bias(w.k, w.k_bias)
        if w.q_norm is not None and w.k_norm is not None:
            rows = WideRows(q, k)
            q = w.q_norm.double().unflatten(0, (-1, group_size))[..., None] * q
            k = w.k_norm.double()[..., None] * k
        return cls(
            q=q,
            k=k,
            v=_with_bias(w.v, w.v_bias),
            o=w.o.double().unflatten(0, (-1, group_size)),
            o_bias=w.o_bias,
            has_bias=w.q_bias is not None or w.k_bias is not None or w.v_bias is not None,
            pairs=pairs,
            norm=norm,
            rows=rows,
        )

    def released(self, moment: torch.Tensor) -> "LayerHeads":
        """The same heads, each of the mean size of one, as norms leave them, with their weights:
        what is folded then may be scaled and turned as if there were none behind it."""
        if self.norm is None:
            return self
        rows = NormedRows.of(self.q, self.k, moment)
        q, k = self.norm.q[:, None] * rows.q, self.norm.k[:, None] * rows.k
        return replace(self, q=q, k=k, norm=None, rows=rows)

    @property
    def num_kv_heads(self) -> int:
        return self.k.shape[0]

    def group(self, heads: list[int], statistics: LayerStatistics) -> HeadGroup:
        keys = statistics.key_moments
        return HeadGroup(
            q=self.q[heads],
            k=self.k[heads],
            v=self.v[heads],
            o=self.o[heads],
            moment=statistics.moment,
            value_moment=statistics.value_moment,
            pairs=self.pairs,
            norm=self.norm,
            key_moments=None if keys is None else keys[heads][:, :, heads][:, :, :, heads],
            covariance=statistics.covariance,
            sample=statistics.sample,
            attended=statistics.attended if len(heads) == self.num_kv_heads else None,
        )

    def weights(
        self, folded: list[SharedHead], groups: list[list[int]], moment: torch.Tensor
    ) -> AttentionWeights:
        """Put folded groups side by side, query heads in the order of their groups.

        Args:
            groups: the heads of each. moment: of the layer's inputs.
        """
        q = torch.cat([head.q.flatten(0, 1) for head in folded])
        k = torch.stack([head.k for head in folded])
        v = torch.stack([head.v for head in folded])
        o = torch.cat([head.o.flatten(0, 1) for head in folded])
        biases, norms = {}, {}
        if self.rows:
            q, k, norms["q_norm"], norms["k_norm"] = self.rows.split(q, k, groups, moment)
        if self.has_bias:
            biases = {"q_bias": q[..., -1], "k_bias": k[..., -1], "v_bias": v[..., -1]}
        return AttentionWeights(
            q[..., :-1], k[..., :-1], v[..., :-1], o, o_bias=self.o_bias, **biases, **norms
        )


def _with_bias(weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    column = weight.new_zeros(weight.shape[:-1]) if bias is None else bias
    return torch.cat([weight.double(), column.double()[..., None]], dim=-1)
