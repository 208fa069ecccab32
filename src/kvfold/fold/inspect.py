"""``kvfold inspect``: what a checkpoint keeps per token, and how alike its KV heads are."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvfold.arguments import callback
from kvfold.arguments import source as source_name
from kvfold.checkpoint.source import Checkpoint, open_checkpoint
from kvfold.geometry import AttentionGeometry, LatentGeometry, divisors
from kvfold.progress import Progress, no_progress
from kvfold.quality.run import local_folder


@dataclass(frozen=True)
class Similarity:
    """How alike the KV heads of a layer are, averaged over pairs; data-free.

    Attributes:
        raw: cosine similarity of the K weights as they stand (what averaging relies on).
        aligned_key, aligned_value: the fraction of a pair's energy that one shared head can
            keep at best, after alignment: 0.5 if the heads have nothing in common, 1 if one is
            a copy of the other in other coordinates.
    """

    layer: int
    raw: float
    aligned_key: float
    aligned_value: float


@dataclass(frozen=True)
class Inspection:
    """Geometry, sizes and head similarity of a checkpoint."""

    source: str
    family: str
    geometry: AttentionGeometry
    parameters: int
    kv_heads_to_fold_to: list[int]
    similarity: list[Similarity]

    def as_dict(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "family": self.family,
            "geometry": {**vars(self.geometry), "kind": self.geometry.kind},
            "parameters": self.parameters,
            "kv_bytes_per_token_16bit": self.geometry.kv_bytes_per_token(),
            "kv_heads_to_fold_to": self.kv_heads_to_fold_to,
            "similarity": [vars(row) for row in self.similarity],
        }


def inspect(source: str | Path, *, progress: Progress = no_progress) -> Inspection:
    """Describe a folder, hub name or GGUF file.

    Raises:
        InputError: if it cannot be opened or its architecture cannot be folded.

    >>> inspect("source").geometry.num_kv_heads  # doctest: +SKIP
    """
    source = source_name(source, "SRC")
    callback(progress, "progress")
    with ExitStack() as stack:
        checkpoint = open_checkpoint(local_folder(source, stack))
        latent = isinstance(checkpoint.geometry, LatentGeometry)
        layers = 0 if latent else checkpoint.geometry.num_layers
        similarities = []
        for index in range(layers):
            similarities.append(head_similarity(checkpoint, index))
            progress("comparing heads", index + 1, layers)
        return Inspection(
            str(source),
            checkpoint.family.name,
            checkpoint.geometry,
            checkpoint.parameters,
            [] if latent else divisors(checkpoint.geometry.num_kv_heads)[:-1],
            similarities,
        )


def head_similarity(checkpoint: Checkpoint, index: int) -> Similarity:
    """Compare all pairs of KV heads of one layer."""
    from itertools import combinations

    import torch

    from kvfold.fold.grouping import key_pair_energy, value_pair_energy
    from kvfold.fold.statistics import LayerStatistics
    from kvfold.fold.stored_layer import StoredLayer

    heads = StoredLayer(checkpoint, index).heads()
    pairs = list(combinations(range(heads.num_kv_heads), 2))
    if not pairs:
        return Similarity(index, 1.0, 1.0, 1.0)
    statistics = LayerStatistics.without_data(checkpoint.geometry.hidden_size)
    flat = torch.nn.functional.normalize(heads.k.flatten(1), dim=1)
    cosine = flat @ flat.T

    def mean(table: torch.Tensor) -> float:
        return float(torch.stack([table[a, b] for a, b in pairs]).mean())

    key, value = key_pair_energy(heads, statistics), value_pair_energy(heads, statistics)
    return Similarity(index, mean(cosine), mean(key.shareable()), mean(value.shareable()))
