"""The one place that has transformers open something: no code of a checkpoint runs here.

``trust_remote_code=False`` everywhere (None would ask on the terminal), safetensors only, files of
the folder only. A model is compared with its files by their headers before weights are read, and
with transformers' own report afterwards: what is missing would otherwise be filled with random
numbers.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvfold.arch.config import CONFIG
from kvfold.checkpoint.language import is_wrapped, language_config
from kvfold.checkpoint.source import Checkpoint, Weights, check_folder, open_weights, read_config
from kvfold.checkpoint.tensors import FLOATING
from kvfold.documents import shortened
from kvfold.errors import CheckpointError, InputError, KVFoldError, UnsupportedError
from kvfold.names import shown

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# Keys of a config that name code, other files or kernels, or say how weights are stored.
_NOT_ARCHITECTURE = {
    "auto_map", "attn_implementation", "_attn_implementation", "experts_implementation",
    "transformers_weights", "quantization_config", "dtype", "torch_dtype",
}  # fmt: skip
_CANNOT_BUILD = "transformers cannot build a model of the config of {}"
_INCOMPLETE = "the checkpoint is incomplete; download it again"
_GGUF_HINT = "convert it to a Hugging Face folder with the tool that made it"
_NO_CODE = "kvfold runs no code from checkpoints; "


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer.

    Raises:
        InputError: if it has none, or one that does not work or needs code of its own.
    """
    from transformers import AutoTokenizer

    check_folder(folder)
    _check_name(folder)
    hint = "copy tokenizer.json and tokenizer_config.json of the source beside the weights"
    with _in_words(f"{folder} has no tokenizer that transformers can load", hint):
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
        ids = tokenizer("a")["input_ids"]
        if not all(isinstance(token, int) for token in ids):
            raise TypeError(f"it makes {shortened(ids)} of 'a'")
    return tokenizer


def _check_name(folder: Path) -> None:
    try:
        str(folder).encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"the name of {shown(str(folder))} is not UTF-8, and transformers cannot open it",
            "rename the folder, or link to it by another name",
        ) from error


def load_config(folder: Path) -> Any:
    """transformers' config of a folder, without what would fetch code or other files."""
    from transformers import AutoConfig

    raw = read_config(folder)  # within bounds
    _check_name(folder)
    if is_wrapped(raw):
        return _architecture(language_config(raw), str(folder))
    with _in_words(f"transformers cannot read {folder / 'config.json'}", _hint(folder)):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    kernel = getattr(config, "_attn_implementation", None)
    if kernel is not None and ("/" in str(kernel) or not isinstance(kernel, str)):
        config._attn_implementation = None  # a kernel that would come from the hub
    return config


def load_model(folder: Path, dtype: "torch.dtype", config: Any = None) -> "PreTrainedModel":
    """The folder's causal language model, or that which is a part of its model, every weight from
    its files.

    Of architectures that cannot be folded, transformers' report alone tells what is missing.

    Args:
        config: instead of the folder's own.

    Raises:
        CheckpointError: for weights that are missing or have another shape.
        UnsupportedError: for a model whose tokens see what follows them.
    """
    from transformers import AutoModelForCausalLM

    weights = check_weights(folder)
    config = load_config(folder) if config is None else config
    if isinstance(weights, Checkpoint) and weights.around is not None:
        return built_model(config.to_dict(), _module_state(weights, dtype), dtype)
    with _in_words(f"transformers cannot open {folder}", _hint(folder)):
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            trust_remote_code=False,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    unset = sorted(map(str, {*report["missing_keys"], *report["mismatched_keys"]}))
    if unset:
        raise CheckpointError(f"{folder}: {_listed(unset)} missing from the weights", _INCOMPLETE)
    causal = [module.is_causal for module in model.modules() if hasattr(module, "is_causal")]
    if causal and not any(causal):
        raise UnsupportedError(
            f"{folder} is an encoder ({config.model_type}): its tokens see what follows them",
            "give a causal language model",
        )
    return model


