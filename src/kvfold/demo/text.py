"""The demo's text: Python's own documentation, split by topic, and a tokenizer of it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from kvfold.quality.text import Tokenizer

VOCABULARY = 1024
END = "<|endoftext|>"
_HELD_OUT_EVERY = 8
_CALIBRATION_EVERY = 4


@dataclass(frozen=True)
class Splits:
    """Python's documentation, split by topic.

    Attributes:
        calibration: text of some of the training topics, never of held-out ones.
        held_out: without the paragraphs that training topics contain as well.
    """

    training: Mapping[str, str]
    calibration: Mapping[str, str]
    held_out: Mapping[str, str]


def split_topics(topics: Mapping[str, str]) -> Splits:
    """Every 8th topic is held out; every 4th of the others is calibration text, too.

    Topics quote each other, so held-out ones lose the paragraphs that were trained on.
    """
    names = sorted(topics)
    held_out = names[::_HELD_OUT_EVERY]
    training = {name: topics[name] for name in names if name not in held_out}
    seen = {part for text in training.values() for part in _paragraphs(text)}
    fresh = {
        name: "\n\n".join(part for part in _paragraphs(topics[name]) if part not in seen)
        for name in held_out
    }
    calibration = dict(list(training.items())[::_CALIBRATION_EVERY])
    return Splits(training, calibration, {name: text for name, text in fresh.items() if text})


def _paragraphs(text: str) -> list[str]:
    return [part.strip("\n") for part in text.split("\n\n") if part.strip()]


def joined(topics: Mapping[str, str]) -> str:
    """Topics as one text."""
    return "\n\n".join(topics.values())


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A byte-level BPE tokenizer, small like the model."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END)
