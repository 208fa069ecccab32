"""The MLPs of a decoder: one a layer, or a mixture of experts. No torch."""

from collections.abc import Callable
from dataclasses import dataclass

from kvfold.arch.sizes import Config, optional


@dataclass(frozen=True)
class Experts:
    """Mixtures of experts in place of the MLPs of some layers.

    Attributes:
        layers: how many have them. total, chosen, shared: experts of such a layer; those that a
            token's router chooses; those that every token meets besides.
        size: intermediate size of one. dense_size: of the MLPs of all other layers.
    """

    layers: int
    total: int
    chosen: int
    shared: int
    size: int
    dense_size: int


# Of a config, so many layers, and the intermediate size that it states first of all.
ReadExperts = Callable[[Config, int, int], Experts]


def usual_experts(config: Config, layers: int, inner: int) -> Experts:
    """All layers but the first few, if the config says how many experts there are."""
    total = optional(config, "num_local_experts", "n_routed_experts", "num_experts") or 0
    first = min(optional(config, "first_k_dense_replace") or 0, layers)
    return Experts(
        layers=layers - first if total else 0,
        total=total,
        chosen=optional(config, "num_experts_per_tok", "top_k") or 1,
        shared=optional(config, "n_shared_experts", "num_shared_experts") or 0,
        size=optional(config, "moe_intermediate_size") or inner,
        dense_size=inner,
    )
