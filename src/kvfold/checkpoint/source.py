"""Opening checkpoints: a Hugging Face folder, a hub name, or a GGUF file. No torch.

Everything that ``config.json`` and the safetensors headers can tell is checked here,
before anything heavy starts.
"""

import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvfold.arch.config import CONFIG
from kvfold.arch.families import can_be_opened, described_as, known_family
from kvfold.arch.family import Family
from kvfold.arch.parameters import StoredNames
from kvfold.arch.projections import AttentionWeights, Load, Shapes
from kvfold.checkpoint.language import Around, is_wrapped, language_config
from kvfold.checkpoint.schemas import INDEX_FILE
from kvfold.checkpoint.tensors import (
    FLOATING,
    TensorEntry,
    TensorFiles,
    TensorSource,
    dtype_name,
    read_header,
)
from kvfold.documents import file_within, shortened
from kvfold.errors import CheckpointError, InputError, UnsupportedError
from kvfold.geometry import AttentionGeometry

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_ADAPTER = "adapter_config.json"
_QUANTIZED_HINT = (
    "fold the original checkpoint, or load it in transformers, call model.dequantize() and "
    "save_pretrained() first"
)
_MXFP4_HINT = (
    "AutoModelForCausalLM.from_pretrained(SRC, quantization_config=Mxfp4Config(dequantize=True))"
    ".save_pretrained(PLAIN) in transformers first"
)
_TEXT_SUFFIXES = (".json", ".txt", ".jinja", ".model")
_LARGEST_TEXT = 1 << 28  # tokenizers of 250,000 words have 35 MB
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "tokenizer*"]


@dataclass(frozen=True)
class TensorDict:
    """The tensors of a model in memory, as a :class:`TensorSource`."""

    tensors: "Mapping[str, torch.Tensor]" = field(repr=False)

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> str:
        return dtype_name(self.tensors[name].dtype)

    def tensor(self, name: str) -> "torch.Tensor":
        return self.tensors[name].detach().cpu()


@dataclass
class Weights:
    """A model's tensors and what they are called, whether it can be folded or not.

    Attributes:
        label: what messages call it. config: ``config.json``. store: the tensors.
        stored_names: their names beside those of transformers' module.
    """

    label: str
    config: dict[str, Any]
    store: TensorSource = field(repr=False)
    stored_names: StoredNames = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.names = set(self.store.names())
        family = described_as(self.config)
        self.stored_names = StoredNames(family.base, self.names, family.renamed)

    @property
    def checkable(self) -> bool:
        """Whether the names of all its tensors are known."""
        return bool(self.stored_names.renamed) and not self.config.get("quantization_config")


