"""One layer's attention weights, and the ways checkpoints store them.

The letters are those of the documentation: Hq query heads, Hkv KV heads, D head
size, Dv value head size, C hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from kvfold.geometry import AttentionGeometry

if TYPE_CHECKING:
    import torch

Shapes = dict[str, tuple[int, ...]]
Load = Callable[[str], "torch.Tensor"]


@dataclass
class AttentionWeights:
    """The projections of one attention layer, head by head.

    Attributes:
        q: ``[Hq, D, C]``; k: ``[Hkv, D, C]``; v: ``[Hkv, Dv, C]``; o: ``[Hq, C, Dv]``.
        q_bias: ``[Hq, D]``; k_bias: ``[Hkv, D]``; v_bias: ``[Hkv, Dv]``; o_bias: ``[C]``;
            each ``None`` where the checkpoint has none.
        q_norm: ``[Hq, D]``; k_norm: ``[Hkv, D]``: of norms over all heads at once, or ``None``.
        Query heads ``h * R … h * R + R - 1`` read KV head ``h``.
    """

    q: "torch.Tensor"
    k: "torch.Tensor"
    v: "torch.Tensor"
    o: "torch.Tensor"
    q_bias: "torch.Tensor | None" = None
    k_bias: "torch.Tensor | None" = None
    v_bias: "torch.Tensor | None" = None
    o_bias: "torch.Tensor | None" = None
    q_norm: "torch.Tensor | None" = None
    k_norm: "torch.Tensor | None" = None


class Projections(Protocol):
    """How an architecture stores q, k, v and o below its attention module.

    The weights it reads and writes are ``AttentionWeights``, or ``LatentWeights`` where a latent
    is cached.
    """

    @property
    def o(self) -> str:
        """The name of the output projection below the attention module."""

    @property
    def fixed(self) -> tuple[str, ...]:
        """Modules beside it that fitting leaves as they are."""

    def shapes(self, prefix: str, geometry: AttentionGeometry, names: set[str]) -> Shapes:
        """Every tensor this layout holds, with its shape; biases only if in ``names``."""

    def read(self, prefix: str, geometry: AttentionGeometry, load: Load, names: set[str]) -> Any:
        """Load one layer's weights."""

    def write(self, prefix: str, weights: Any) -> "dict[str, torch.Tensor]":
        """The inverse of :meth:`read`."""


def _heads(matrix: "torch.Tensor", count: int) -> "torch.Tensor":
    """``[count * D, C]`` -> ``[count, D, C]`` (or a bias ``[count * D]`` -> ``[count, D]``)."""
    return matrix.reshape(count, -1, *matrix.shape[1:])


def _flat(heads: "torch.Tensor") -> "torch.Tensor":
    """The inverse of :func:`_heads`."""
    return heads.reshape(-1, *heads.shape[2:])


def _output_heads(matrix: "torch.Tensor", count: int) -> "torch.Tensor":
    """``[C, Hq * Dv]`` -> ``[Hq, C, Dv]``."""
    return matrix.reshape(matrix.shape[0], count, -1).permute(1, 0, 2)


def _output_flat(heads: "torch.Tensor") -> "torch.Tensor":
    """The inverse of :func:`_output_heads`."""
    return heads.permute(1, 0, 2).reshape(heads.shape[1], -1)


