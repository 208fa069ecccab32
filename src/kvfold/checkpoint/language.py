"""Checkpoints of which a language model is a part, beside one that sees.

The part is opened as if it were alone: by the config and under the names that transformers' own
module of it has. What is made of it is put back where it was; all else passes through as it is.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from kvfold.arch.config import CONFIG
from kvfold.arch.families import BY_TYPE
from kvfold.checkpoint.tensors import TensorEntry, TensorFiles, TensorSpec
from kvfold.documents import shortened
from kvfold.errors import CheckpointError

_TEXT = "text_config"
_HEAD = "lm_head."
# Where the base of the language model lies, and its output embedding.
_PLACES = (
    ("language_model.{base}.", "language_model.lm_head."),
    ("model.language_model.", _HEAD),
    ("model.text_model.", _HEAD),
    ("{base}.", _HEAD),
)
# Language models that are like others for text. Their rotary embedding turns by where a token lies
# in an image, too, each frequency by one angle: what folding does to a frequency holds for any.
_ALIKE = {
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
}
_SEEING = "vision_config"


def is_wrapped(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is of a model of which a known language model is a part."""
    return _has_text(config) and _full_text(config).get("model_type") in BY_TYPE


def language_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the language model: what is not said is as transformers takes it.

    Of a model that is nothing else, its own.

    Raises:
        CheckpointError: if transformers cannot read it.
    """
    return _full_text(config) if _has_text(config) else dict(config)


def _has_text(config: Mapping[str, Any]) -> bool:
    """Whether it has a part of its own for text, or else for images."""
    kind = config.get("model_type")
    parts = any(isinstance(config.get(part), Mapping) for part in (_TEXT, _SEEING))
    return parts and kind is not None and kind not in BY_TYPE


def _full_text(config: Mapping[str, Any]) -> dict[str, Any]:
    text = config.get(_TEXT) or {}
    kind = text.get("model_type")
    if kind not in (None, *BY_TYPE, *_ALIKE):
        return dict(text)
    from transformers import AutoConfig

    own = {key: value for key, value in config.items() if key != "auto_map"}
    try:
        whole = AutoConfig.for_model(**own)
        found: dict[str, Any] = whole.get_text_config(decoder=True).to_dict()
    except Exception as error:  # whatever transformers raises about a key
        if kind is None:  # of an architecture that it does not know
            return dict(text or config)
        raise CheckpointError(
            f"transformers cannot read the config of a {shortened(config.get('model_type'))} model "
            f"({str(error).splitlines()[0][:160] if str(error) else type(error).__name__})",
            CONFIG.hint,
        ) from error
    # Whether embeddings are tied is said of the whole, whatever stands in the part.
    found["tie_word_embeddings"] = bool(getattr(whole, "tie_word_embeddings", False))
    alike = _ALIKE.get(str(found.get("model_type")))
    if alike is None:
        return found
    rope = found.get("rope_parameters") or {}
    kept = {key: value for key, value in rope.items() if not key.startswith("mrope_")}
    kept.pop("type", None)  # as older configs say "mrope", beside rope_type
    return found | {"model_type": alike, "rope_parameters": kept}


@dataclass(frozen=True)
class Around:
    """What a language model is a part of.

    Attributes:
        config: of all. store: all tensors. text: the config of the part, as it was filled in.
        places: the beginnings of names, of the part's own and of what they are in ``store``.
    """

    config: dict[str, Any]
    store: TensorFiles = field(repr=False)
    text: dict[str, Any] = field(repr=False)
    places: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, config: dict[str, Any], store: TensorFiles, label: str) -> "Around":
        """Of a model that :func:`is_wrapped`.

        Raises:
            CheckpointError: if its language model is nowhere among the tensors.
        """
        text = _full_text(config)
        family = BY_TYPE[text["model_type"]]
        base, first = family.base, family.layer.format(layer=0).partition(".")[2]
        for where, head in _PLACES:
            place = where.format(base=base)
            if any(name.startswith(f"{place}{first}.") for name in store.names()):
                if f"{head}weight" in store.names():  # transformers does not tie what is there
                    text = text | {"tie_word_embeddings": False}
                return cls(config, store, text, ((f"{base}.", place), (_HEAD, head)))
        raise CheckpointError(
            f"{label} holds no language model: no tensor begins with "
            + " or ".join(where.format(base=base) + first for where, _ in _PLACES),
            "load it in transformers and save_pretrained() it",
        )

    def inner(self, name: str) -> str | None:
        """The part's own name of a tensor; None of one that is no part of it."""
        for own, place in self.places:
            if name.startswith(place):
                return own + name.removeprefix(place)
        return None

    def outer(self, name: str) -> str:
        """The name of one of the part's tensors among all."""
        for own, place in self.places:
            if name.startswith(own):
                return place + name.removeprefix(own)
        raise ValueError(f"{name} has no place around a language model")

    def entries(self) -> dict[str, TensorEntry]:
        """The part's tensors under its own names."""
        named = ((self.inner(name), entry) for name, entry in self.store.entries.items())
        return {name: entry for name, entry in named if name is not None}

    def specs(self, own: list[TensorSpec]) -> list[TensorSpec]:
        """All tensors that are to be written, for those of the part."""
        part = [replace(spec, name=self.outer(spec.name)) for spec in own]
        return part + [
            TensorSpec(name, entry.dtype, entry.shape)
            for name, entry in self.store.entries.items()
            if self.inner(name) is None
        ]

    def with_text(self, changed: Mapping[str, Any]) -> dict[str, Any]:
        """The config of all, with what has changed in the part's; loads without remote code."""
        new = {key: value for key, value in changed.items() if self.text.get(key) != value}
        whole = {key: value for key, value in self.config.items() if not new or key != "auto_map"}
        if _TEXT not in self.config:  # in older ones all of it lies beside the other parts
            return whole | new
        return {**whole, _TEXT: {**self.config[_TEXT], **new}}
