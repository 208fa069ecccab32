"""Folding a layer to latent attention: one latent and one rotary key for all heads."""

from dataclasses import replace
from functools import cached_property

import torch

from kvfold.arch.latent import LatentWeights
from kvfold.arch.target import Latent
from kvfold.fold.constant import constant_direction, constant_error, with_constant
from kvfold.fold.energy import Energy
from kvfold.fold.heads import LayerHeads
from kvfold.fold.latent_energy import latent_energy
from kvfold.fold.latents import LatentSizes, SharedLatent
from kvfold.fold.methods import Method
from kvfold.fold.statistics import LayerStatistics
from kvfold.fold.stored_layer import StoredLayer
from kvfold.geometry import LatentGeometry

_INPUT_NORM = "input_layernorm.weight"


class LatentFold:
    """Folds one layer by any method that makes a latent of all its heads."""

    def __init__(
        self, layer: StoredLayer, heads: LayerHeads, target: Latent, statistics: LayerStatistics
    ) -> None:
        checkpoint = layer.checkpoint
        self._heads, self._target, self._statistics = heads, target, statistics
        self._layer, self._scale = layer, layer.scale
        self._residual = checkpoint.family.residual_factor(checkpoint.config)
        self._geometry = target.geometry(checkpoint.geometry, checkpoint.family, checkpoint.config)

    @property
    def _sizes(self) -> LatentSizes:
        frequencies = self._target.frequencies(self._heads.pairs.rotary_dim)
        return LatentSizes(self._target.rank - 1, self._geometry.qk_nope_head_dim, frequencies)

    def groups(self, method: Method) -> list[list[int]]:
        """All heads share."""
        return [list(range(self._heads.num_kv_heads))]

    def by(self, method: Method, seed: int) -> tuple[LatentWeights, Energy]:
        """The latent's weights, float64, and what they keep."""
        generator = torch.Generator().manual_seed(seed)
        group = self._heads.group(self.groups(method)[0], self._statistics)
        shared = method.fold(group, self._sizes, generator)
        energy = latent_energy(group, shared)
        return self._weights(shared), energy

    def _weights(self, shared: SharedLatent) -> LatentWeights:
        """As they are stored: scaled, padded, and through the norm of the latent."""
        shared = _scaled(shared, self._scale * self._geometry.head_dim**0.5)
        shared = _padded(shared, self._geometry)
        shared = replace(shared, o=shared.o * self._residual)
        o_bias = self._heads.o_bias
        o_bias = None if o_bias is None else o_bias.double() * self._residual
        weights = with_constant(shared, o_bias, self._constant, self._statistics.moment)
        return _in_two_steps(weights, self._norm) if self._target.stored.two_steps else weights

    @cached_property
    def _constant(self) -> torch.Tensor | None:
        """What stands for a constant; None where there are biases."""
        if self._target.stored.bias:
            return None
        return constant_direction(self._statistics.moment, self._statistics.value_moment)

    @property
    def constant_error(self) -> float | None:
        """See :class:`kvfold.fold.layer.LayerReport`."""
        if self._constant is None:
            return None
        return constant_error(self._constant, self._statistics.moment)

    @property
    def _norm(self) -> torch.Tensor:
        """The weight of the norm before the layer's attention."""
        name = f"{self._layer.prefix}{_INPUT_NORM}"
        return self._layer.tensor(name).to(self._heads.q.device, torch.float64)


def _in_two_steps(weights: LatentWeights, norm: torch.Tensor) -> LatentWeights:
    """Queries through a latent of their own, whose norm changes nothing.

    The layer's input is x = w n with rms(n) = 1, so what is made of it by diag(1 / w) is of that
    size already: q x = (q diag(w)) (diag(1 / w) x).
    """
    inverse = torch.where(norm == 0, torch.zeros_like(norm), 1 / norm)
    return replace(
        weights, q=weights.q * norm, q_a=torch.diag(inverse), q_norm=torch.ones_like(norm)
    )


def _scaled(shared: SharedLatent, factor: float) -> SharedLatent:
    """Scores times a factor: the source's scale over that of the wider or narrower head."""
    return replace(shared, q_nope=shared.q_nope * factor, q_rope=shared.q_rope * factor)


def _padded(shared: SharedLatent, geometry: LatentGeometry) -> SharedLatent:
    """The same with zeros for what the target has room for; rotary pairs are neighbours then."""
    heads, size = shared.q_nope.shape[0], shared.q_nope.shape[-1]
    nope, pairs = geometry.qk_nope_head_dim, geometry.qk_rope_head_dim // 2
    latent = geometry.kv_lora_rank - 1

    def interleaved(rows: torch.Tensor) -> torch.Tensor:
        halves = rows.unflatten(-2, (2, -1))  # [..., 2, F', X]
        made = rows.new_zeros(*rows.shape[:-2], pairs, 2, size)
        made[..., : halves.shape[-2], :, :] = halves.transpose(-3, -2)
        return made.flatten(-3, -2)

    def upwards(rows: torch.Tensor, count: int) -> torch.Tensor:
        made = rows.new_zeros(heads, count, latent + 1)
        made[:, : rows.shape[1], : rows.shape[2] - 1] = rows[..., :-1]
        made[:, : rows.shape[1], -1] = rows[..., -1]
        return made

    q_nope = shared.q_nope.new_zeros(heads, nope, size)
    q_nope[:, : shared.q_nope.shape[1]] = shared.q_nope
    down = shared.down.new_zeros(latent, size)
    down[: len(shared.down)] = shared.down
    return SharedLatent(
        q_rope=interleaved(shared.q_rope),
        k_rope=interleaved(shared.k_rope),
        q_nope=q_nope,
        down=down,
        up_k=upwards(shared.up_k, nope),
        up_v=upwards(shared.up_v, shared.up_v.shape[1]),
        o=shared.o,
    )