@dataclass(frozen=True)
class SeparateProjections:
    """Four linear layers, weights ``[out, in]``: Llama and most of its relatives."""

    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    o: str = "o_proj"
    fixed: tuple[str, ...] = ()

    def shapes(self, prefix: str, geometry: AttentionGeometry, names: set[str]) -> Shapes:
        g = geometry
        rows = {
            self.q: g.num_heads * g.head_dim,
            self.k: g.num_kv_heads * g.head_dim,
            self.v: g.num_kv_heads * g.v_head_dim,
        }
        shapes: Shapes = {f"{prefix}.{n}.weight": (r, g.hidden_size) for n, r in rows.items()}
        shapes[f"{prefix}.{self.o}.weight"] = (g.hidden_size, g.num_heads * g.v_head_dim)
        biases = {f"{prefix}.{n}.bias": (r,) for n, r in {**rows, self.o: g.hidden_size}.items()}
        return shapes | {name: shape for name, shape in biases.items() if name in names}

    def read(
        self, prefix: str, geometry: AttentionGeometry, load: Load, names: set[str]
    ) -> AttentionWeights:
        def bias(part: str, count: int) -> "torch.Tensor | None":
            name = f"{prefix}.{part}.bias"
            return _heads(load(name), count) if name in names else None

        hq, hkv = geometry.num_heads, geometry.num_kv_heads
        o_bias = bias(self.o, 1)
        return AttentionWeights(
            q=_heads(load(f"{prefix}.{self.q}.weight"), hq),
            k=_heads(load(f"{prefix}.{self.k}.weight"), hkv),
            v=_heads(load(f"{prefix}.{self.v}.weight"), hkv),
            o=_output_heads(load(f"{prefix}.{self.o}.weight"), hq),
            q_bias=bias(self.q, hq),
            k_bias=bias(self.k, hkv),
            v_bias=bias(self.v, hkv),
            o_bias=None if o_bias is None else o_bias[0],
        )

    def write(self, prefix: str, weights: AttentionWeights) -> "dict[str, torch.Tensor]":
        w = weights
        tensors = {
            f"{prefix}.{self.q}.weight": _flat(w.q),
            f"{prefix}.{self.k}.weight": _flat(w.k),
            f"{prefix}.{self.v}.weight": _flat(w.v),
            f"{prefix}.{self.o}.weight": _output_flat(w.o),
        }
        for part, bias in ((self.q, w.q_bias), (self.k, w.k_bias), (self.v, w.v_bias)):
            if bias is not None:
                tensors[f"{prefix}.{part}.bias"] = _flat(bias)
        if w.o_bias is not None:
            tensors[f"{prefix}.{self.o}.bias"] = w.o_bias
        return tensors


@dataclass(frozen=True)
class NormedProjections(SeparateProjections):
    """The same, and RMS norms over all queries of a token and over all of its keys: OLMo 2."""

    q_norm: str = "q_norm"
    k_norm: str = "k_norm"

    def shapes(self, prefix: str, geometry: AttentionGeometry, names: set[str]) -> Shapes:
        """See :meth:`Projections.shapes`."""
        g = geometry
        norms: Shapes = {
            f"{prefix}.{self.q_norm}.weight": (g.num_heads * g.head_dim,),
            f"{prefix}.{self.k_norm}.weight": (g.num_kv_heads * g.head_dim,),
        }
        return super().shapes(prefix, geometry, names) | norms

    def read(
        self, prefix: str, geometry: AttentionGeometry, load: Load, names: set[str]
    ) -> AttentionWeights:
        """See :meth:`Projections.read`."""
        weights = super().read(prefix, geometry, load, names)
        weights.q_norm = _heads(load(f"{prefix}.{self.q_norm}.weight"), geometry.num_heads)
        weights.k_norm = _heads(load(f"{prefix}.{self.k_norm}.weight"), geometry.num_kv_heads)
        return weights

    def write(self, prefix: str, weights: AttentionWeights) -> "dict[str, torch.Tensor]":
        """The inverse of :meth:`read`."""
        tensors = super().write(prefix, weights)
        for part, norm in ((self.q_norm, weights.q_norm), (self.k_norm, weights.k_norm)):
            assert norm is not None
            tensors[f"{prefix}.{part}.weight"] = _flat(norm)
        return tensors