def built_model(
    config: dict[str, Any], state: "dict[str, torch.Tensor]", dtype: "torch.dtype"
) -> "PreTrainedModel":
    """A model made of tensors that are in memory; it takes them as they are, and shares them."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        built: PreTrainedModel = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**config), dtype=dtype, trust_remote_code=False
        )
    built.load_state_dict(state, assign=True)
    built.tie_weights()
    return built.eval()


def load_gguf(folder: Path, name: str) -> "tuple[PreTrainedModel, Any]":
    """The model, in float32, and the tokenizer of a GGUF file in a folder that holds no other.

    Raises:
        CheckpointError: if transformers cannot read it, or misses tensors.
    """
    import torch
    import transformers

    how: dict[str, Any] = {
        "gguf_file": name, "trust_remote_code": False, "local_files_only": True
    }  # fmt: skip
    with _in_words(f"transformers could not read {name}", _GGUF_HINT):
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            quantization_config=transformers.GgufConfig(dequantize=True),
            dtype=torch.float32,
            output_loading_info=True,
            **how,
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **how)
    unset = sorted(map(str, {*report["missing_keys"], *report["mismatched_keys"]}))
    if unset:
        raise CheckpointError(f"{name}: {_listed(unset)} missing from the weights", _INCOMPLETE)
    return model, tokenizer


def load_gguf_config(folder: Path, name: str) -> Any:
    """The config of a GGUF file, by its metadata alone; as :func:`load_gguf` otherwise."""
    from transformers import AutoConfig

    with _in_words(f"transformers could not read {name}", _GGUF_HINT):
        return AutoConfig.from_pretrained(
            folder, gguf_file=name, trust_remote_code=False, local_files_only=True
        )


def load_gguf_tokenizer(folder: Path, name: str) -> Any:
    """The tokenizer of a GGUF file, by its metadata alone; as :func:`load_gguf` otherwise."""
    from transformers import AutoTokenizer

    with _in_words(f"transformers could not read the tokenizer of {name}", _GGUF_HINT):
        return AutoTokenizer.from_pretrained(
            folder, gguf_file=name, trust_remote_code=False, local_files_only=True
        )


def _module_state(checkpoint: Checkpoint, dtype: "torch.dtype") -> "dict[str, torch.Tensor]":
    """A checkpoint's tensors as transformers' module has them: stacked, and tied ones shared."""
    import torch

    state = skeleton(checkpoint).state_dict(keep_vars=True)
    loaded: dict[int, torch.Tensor] = {}
    for name, tensor in state.items():
        parts = checkpoint.stored_names.parts(name, tuple(tensor.shape))
        if parts.keys() <= checkpoint.names:
            whole = torch.cat([checkpoint.store.tensor(part) for part in parts])
            loaded[id(tensor)] = whole.view(tensor.shape).to(dtype)
    return {name: loaded[id(tensor)] for name, tensor in state.items() if id(tensor) in loaded}


def check_weights(folder: Path) -> Weights:
    """Open a folder's weights, checked by their headers as far as their architecture is known.

    Raises:
        CheckpointError: naming what it lacks.
    """
    weights = open_weights(folder)
    if isinstance(weights, Checkpoint):
        check_complete(weights)
    elif weights.checkable:
        _check_tensors(weights)
    return weights


def check_complete(checkpoint: Checkpoint) -> None:
    """Compare a checkpoint's headers with the model that transformers would build of its config.

    Tensors that the model has no place for are let be (older files hold rotary tables), but not
    in attention: folding would take them for biases.

    Raises:
        CheckpointError: naming the tensors that are missing, or have another shape.
        UnsupportedError: for one that is not stored in floating point.
    """
    taken = _check_tensors(checkpoint)
    for layer in range(checkpoint.geometry.num_layers):
        stray = sorted(checkpoint.attention_shapes(layer).keys() - taken)
        if stray:
            raise CheckpointError(
                f"{checkpoint.label} holds {stray[0]}, for which its config has no place",
                "the config belongs to another checkpoint",
            )


def _check_tensors(weights: Weights) -> set[str]:
    """Compare headers with the model's own tensors; the names of those that it takes."""
    model = skeleton(weights)
    names = weights.stored_names
    needed: dict[int, list[str]] = {}
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        needed.setdefault(id(tensor), []).append(name)  # tied tensors are one
    ignored = [re.compile(p) for p in model._keys_to_ignore_on_load_missing or ()]
    parts = {name: names.parts(name, tuple(tensor.shape)) for name, tensor in state.items()}
    missing = [
        tied[0] if len(parts[tied[0]]) == 1 else min(parts[tied[0]].keys() - weights.names)
        for tied in needed.values()
        if not any(parts[name].keys() <= weights.names for name in tied)
        and not any(pattern.search(tied[0]) for pattern in ignored)
    ]
    if missing:
        raise CheckpointError(f"{weights.label}: {_listed(missing)} missing", _INCOMPLETE)
    wanted = {stored: shape for each in parts.values() for stored, shape in each.items()}
    taken = wanted.keys() & weights.names
    for stored in wanted:
        if stored in taken:
            _check(weights, stored, wanted[stored])
    return taken


def _architecture(config: Mapping[str, Any], label: str) -> Any:
    """transformers' config of a ``config.json``, without what would fetch code or other files."""
    from transformers import AutoConfig

    with _in_words(_CANNOT_BUILD.format(label), CONFIG.hint):
        return AutoConfig.for_model(
            **{key: value for key, value in config.items() if key not in _NOT_ARCHITECTURE}
        )


def skeleton(weights: Weights) -> Any:
    """The model of a config without memory for its weights."""
    import torch
    from transformers import AutoModelForCausalLM

    config = _architecture(weights.config, weights.label)
    with _in_words(_CANNOT_BUILD.format(weights.label), CONFIG.hint), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def _check(weights: Weights, name: str, shape: tuple[int, ...]) -> None:
    found, dtype = weights.store.shape(name), weights.store.dtype(name)
    if found != shape:
        raise CheckpointError(
            f"config.json implies {name} of shape {list(shape)}, the file has {list(found)}",
            "the config belongs to another checkpoint",
        )
    if dtype not in FLOATING:
        raise UnsupportedError(
            f"{name} is stored as {dtype}; expected {', '.join(FLOATING)}",
            "take the original checkpoint, or dequantize this one in transformers first",
        )


def _listed(names: list[str]) -> str:
    """So many names as a line can hold, with the verb."""
    more = f" and {len(names) - 3} more tensors" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more + (" are" if len(names) > 1 else " is")


def _hint(folder: Path) -> str:
    wants_code = "auto_map" in read_config(folder)
    known = "give a causal language model of an architecture that transformers knows"
    return f"{_NO_CODE}{known}" if wants_code else known


@contextmanager
def _in_words(what: str, hint: str) -> Iterator[None]:
    """Whatever transformers raises about a checkpoint's files, as one error."""
    try:
        yield
    except (KVFoldError, MemoryError):
        raise
    except BaseException as error:
        # Rust's panics are no Exceptions; interruptions are not about files.
        about_files = isinstance(error, Exception) or type(error).__name__ == "PanicException"
        if not about_files or "allocate memory" in str(error) or "out of memory" in str(error):
            raise
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if "custom code" in str(error) or "trust_remote_code" in str(error):
            first, hint = "it needs code of its own", f"{_NO_CODE}use one that needs none"
        raise InputError(f"{what} ({first[:160]})", hint) from error
