"""Writing a folded checkpoint: an ordinary Hugging Face folder, streamed tensor by tensor."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvfold.checkpoint.source import INDEX, SINGLE, Checkpoint
from kvfold.checkpoint.tensors import TensorSpec, write_tensors

if TYPE_CHECKING:
    import torch

MAX_SHARD_BYTES = 5 * 10**9  # what transformers and the hub use
_NOT_CARRIED = {"config.json", INDEX, "README.md", "kvfold.json", ".gitattributes"}
_WEIGHT_SUFFIXES = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".py",
}  # fmt: skip
_CARRIED_FOLDERS = ("additional_chat_templates",)


@dataclass(frozen=True)
class Shard:
    """One output file and the tensors it will hold, in order."""

    file: str
    specs: list[TensorSpec]

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs)


def folded_shapes(checkpoint: Checkpoint, num_kv_heads: int) -> dict[str, tuple[int, ...]]:
    """The shape of every attention tensor of the folded model."""
    family = checkpoint.family
    projections = family.target_projections or family.projections
    geometry = checkpoint.geometry.with_kv_heads(num_kv_heads)
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(geometry.num_layers):
        prefix = checkpoint.attention_prefix(layer)
        shapes |= projections.shapes(prefix, geometry, checkpoint.names)
    return shapes


def plan_shards(
    checkpoint: Checkpoint, num_kv_heads: int, max_shard_bytes: int = MAX_SHARD_BYTES
) -> list[Shard]:
    """Lay out the output: the source's tensors, in its order, with folded shapes.

    Nothing is loaded: sizes, and so the disk space needed, are known beforehand.
    """
    specs = list(_folded_specs(checkpoint, num_kv_heads))
    groups: list[list[TensorSpec]] = [[]]
    used = 0
    for spec in specs:
        if groups[-1] and used + spec.nbytes > max_shard_bytes:
            groups.append([])
            used = 0
        groups[-1].append(spec)
        used += spec.nbytes
    if len(groups) == 1:
        return [Shard(SINGLE, groups[0])]
    total = len(groups)
    return [
        Shard(f"model-{number:05d}-of-{total:05d}.safetensors", group)
        for number, group in enumerate(groups, 1)
    ]


def _folded_specs(checkpoint: Checkpoint, num_kv_heads: int) -> Iterator[TensorSpec]:
    store, family = checkpoint.store, checkpoint.family
    if num_kv_heads == checkpoint.geometry.num_kv_heads:
        for name in store.names():
            yield TensorSpec(name, store.dtype(name), store.shape(name))
        return
    shapes = folded_shapes(checkpoint, num_kv_heads)
    for name in store.names():
        if not family.dropped(name):
            shape = shapes.get(name) or family.rewritten_shape(name, store.shape(name))
            yield TensorSpec(name, store.dtype(name), shape)


def write_shards(
    folder: Path,
    shards: list[Shard],
    load: "Callable[[str], torch.Tensor]",
    done: Callable[[int, int], None] = lambda number, total: None,
) -> None:
    """Write the shards that are not there yet, then the index.

    Args:
        load: returns a tensor of the folded model by name.
    """
    for number, shard in enumerate(shards, 1):
        if not (folder / shard.file).exists():
            write_tensors(folder / shard.file, shard.specs, (load(s.name) for s in shard.specs))
        done(number, len(shards))
    if len(shards) > 1:
        weight_map = {spec.name: shard.file for shard in shards for spec in shard.specs}
        total = sum(shard.nbytes for shard in shards)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def folded_config(checkpoint: Checkpoint, num_kv_heads: int) -> dict[str, Any]:
    """The folded model's ``config.json``; loads without remote code."""
    if num_kv_heads == checkpoint.geometry.num_kv_heads:
        return dict(checkpoint.config)
    config = checkpoint.family.folded_config(checkpoint.config, num_kv_heads)
    # Engines that do not know transformers 5's rope_parameters read the older key.
    base = (config.get("rope_parameters") or {}).get("rope_theta")
    if base is not None:
        config.setdefault("rope_theta", base)
    return {key: value for key, value in config.items() if key != "auto_map"}


def carry_files(source: Path, out: Path) -> list[str]:
    """Copy tokenizer, generation config, chat template and licence; return their names."""
    carried = []
    for path in sorted(source.iterdir()):
        skipped = path.name in _NOT_CARRIED or path.suffix in _WEIGHT_SUFFIXES
        if path.is_file() and not skipped:
            shutil.copyfile(path, out / path.name)
            carried.append(path.name)
    for name in _CARRIED_FOLDERS:
        if (source / name).is_dir():
            shutil.copytree(source / name, out / name, dirs_exist_ok=True)
            carried.append(name)
    return carried


def write_json(path: Path, value: Any) -> None:
    """Write JSON for people to read too."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def total_bytes(shards: Iterable[Shard]) -> int:
    """The size of all tensors of the output."""
    return sum(shard.nbytes for shard in shards)
