"""``kvfold demo``: train a small MHA model on Python's own documentation, fold it, measure it.

Everything it needs is on the machine already: the text is ``pydoc_data.topics``, which ships
with Python, and the model is trained here in about a minute, on the CPU. No torch at import.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvfold.checkpoint import places
from kvfold.checkpoint.workspace import opened
from kvfold.errors import InputError
from kvfold.files import write_json, write_text
from kvfold.fold.methods import AUTO
from kvfold.progress import Progress, no_progress
from kvfold.quality.scores import Quality, compare
from kvfold.quality.text import Tokenizer, python_topics, token_windows

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM

CONTEXT = 128
VOCABULARY = 1024
STEPS = 900
FOLDED_KV_HEADS = (4, 2, 1)
# Label, method, fit: the GQA paper's baseline; better algebra alone; algebra and fitting.
FOLDS = (
    ("mean", "mean", "none"),
    ("auto, no fit", AUTO, "none"),
    ("auto", AUTO, "local"),
)
SOURCE = "source"
RECORD = "demo.json"
_END = "<|endoftext|>"
_BATCH = 8
_WARM_UP = 50
_PEAK_RATE = 3e-3
_HELD_OUT_EVERY = 8
_CALIBRATION_EVERY = 4
_CALIBRATION_TOKENS = 96 * CONTEXT
_HELD_OUT_TOKENS = 128 * CONTEXT


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


@dataclass(frozen=True)
class DemoRow:
    """One model of the demo: the source, or one of its folds."""

    kv_heads: int
    method: str
    quality: Quality


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured; its files are in ``out``.

    Attributes:
        rows: the source first.
        training_tokens: tokens the source was trained on, repetitions included.
    """

    rows: tuple[DemoRow, ...]
    seed: int
    parameters: int
    training_tokens: int
    out: Path

    @property
    def source(self) -> Path:
        """The trained model and its tokenizer, for further commands."""
        return self.out / SOURCE

    @property
    def plot(self) -> Path:
        """The plot; an SVG of the same lies beside it."""
        return self.out / "demo.png"

    @property
    def calibration(self) -> Path:
        return self.out / "calibration.txt"

    @property
    def held_out(self) -> Path:
        return self.out / "held-out.txt"

    def as_dict(self) -> dict[str, Any]:
        """For ``--json`` and the record in the folder."""
        paths = {name: str(getattr(self, name)) for name in ("source", "plot", "held_out")}
        return asdict(self) | {"out": str(self.out), **paths}


def run_demo(
    out: Path, seed: int = 0, force: bool = False, progress: Progress = no_progress
) -> DemoResult:
    """Train, fold to 4, 2 and 1 KV heads, evaluate and plot.

    ``out`` appears when all is done: the source model, the texts, ``demo.json``, the plot.

    Raises:
        InputError: if ``out`` exists and ``force`` is false.

    >>> run_demo(Path("kvfold-demo")).rows[0].kv_heads  # doctest: +SKIP
    8
    """
    from kvfold.demo.plots import plot_demo

    check_out(out, force)
    with opened(out, older=RECORD) as work:
        work.start({}, force=force)
        work.begin({})
        model, tokenizer, splits = train_demo_model(seed, progress, STEPS)
        rows = fold_and_compare(model, tokenizer, splits, seed, progress)
        result = DemoResult(rows, seed, model.num_parameters(), STEPS * _BATCH * CONTEXT, out)
        folder = work.new
        model.save_pretrained(folder / SOURCE)
        tokenizer.save_pretrained(folder / SOURCE)
        for path, topics in (
            (result.calibration, splits.calibration),
            (result.held_out, splits.held_out),
        ):
            write_text(folder / path.name, joined(topics))
        write_json(folder / RECORD, result.as_dict())
        plot_demo(result.rows, folder / result.plot.name, seed)
        work.publish()
    return result


def check_out(out: Path, force: bool) -> None:
    """Refuse to overwrite, and to work towards a folder that cannot be made.

    Raises:
        InputError: naming the folder.
    """
    if out.exists() and not force:
        raise InputError(f"{out} exists already", "name another folder with --out, or add --force")
    if out.exists() and not (out / RECORD).is_file():
        raise InputError(
            f"{out} is not a folder of an earlier demo; --force replaces only those",
            "name another folder with --out",
        )
    places.check_out(out, (), force, older=RECORD)


def fold_and_compare(
    model: "LlamaForCausalLM", tokenizer: Tokenizer, splits: Splits, seed: int, progress: Progress
) -> tuple[DemoRow, ...]:
    """Fold with every method to every number of heads; score all on the held-out text."""
    from kvfold.fold.model import fold_model

    windows = token_windows(tokenizer, joined(splits.calibration), CONTEXT, _CALIBRATION_TOKENS)
    names: list[tuple[int, str]] = [(model.config.num_key_value_heads, SOURCE)]
    models: list[Any] = [model]
    total = len(FOLDED_KV_HEADS) * len(FOLDS)
    for kv_heads in FOLDED_KV_HEADS:
        for label, method, fit in FOLDS:
            data = windows if method == AUTO else None  # averaging looks at weights only
            folded = fold_model(model, kv_heads, method, fit, data, seed)
            names.append((kv_heads, label))
            models.append(folded.model)
            progress("folding", len(models) - 1, total)
    labelled = [
        (f"{label} {heads}", each) for (heads, label), each in zip(names, models, strict=True)
    ]
    held_out = token_windows(tokenizer, joined(splits.held_out), CONTEXT, _HELD_OUT_TOKENS)
    qualities = compare(labelled, held_out, "held-out topics", progress)
    return tuple(
        DemoRow(kv_heads, label, quality)
        for (kv_heads, label), quality in zip(names, qualities, strict=True)
    )


def train_demo_model(
    seed: int = 0, progress: Progress = no_progress, steps: int = STEPS
) -> "tuple[LlamaForCausalLM, Tokenizer, Splits]":
    """Train the demo's source: 8 heads, 8 KV heads; the same seed gives the same weights."""
    import torch

    splits = split_topics(python_topics())
    tokenizer = train_tokenizer(splits.training.values())
    text = _END.join(splits.training.values())
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _new_model(tokenizer)
    _train(model, ids, torch.Generator().manual_seed(seed), steps, progress)
    return model.eval(), tokenizer, splits


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
        special_tokens=[_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=_END)


def _new_model(tokenizer: Tokenizer) -> "LlamaForCausalLM":
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=16,
        max_position_embeddings=2 * CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def _train(
    model: "LlamaForCausalLM",
    ids: "torch.Tensor",
    generator: "torch.Generator",
    steps: int,
    progress: Progress,
) -> None:
    """AdamW on random windows; the learning rate warms up, then falls along a cosine."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    offsets = torch.arange(CONTEXT)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = _PEAK_RATE * _rate(step, steps)
        starts = torch.randint(len(ids) - CONTEXT, (_BATCH, 1), generator=generator)
        batch = ids[starts + offsets]
        loss = model(batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress("training", step + 1, steps)


def _rate(step: int, steps: int) -> float:
    """Learning rate as a fraction of its peak."""
    warm_up = min(_WARM_UP, steps)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))