@dataclass(frozen=True)
class FusedProjections:
    """One matrix whose rows are all of q, then k, then v: Phi-3, GPT-2, GPTBigCode.

    ``transposed`` is for GPT-2's ``Conv1D``, which keeps weights as ``[in, out]``.
    """

    qkv: str = "qkv_proj"
    o: str = "o_proj"
    transposed: bool = False
    fixed: tuple[str, ...] = ()

    def shapes(self, prefix: str, geometry: AttentionGeometry, names: set[str]) -> Shapes:
        g = geometry
        rows = sum(self._rows(g))
        weights: Shapes = {
            f"{prefix}.{self.qkv}.weight": (rows, g.hidden_size),
            f"{prefix}.{self.o}.weight": (g.hidden_size, g.num_heads * g.v_head_dim),
        }
        if self.transposed:
            weights = {name: shape[::-1] for name, shape in weights.items()}
        biases: Shapes = {
            f"{prefix}.{self.qkv}.bias": (rows,),
            f"{prefix}.{self.o}.bias": (g.hidden_size,),
        }
        return weights | {name: shape for name, shape in biases.items() if name in names}

    def read(
        self, prefix: str, geometry: AttentionGeometry, load: Load, names: set[str]
    ) -> AttentionWeights:
        def weight(part: str) -> "torch.Tensor":
            matrix = load(f"{prefix}.{part}.weight")
            return matrix.T if self.transposed else matrix

        rows = self._rows(geometry)
        counts = geometry.num_heads, geometry.num_kv_heads, geometry.num_kv_heads
        q, k, v = map(_heads, weight(self.qkv).split(rows), counts)
        weights = AttentionWeights(q, k, v, _output_heads(weight(self.o), geometry.num_heads))
        if f"{prefix}.{self.qkv}.bias" in names:
            parts = load(f"{prefix}.{self.qkv}.bias").split(rows)
            weights.q_bias, weights.k_bias, weights.v_bias = map(_heads, parts, counts)
        if f"{prefix}.{self.o}.bias" in names:
            weights.o_bias = load(f"{prefix}.{self.o}.bias")
        return weights

    def write(self, prefix: str, weights: AttentionWeights) -> "dict[str, torch.Tensor]":
        import torch

        w = weights
        matrices = {
            f"{prefix}.{self.qkv}.weight": torch.cat([_flat(w.q), _flat(w.k), _flat(w.v)]),
            f"{prefix}.{self.o}.weight": _output_flat(w.o),
        }
        tensors = {n: m.T.contiguous() if self.transposed else m for n, m in matrices.items()}
        if w.q_bias is not None and w.k_bias is not None and w.v_bias is not None:
            biases = [_flat(w.q_bias), _flat(w.k_bias), _flat(w.v_bias)]
            tensors[f"{prefix}.{self.qkv}.bias"] = torch.cat(biases)
        if w.o_bias is not None:
            tensors[f"{prefix}.{self.o}.bias"] = w.o_bias
        return tensors

    @staticmethod
    def _rows(geometry: AttentionGeometry) -> list[int]:
        g = geometry
        kv_heads = g.num_kv_heads
        return [g.num_heads * g.head_dim, kv_heads * g.head_dim, kv_heads * g.v_head_dim]


@dataclass(frozen=True)
class GroupedProjections(FusedProjections):
    """One matrix whose rows are, for each KV head, its queries, its key and its value: Falcon."""

    qkv: str = "query_key_value"
    o: str = "dense"

    def read(
        self, prefix: str, geometry: AttentionGeometry, load: Load, names: set[str]
    ) -> AttentionWeights:
        """See :meth:`Projections.read`."""

        def parts(tensor: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor, torch.Tensor]":
            rows = (geometry.num_kv_heads, -1, geometry.head_dim, *tensor.shape[1:])
            groups = tensor.reshape(rows)  # [Hkv, R + 2, D, C]
            return groups[:, :-2].flatten(0, 1), groups[:, -2], groups[:, -1]

        output = _output_heads(load(f"{prefix}.{self.o}.weight"), geometry.num_heads)
        weights = AttentionWeights(*parts(load(f"{prefix}.{self.qkv}.weight")), output)
        if f"{prefix}.{self.qkv}.bias" in names:
            biases = parts(load(f"{prefix}.{self.qkv}.bias"))
            weights.q_bias, weights.k_bias, weights.v_bias = biases
        if f"{prefix}.{self.o}.bias" in names:
            weights.o_bias = load(f"{prefix}.{self.o}.bias")
        return weights

    def write(self, prefix: str, weights: AttentionWeights) -> "dict[str, torch.Tensor]":
        """The inverse of :meth:`read`."""
        import torch

        def fused(q: "torch.Tensor", k: "torch.Tensor", v: "torch.Tensor") -> "torch.Tensor":
            groups = torch.cat([q.unflatten(0, (len(k), -1)), k[:, None], v[:, None]], 1)
            return groups.flatten(0, 2)

        w = weights
        tensors = {
            f"{prefix}.{self.qkv}.weight": fused(w.q, w.k, w.v),
            f"{prefix}.{self.o}.weight": _output_flat(w.o),
        }
        if w.q_bias is not None and w.k_bias is not None and w.v_bias is not None:
            tensors[f"{prefix}.{self.qkv}.bias"] = fused(w.q_bias, w.k_bias, w.v_bias)
        if w.o_bias is not None:
            tensors[f"{prefix}.{self.o}.bias"] = w.o_bias
        return tensors
