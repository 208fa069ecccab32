"""Mixtral."""

from kvfold.arch.family import Family
from kvfold.arch.parameters import Renamed

_EXPERT = "block_sparse_moe.experts.{expert}"
FAMILIES = (
    Family(
        ("mixtral",),
        "experts",
        renamed=(
            Renamed("mlp.gate.weight", ("block_sparse_moe.gate.weight",)),
            Renamed("mlp.experts.gate_up_proj", (f"{_EXPERT}.w1.weight", f"{_EXPERT}.w3.weight")),
            Renamed("mlp.experts.down_proj", (f"{_EXPERT}.w2.weight",)),
        ),
        mlp_output=None,
    ),
)
