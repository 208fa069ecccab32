"""Which layers have mixtures of experts, against transformers' own modules."""

from typing import Any

import pytest

from kvfold.arch.families import BY_TYPE
from tests.toolbox import tiny


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"moe_layer_start_index": 0},
        {"moe_layer_interval": 2},
        {"moe_layer_start_index": 2, "moe_layer_end_index": 5, "moe_layer_interval": 3},
        {"moe_layer_end_index": 0},
    ],
    ids=str,
)
def test_layers_of_ernie(changes: dict[str, Any]) -> None:
    model = tiny.make("ernie4_5_moe", num_hidden_layers=7, **changes)
    config = model.config.to_dict()
    found = BY_TYPE["ernie4_5_moe"].experts(config, 7, config["intermediate_size"])
    assert found.layers == sum(hasattr(layer.mlp, "experts") for layer in model.model.layers)
    assert (found.total, found.chosen, found.shared, found.size) == (4, 2, 1, 32)
