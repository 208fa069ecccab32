"""Falcon: of its decoders the newer one, of 40B and 180B, has KV heads that can be shared."""

from typing import Any

from kvfold.arch.family import LAYER_NORMS, Family
from kvfold.arch.projections import GroupedProjections
from kvfold.arch.sizes import Config, ConfigKeys


def _refuse(config: Config) -> str | None:
    if not config.get("new_decoder_architecture"):
        return "of its older decoder, heads share one KV head already or cannot share any"
    return "ALiBi ties each head to its own slope" if config.get("alibi") else None


def _target(config: Config, num_kv_heads: int) -> dict[str, Any]:
    return {**config, "num_kv_heads": num_kv_heads}


def _offer(implementation: str) -> None:
    from kvfold.arch.falcon import offer

    offer(implementation)


FAMILIES = (
    Family(
        ("falcon",),
        "the newer decoder only; fused qkv, parallel MLP",
        layer="transformer.h.{layer}",
        attention="self_attention",
        tuples=True,
        offer=_offer,
        mlp_output="mlp.dense_4h_to_h",
        mlp_matrices=2,
        projections=GroupedProjections(),
        keys=ConfigKeys(num_kv_heads=None, maybe_kv_heads=("num_kv_heads",)),
        refuse=_refuse,
        target=_target,
        no_latent=LAYER_NORMS,
    ),
)
