"""Writing a folded checkpoint: an ordinary Hugging Face folder, streamed tensor by tensor."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvfold.arch.carried import Carried, Carrier
from kvfold.arch.target import Target
from kvfold.checkpoint.source import INDEX, SINGLE, Checkpoint
from kvfold.checkpoint.tensors import TensorSpec, write_tensors
from kvfold.errors import CheckpointError
from kvfold.files import copy_file, write_json
from kvfold.record import RECORD

if TYPE_CHECKING:
    import torch

MAX_SHARD_BYTES = 5 * 10**9  # what transformers and the hub use
_OLDER_KEYS = ("rope_theta", "partial_rotary_factor")  # of transformers 4
_NOT_CARRIED = {"config.json", INDEX, "README.md", RECORD, ".gitattributes"}
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


def attention_specs(checkpoint: Checkpoint, target: Target) -> dict[str, TensorSpec]:
    """Every attention tensor of the folded model by name, in the dtype of its layer."""
    projections = target.projections(checkpoint.family)
    geometry = target.geometry(checkpoint.geometry, checkpoint.family, checkpoint.config)
    specs: dict[str, TensorSpec] = {}
    for layer in range(geometry.num_layers):
        dtype = checkpoint.attention_dtype(layer)
        prefix = checkpoint.attention_prefix(layer)
        shapes = projections.shapes(prefix, geometry, checkpoint.names)
        specs |= {name: TensorSpec(name, dtype, shape) for name, shape in shapes.items()}
    return specs


def stored_specs(checkpoint: Checkpoint) -> list[TensorSpec]:
    """A checkpoint's tensors as they are, in its order."""
    store = checkpoint.store
    return [TensorSpec(name, store.dtype(name), store.shape(name)) for name in store.names()]


def folded_specs(checkpoint: Checkpoint, target: Target) -> list[TensorSpec]:
    """The folded model's tensors, in the source's order; those it names otherwise come last."""
    if target.is_source(checkpoint.geometry):
        return stored_specs(checkpoint)
    attention, replaced = attention_specs(checkpoint, target), checkpoint.attention_names
    family, config = checkpoint.family, checkpoint.config
    own: list[TensorSpec] = []
    for spec in stored_specs(checkpoint):
        if spec.name in attention:
            own.append(attention[spec.name])
        elif spec.name not in replaced:
            carried = target.carried(family, config, spec.name, spec.shape)
            own += [replace(spec, name=made.name, shape=made.shape) for made in carried]
    return own + [spec for name, spec in attention.items() if name not in checkpoint.names]


def carried_from(checkpoint: Checkpoint, carrier: Carrier) -> dict[str, tuple[str, Carried]]:
    """Of every tensor that is not attention: the source's name of what it is made of, and how."""
    family, config = checkpoint.family, checkpoint.config
    return {
        made.name: (spec.name, made)
        for spec in stored_specs(checkpoint)
        if spec.name not in checkpoint.attention_names
        for made in carrier.carried(family, config, spec.name, spec.shape)
    }


def plan_shards(
    checkpoint: Checkpoint, own: list[TensorSpec], max_shard_bytes: int = MAX_SHARD_BYTES
) -> list[Shard]:
    """Lay out an output.

    Nothing is loaded: sizes, and so the disk space needed, are known beforehand.

    Args:
        own: what is written of a checkpoint; what lies around it comes on top.
    """
    specs = own if checkpoint.around is None else checkpoint.around.specs(own)
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


def write_shards(
    checkpoint: Checkpoint,
    folder: Path,
    shards: list[Shard],
    load: "Callable[[str], torch.Tensor]",
    done: Callable[[int, int], None] = lambda number, total: None,
) -> None:
    """Write the shards that are not there yet, then the index.

    Args:
        load: returns a tensor of what is made of the checkpoint, by name.
    """
    load = _with_others(checkpoint, load)
    for number, shard in enumerate(shards, 1):
        if not (folder / shard.file).exists():
            write_tensors(folder / shard.file, shard.specs, (load(s.name) for s in shard.specs))
        done(number, len(shards))
    if len(shards) > 1:
        weight_map = {spec.name: shard.file for shard in shards for spec in shard.specs}
        total = sum(shard.nbytes for shard in shards)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _with_others(
    checkpoint: Checkpoint, load: "Callable[[str], torch.Tensor]"
) -> "Callable[[str], torch.Tensor]":
    """The same by the names of all tensors, where a checkpoint is a part of something."""
    around = checkpoint.around
    if around is None:
        return load

    def from_all(name: str) -> "torch.Tensor":
        own = around.inner(name)
        return around.store.tensor(name) if own is None else load(own)

    return from_all


def folded_config(checkpoint: Checkpoint, target: Target) -> dict[str, Any]:
    """The folded model's ``config.json``; loads without remote code."""
    own = _own_config(checkpoint, target)
    return own if checkpoint.around is None else checkpoint.around.with_text(own)


def _own_config(checkpoint: Checkpoint, target: Target) -> dict[str, Any]:
    if target.is_source(checkpoint.geometry):
        return dict(checkpoint.config)
    config = target.config(checkpoint.family, checkpoint.config)
    # Engines that do not know transformers 5's rope_parameters read the older keys.
    rotary = config.get("rope_parameters") or {}
    for key in _OLDER_KEYS:
        if rotary.get(key) is not None:
            config.setdefault(key, rotary[key])
    return {key: value for key, value in config.items() if key != "auto_map"}


def carried_files(source: Path) -> dict[str, Path]:
    """Tokenizer, generation config, chat template and licence, by their names below ``source``.

    Raises:
        CheckpointError: for a link to something outside.
    """
    found = {}
    for path in sorted(source.iterdir()):
        skipped = path.name in _NOT_CARRIED or path.suffix in _WEIGHT_SUFFIXES
        if path.is_file() and not skipped:
            found[path.name] = path
    for name in _CARRIED_FOLDERS:
        if (source / name).is_dir():
            below = sorted(path for path in (source / name).rglob("*") if path.is_file())
            found |= {str(path.relative_to(source)): path for path in below}
    for path in found.values():
        _check_own(source, path)
    return found


def files_read(checkpoint: Checkpoint, folder: Path) -> dict[str, Path]:
    """Every file of a checkpoint that has a part in what is made of it, by name."""
    named = [folder / "config.json", folder / INDEX, folder / RECORD, *checkpoint.files]
    own = {path.name: path for path in named if path.is_file()}
    return own | carried_files(folder)


def _check_own(source: Path, path: Path) -> None:
    """Refuse what a link brings in from elsewhere, but for the hub cache's own layout.

    There ``snapshots/REVISION`` holds links into ``blobs``, both of one repository.
    """
    real, home = path.resolve(), source.resolve()
    blobs = home.parent.parent / "blobs"
    in_cache = home.parent.name == "snapshots" and real.parent == blobs
    if not (home in real.parents or in_cache):
        raise CheckpointError(
            f"{path} is a link to {real}, outside the checkpoint",
            "put the file itself there, or remove the link",
        )


def carry_files(source: Path, out: Path) -> list[str]:
    """Copy the files of :func:`carried_files`; return the names of files and folders."""
    carried = carried_files(source)
    for name, path in carried.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        copy_file(path, out / name)
    return list(dict.fromkeys(Path(name).parts[0] for name in carried))


def total_bytes(shards: Iterable[Shard]) -> int:
    """The size of all tensors of the output."""
    return sum(shard.nbytes for shard in shards)
