"""One layer of a checkpoint, as folding reads it."""

import torch

from kvfold.checkpoint.source import Checkpoint
from kvfold.fold.heads import LayerHeads
from kvfold.fold.norms import NormWeights
from kvfold.fold.pairs import Pairs

Tensors = dict[str, torch.Tensor]


class StoredLayer:
    """The tensors of one layer, each read once: when it is first asked for.

    Whatever runs, folds or completes the layer shares one of these, which lives as long as the
    layer's turn lasts.
    """

    def __init__(self, checkpoint: Checkpoint, index: int) -> None:
        self.checkpoint, self.index = checkpoint, index
        self.prefix = checkpoint.layer_prefix(index) + "."
        self._read: Tensors = {}

    def tensor(self, name: str) -> torch.Tensor:
        """By its name in the checkpoint."""
        if name not in self._read:
            self._read[name] = self.checkpoint.tensor(name)
        return self._read[name]

    def all(self) -> Tensors:
        """By their names in the checkpoint."""
        return {name: self.tensor(name) for name in self.checkpoint.layer_names(self.index)}

    def below(self) -> Tensors:
        """By their names below the layer, which are those of transformers' module."""
        return {name.removeprefix(self.prefix): tensor for name, tensor in self.all().items()}

    @property
    def pairs(self) -> Pairs:
        """Which dimensions of the layer's heads rotate together."""
        rotary, geometry = self.checkpoint.family.rotary, self.checkpoint.geometry
        dim = rotary.dim(self.checkpoint.config, geometry.head_dim, self.index)
        return Pairs(dim, rotary.interleaved)

    @property
    def scale(self) -> float:
        """What the layer's scores are multiplied with."""
        factors = self.checkpoint.family.multipliers
        given = self.checkpoint.config.get(factors.scores, 1.0) if factors else None
        return float(self.checkpoint.geometry.head_dim**-0.5 if given is None else given)

    def heads(self, device: torch.device | None = None) -> LayerHeads:
        """In float64, on the device where they are folded."""

        def load(name: str) -> torch.Tensor:
            return self.tensor(name).to(device)

        weights = self.checkpoint.attention(self.index, load)
        prefix = self.checkpoint.attention_prefix(self.index)
        spec = self.checkpoint.family.normalises(self.checkpoint.config)
        norm = NormWeights.load(spec, prefix, load)
        return LayerHeads.of(weights, self.pairs, norm)