@dataclass
class Checkpoint(Weights):
    """A checkpoint whose shapes have been checked; its tensors load when asked for.

    Attributes:
        around: what it is a part of, if it is one; config and tensors are the part's own.
        family, geometry: derived from the config.
    """

    around: Around | None = field(default=None, repr=False)
    family: Family = field(init=False)
    geometry: AttentionGeometry = field(init=False)

    def __post_init__(self) -> None:
        self.family = known_family(self.config)
        self.geometry = self.family.geometry(self.config)
        super().__post_init__()
        self._checked: set[str] = set()
        _check_shapes(self)

    def tensor(self, name: str) -> "torch.Tensor":
        """Load one tensor.

        Raises:
            CheckpointError: if it holds NaN or infinity; looked for the first time only.
        """
        import torch

        tensor = self.store.tensor(name)
        if name in self._checked:
            return tensor
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"{self.label}: tensor {name} holds NaN or infinite values",
                "the checkpoint is damaged or its training diverged; use another one",
            )
        self._checked.add(name)
        return tensor

    @property
    def files(self) -> list[Path]:
        """All files of weights, in order; none of a model in memory."""
        store = self.store if self.around is None else self.around.store
        return store.files if isinstance(store, TensorFiles) else []

    @property
    def parameters(self) -> int:
        return sum(prod(self.store.shape(name)) for name in self.names)

    def layer_prefix(self, layer: int) -> str:
        """The path of a layer's tensors as this checkpoint names them."""
        return self.stored_names.to_stored(self.family.layer.format(layer=layer))

    def attention_prefix(self, layer: int) -> str:
        return f"{self.layer_prefix(layer)}.{self.family.attention}"

    def attention_shapes(self, layer: int) -> Shapes:
        return self.family.projections.shapes(
            self.attention_prefix(layer), self.geometry, self.names
        )

    @property
    def attention_names(self) -> set[str]:
        """The tensors of all layers' projections."""
        layers = range(self.geometry.num_layers)
        return {name for layer in layers for name in self.attention_shapes(layer)}

    def attention_dtype(self, layer: int) -> str:
        """Of a layer's projections; what is made of them has the same."""
        return self.store.dtype(next(iter(self.attention_shapes(layer))))

    def attention(self, layer: int, load: Load | None = None) -> AttentionWeights:
        """One layer's projections, in the checkpoint's dtype.

        Args:
            load: reads a tensor, where some have been read already.
        """
        return self.family.projections.read(
            self.attention_prefix(layer), self.geometry, load or self.tensor, self.names
        )

    def layer_names(self, layer: int) -> list[str]:
        prefix = self.layer_prefix(layer) + "."
        return sorted(name for name in self.names if name.startswith(prefix))


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Open and check a folder or a hub name (for a GGUF file see ``checkpoint.gguf``).

    Raises:
        InputError: if there is no such thing. CheckpointError: if it is damaged or
        contradicts itself. UnsupportedError: if its architecture cannot be folded, and is none
        that folds are stored as.
    """
    folder = resolve(source)
    config = read_config(folder)
    text = language_config(config)
    known_family(text)  # an unknown architecture is worth more than any other complaint
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise UnsupportedError(
            f"{folder.name} is quantized ({method}); folding needs floating-point weights",
            _MXFP4_HINT if method == "mxfp4" else _QUANTIZED_HINT,
        )
    store = _open_files(folder, config)
    if not is_wrapped(config):
        return Checkpoint(str(folder), config, store)
    around = Around.of(config, store, str(folder))
    return Checkpoint(str(folder), around.text, TensorFiles(around.entries()), around)


def open_weights(source: str | Path) -> Weights:
    """Open a folder or hub name whose model is only to be run: a checkpoint, if it can be folded.

    Raises:
        InputError: if there is no such thing. CheckpointError: if what can be seen without
        transformers is damaged.
    """
    folder = resolve(source)
    config = read_config(folder)
    if can_be_opened(language_config(config)) and not config.get("quantization_config"):
        return open_checkpoint(folder)
    return Weights(str(folder), config, _open_files(folder, config))


def _open_files(folder: Path, config: Mapping[str, Any]) -> TensorFiles:
    other = config.get("transformers_weights")
    if other not in (None, SINGLE, INDEX):
        raise UnsupportedError(
            f"config.json names other weights ({shortened(other)}); expected {SINGLE}",
            "load it in transformers and save_pretrained() it",
        )
    check_folder(folder)
    return TensorFiles(_entries(folder))


def check_folder(folder: Path) -> None:
    """Refuse a folder where opening a file might wait, or that names weights elsewhere.

    Raises:
        CheckpointError: naming what is in the way.
    """
    for path in folder.iterdir():
        try:
            mode = path.stat().st_mode
        except OSError:  # a link to nothing, for instance: it counts as missing
            continue
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise CheckpointError(
                f"{path} is neither a file nor a folder", "give the folder of a checkpoint"
            )
        if path.suffix in _TEXT_SUFFIXES and path.stat().st_size > _LARGEST_TEXT:
            raise CheckpointError(
                f"{path} is larger than {_LARGEST_TEXT >> 20} MiB",
                "give the folder of a checkpoint",
            )
    if (folder / _ADAPTER).exists():
        raise CheckpointError(
            f"{folder} holds an adapter ({_ADAPTER}), which is no part of the weights",
            "merge it first: peft's merge_and_unload(), then save_pretrained()",
        )


def resolve(source: str | Path) -> Path:
    """Turn a path or hub name into a local folder."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(
            f"{path} is a file; expected a Hugging Face folder, a hub name or a .gguf file",
            "name the folder that holds config.json",
        )
    if not _HUB_NAME.fullmatch(str(source)):
        raise InputError(
            f"no such file or folder: {source}",
            "give a folder with config.json, a hub name like org/model, or a .gguf file",
        )
    return _download(str(source), _HUB_FILES)


