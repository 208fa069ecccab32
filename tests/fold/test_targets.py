"""A kind of target that is not a number of heads goes all the way from the plan to the files."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from kvfold.arch.carried import Carried
from kvfold.arch.family import Family
from kvfold.arch.projections import AttentionWeights, FusedProjections, Projections
from kvfold.arch.target import Grouped, Target
from kvfold.checkpoint.writer import folded_specs
from kvfold.errors import UnsupportedError
from kvfold.fold.energy import Energy
from kvfold.fold.heads import LayerHeads, SharedHead
from kvfold.fold.layer import LAYER_FOLDS, FoldPlan
from kvfold.fold.loop import fold_all
from kvfold.fold.methods import Method, all_methods
from kvfold.fold.statistics import LayerStatistics
from kvfold.fold.stored_layer import StoredLayer
from kvfold.geometry import AttentionGeometry
from tests.toolbox import tiny


@dataclass(frozen=True)
class Fused:
    """All heads stay, in one matrix: other tensors under other names."""

    label: str = "one matrix"
    warnings: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return {"fused": True}

    def is_source(self, source: AttentionGeometry) -> bool:
        return False

    def geometry(
        self, source: AttentionGeometry, family: Family, config: Mapping[str, Any]
    ) -> AttentionGeometry:
        return source

    def config(self, family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
        return {**config, "fused": True}

    def projections(self, family: Family) -> Projections:
        return FusedProjections()

    def carried(
        self, family: Family, config: Mapping[str, Any], name: str, shape: tuple[int, ...]
    ) -> tuple[Carried, ...]:
        return (Carried(name, shape),)

    def kv_bytes_per_token(self, source: AttentionGeometry) -> int:
        return source.kv_bytes_per_token()

    def compared(self, source: AttentionGeometry) -> dict[str, Any]:
        return {}


class FusedFold:
    """Takes the heads as they are."""

    constant_error: float | None = None

    def __init__(
        self, layer: StoredLayer, heads: LayerHeads, target: Fused, statistics: LayerStatistics
    ) -> None:
        self._heads = heads

    def groups(self, method: Method) -> list[list[int]]:
        return [[head] for head in range(self._heads.num_kv_heads)]

    def by(self, method: Method, seed: int) -> tuple[AttentionWeights, Energy]:
        h = self._heads
        alone = [
            SharedHead(h.q[i : i + 1], h.k[i], h.v[i], h.o[i : i + 1])
            for i in range(h.num_kv_heads)
        ]
        every = torch.ones(h.q.shape[-1], dtype=torch.float64)
        return h.weights(alone, [[i] for i in range(h.num_kv_heads)], every), Energy()


def test_another_kind_of_target(monkeypatch: pytest.MonkeyPatch) -> None:
    fuse = replace(all_methods()["pca"], name="fuse", targets=(Fused,))
    monkeypatch.setattr("kvfold.fold.methods.all_methods", lambda: {"fuse": fuse})
    monkeypatch.setitem(LAYER_FOLDS, Fused, FusedFold)
    target: Target = Fused()
    source = tiny.checkpoint_of(tiny.make("llama"))
    specs = {spec.name: spec for spec in folded_specs(source, target)}
    assert not any("k_proj" in name for name in specs)
    made = list(fold_all(source, FoldPlan(target, "auto", "none", seed=0)))
    for folded in made:
        for name, tensor in folded.tensors.items():
            assert tuple(tensor.shape) == specs[name].shape
        prefix, names = source.attention_prefix(folded.index), set(folded.tensors)
        read = FusedProjections().read(prefix, source.geometry, folded.tensors.__getitem__, names)
        for part in "qkvo":
            expected = getattr(source.attention(folded.index), part)
            assert torch.equal(getattr(read, part), expected), part
    written = {name for layer in made for name in layer.tensors}
    assert written == {name for name in specs if ".self_attn." in name}
    with pytest.raises(UnsupportedError, match="cannot make 1 KV head"):
        list(fold_all(source, FoldPlan(Grouped(1), "fuse", "none", seed=0)))