def peek_config(source: str | Path) -> dict[str, Any]:
    """The config of a folder or hub name, before a hub model's weights are downloaded."""
    path = Path(source).expanduser()
    if path.exists() or not _HUB_NAME.fullmatch(str(source)):
        return read_config(resolve(source))
    return read_config(_download(str(source), ["config.json"]))


def _download(name: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"no folder {name} here, and the hub could not be asked for it ({lines[0][:120]})",
            "check the name and the network, or download the model and give its folder",
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """Read ``config.json``."""
    path = folder / "config.json"
    if not path.exists():
        raise InputError(
            f"{folder} has no config.json", "give the folder of a Hugging Face checkpoint"
        )
    return dict(CONFIG.read(path))


def _entries(folder: Path) -> dict[str, TensorEntry]:
    index_path = folder / INDEX
    if index_path.exists():
        return _indexed_entries(folder, index_path)
    if (folder / SINGLE).exists():
        return read_header(folder / SINGLE)
    if any(folder.glob("*.bin")):
        raise CheckpointError(
            f"{folder} holds pickled weights (.bin), which are not safe to open",
            "load it in transformers and save_pretrained() it, which writes safetensors",
        )
    raise CheckpointError(
        f"{folder} has neither {SINGLE} nor {INDEX}", "give a folder that holds the weights too"
    )


def _indexed_entries(folder: Path, index_path: Path) -> dict[str, TensorEntry]:
    weight_map = INDEX_FILE.read(index_path)["weight_map"]
    headers = {
        shard: read_header(file_within(folder, shard, str(index_path)))
        for shard in sorted(set(weight_map.values()))
    }
    again = "the index and the shards belong to different checkpoints; download both again"
    for name, shard in weight_map.items():
        if name not in headers[shard]:
            raise CheckpointError(
                f"{INDEX} names {shortened(name)} in {shard}, which does not hold it", again
            )
        others = [other for other in headers if other != shard and name in headers[other]]
        if others:  # transformers takes whichever it reads last
            raise CheckpointError(
                f"{shortened(name)} lies both in {shard} and in {others[0]}", again
            )
    if SINGLE not in headers and (folder / SINGLE).exists():
        raise CheckpointError(
            f"{folder} holds both {SINGLE} and {INDEX}, which does not name it",
            "remove the one that is not meant: other programs may read either",
        )
    return {name: headers[shard][name] for name, shard in weight_map.items()}


def _check_shapes(checkpoint: Checkpoint) -> None:
    """Every layer's projections exist, are floating point, and have the config's shapes."""
    for layer in range(checkpoint.geometry.num_layers):
        for name, shape in checkpoint.attention_shapes(layer).items():
            _check_tensor(checkpoint, name, shape)
    beyond = checkpoint.layer_prefix(checkpoint.geometry.num_layers) + "."
    if any(name.startswith(beyond) for name in checkpoint.names):
        raise CheckpointError(
            f"config.json says {checkpoint.geometry.num_layers} layers, but there are tensors "
            f"of layer {checkpoint.geometry.num_layers}",
            "the config belongs to another checkpoint",
        )


def _check_tensor(checkpoint: Checkpoint, name: str, shape: Iterable[int]) -> None:
    if name not in checkpoint.names:
        raise CheckpointError(
            f"tensor {name} is missing", "the checkpoint is incomplete; download it again"
        )
    found, dtype = checkpoint.store.shape(name), checkpoint.store.dtype(name)
    if found != tuple(shape):
        raise CheckpointError(
            f"config.json implies {name} of shape {list(shape)}, the file has {list(found)}",
            "the config belongs to another checkpoint, or a head count in it is wrong",
        )
    if dtype not in FLOATING:
        raise UnsupportedError(
            f"{name} is stored as {dtype}; folding needs F64, F32, F16 or BF16",
            "fold the original checkpoint, or dequantize this one in transformers first",
        )
