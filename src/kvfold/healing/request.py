"""What healing is asked to do, and everything that can be checked before it starts. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvfold.checkpoint.gguf import is_gguf
from kvfold.checkpoint.inputs import Files, files_of
from kvfold.checkpoint.language import language_config
from kvfold.checkpoint.places import check_apart, check_disk, check_older, check_place
from kvfold.checkpoint.source import Checkpoint, open_checkpoint, read_config, resolve
from kvfold.checkpoint.writer import (
    carried_files,
    files_read,
    plan_shards,
    stored_specs,
    total_bytes,
)
from kvfold.errors import InputError
from kvfold.fold.record import read_record
from kvfold.geometry import LatentGeometry
from kvfold.healing.sources import TextSource, check_source, parse_source, text_words
from kvfold.numbers import (
    CALIBRATION,
    CLIP,
    FRACTION,
    HELD_OUT,
    KEEP,
    LORA_RANK,
    MICRO_BATCH,
    RATE,
    SEED,
    TEMPERATURE,
    TOKENS,
    WEIGHT,
    WINDOW,
)
from kvfold.quality.device import COMPUTED_IN
from kvfold.record import RECORD
from kvfold.requests import (
    DEVICE,
    Choice,
    Flag,
    Listed,
    Made,
    Model,
    Place,
    Request,
    Several,
    Switch,
    option,
    options_of,
)
from kvfold.version import __version__

DEFAULT_CONTEXT = 512
STAGES = ("local", "kl")
TRAINED = ("attention", "all")
PARALLEL = ("ddp", "fsdp")
# What a resumed run may change: everything that does not change which batch comes next.
CHANGEABLE = ("lr", "lr_rest", "clip", "keep", "save_tokens", "eval_tokens", "device", "parallel")
_LOGITS = 2**26  # that are computed at once by default
_WORTH_EVALUATING = 32_768  # tokens of training: they take ten times as long as an evaluation
_ENOUGH_UPDATES = 240  # from which on the rate is not lowered
_STATE_BYTES_PER_WEIGHT = 12  # a float32 weight and Adam's two moments


@dataclass(frozen=True)
class HealRequest(Request):
    """What was asked for, with every default filled in; equal requests give equal output.

    Attributes:
        texts: ``NAME``, ``NAME=WEIGHT`` or :class:`TextSource`.
        stages: by default ``kl``, with ``local`` before it where ``convert`` has not done it.
        tokens: training tokens of the ``kl`` stage; batch_tokens: per optimizer step, over all
            processes; context: tokens per sequence, 512 by default, or the model's number of
            positions if that is less; micro_batch: sequences per forward pass and process;
            see :meth:`at_once`.
        train: ``attention`` (q, k, v, o; by default with LoRA) or ``all``. lr: peak learning rate
            of attention, by default 0.3 over the hidden size, at most 1e-3; lr_rest: of everything
            else, by default a fifth of that.
        temperature: of the divergence; cross_entropy: the share of the loss that is plain
            next-token cross-entropy; hidden: the weight of matching hidden states.
        lora_rank: 0 trains the weights themselves.
        eval_texts: texts that are not trained on; Python's documentation by default.
        save_tokens, eval_tokens: a tenth of ``tokens`` by default.

    Raises:
        InputError: naming the option and what it expects.
    """

    command = "heal"
    makes_folder = True

    folded: str = option("FOLDED", Model())
    teacher: str = option(
        "--teacher", Model(), metavar="SOURCE", help="What FOLDED was folded from."
    )
    texts: tuple[TextSource, ...] = option(
        "--text",
        Several(Made(Model(), TextSource, parse_source, text_words)),
        metavar="NAME[=WEIGHT]",
        help="Text to train on: a plain text, .jsonl or .parquet file, or a dataset's name; "
        "repeatable, sequences are drawn by weight.",
    )
    tokens: int = option("--tokens", TOKENS, 10_000_000, "Of stage kl.")
    stages: tuple[str, ...] = option(
        "--stages",
        Listed(Choice(STAGES)),
        None,
        "[default: kl; local,kl if FOLDED had no local fit]",
        metavar="local,kl",
    )
    context: int = option("--context", WINDOW, None, "Tokens per sequence.  [default: 512]")
    batch_tokens: int = option(
        "--batch-tokens", TOKENS, None, "Per update.  [default: for 512 updates, 1Ki to 4Ki]"
    )
    micro_batch: int | None = option(
        "--micro-batch",
        MICRO_BATCH,
        None,
        "Sequences at once and process.  [default: what makes 64Mi logits, or 1]",
    )
    train: str = option(
        "--train", Choice(TRAINED), None, "[default: all; attention with --lora-rank]"
    )
    lr: float = option(
        "--lr", RATE, None, "Peak rate of attention.  [default: 0.3 / hidden size, at most 1e-3]"
    )
    lr_rest: float = option("--lr-rest", RATE, None, "Of all else.  [default: a fifth of --lr]")
    warm_up: float = option("--warm-up", FRACTION, 0.05, "Fraction of the steps.")
    clip: float = option("--clip", CLIP, 1.0, "Gradient norm; 0 for none.")
    temperature: float = option("--temperature", TEMPERATURE, 1.0, "Of the divergence.")
    cross_entropy: float = option(
        "--cross-entropy", FRACTION, 0.0, "Its share of the loss, 0 to 1."
    )
    hidden: float = option("--hidden", WEIGHT, 0.0, "Weight of the hidden states.")
    lora_rank: int = option("--lora-rank", LORA_RANK, 0, "Train LoRA, merged at the end.")
    gradient_checkpointing: bool = option(
        "--gradient-checkpointing", Flag(), False, "Less memory, a third slower."
    )
    dtype: str | None = option(
        "--dtype",
        Choice(COMPUTED_IN),
        None,
        "To multiply in; weights are float32.  [default: bfloat16 where hardware has it]",
    )
    parallel: str | None = option(
        "--parallel",
        Choice(PARALLEL),
        None,
        "Under torchrun.  [default: fsdp on GPUs, ddp on CPUs]",
    )
    device: str | None = option(
        "--device",
        DEVICE,
        None,
        "torch device.  [default: a GPU if there is one]",
    )
    local_tokens: int = option("--local-tokens", CALIBRATION, 50_000, "Of stage local.")
    held_out_tokens: int = option(
        "--held-out-tokens",
        HELD_OUT,
        None,
        "Kept from training, to evaluate on; at least a sequence of each text, or 0.  "
        "[default: an eighth, 4,096 to 16,384]",
    )
    eval_texts: tuple[str, ...] | None = option(
        "--eval-text",
        Several(Place()),
        None,
        "Another kind of text, to evaluate on.  [default: Python's documentation]",
        metavar="FILE",
        off=Switch("--no-eval-text", (), "--eval-text", "Evaluate on no text of another kind."),
    )
    eval_tokens: int = option(
        "--eval-tokens", TOKENS, None, "Evaluate every N.  [default: a tenth, at least 32,768]"
    )
    save_tokens: int = option(
        "--save-tokens", TOKENS, None, "Checkpoint every N.  [default: a tenth]"
    )
    keep: int = option("--keep", KEEP, 2, "Checkpoints kept meanwhile.")
    seed: int = option("--seed", SEED, 0)

    def __post_init__(self) -> None:
        super().__post_init__()
        tenth = max(1, self.tokens // 10)
        self.fill_in("stages", lambda: _default_stages(self.folded))
        folder = Path(self.folded).expanduser()
        config = language_config(read_config(folder)) if (folder / "config.json").exists() else {}
        self.fill_in("context", lambda: _default_context(config))
        self.fill_in("train", lambda: "attention" if self.lora_rank else "all")
        self.fill_in("batch_tokens", lambda: _default_batch(self.tokens))
        self.fill_in("lr", lambda: default_rate(config, self.steps))
        self.fill_in("lr_rest", lambda: self.lr / 5)
        self.fill_in("save_tokens", lambda: tenth)
        self.fill_in("eval_tokens", lambda: max(tenth, _WORTH_EVALUATING))
        self.fill_in("held_out_tokens", lambda: min(16_384, max(4096, self.tokens // 8)))
        _check_together(self)
        self.fill(batch_tokens=max(self.batch_tokens, self.context))

    @property
    def sequences(self) -> int:
        """Sequences per optimizer step, over all processes."""
        return _sequences(self.batch_tokens, self.context)

    def at_once(self, vocabulary: int | None) -> int:
        """Sequences per forward pass and process, of models of so many words.

        Their logits are the largest of what is in memory; weights are read once for all of them.
        """
        return self.micro_batch or max(1, _LOGITS // ((vocabulary or _LOGITS) * self.context))

    @property
    def steps(self) -> int:
        """Optimizer steps of the ``kl`` stage."""
        return _updates(self.tokens, self.batch_tokens, self.context)

    def every(self, tokens: int) -> int:
        """How many steps ``tokens`` are."""
        return max(1, round(tokens / (self.sequences * self.context)))

    @property
    def paths(self) -> list[Path]:
        """What is read, as far as it is named by a path."""
        texts = [source.name for source in self.texts]
        names = [self.folded, self.teacher, *texts, *(self.eval_texts or ())]
        return [Path(name).expanduser() for name in names]

    def as_dict(self) -> dict[str, Any]:
        texts = [vars(text) for text in self.texts]
        return {**vars(self), "texts": texts, "kvfold": __version__}


# What `heal` takes beyond its own arguments.
OPTIONS = tuple(name for name, option in options_of(HealRequest).items() if not option.is_required)


def _default_stages(folded: str | Path) -> tuple[str, ...]:
    """``local`` is what ``convert --fit local`` does; once is enough."""
    folder = Path(folded).expanduser()
    done = (folder / RECORD).exists() and read_record(folder).get("fit") == "local"
    return ("kl",) if done else STAGES


def _default_context(config: Mapping[str, Any]) -> int:
    longest = config.get("max_position_embeddings")
    return min(DEFAULT_CONTEXT, longest) if longest else DEFAULT_CONTEXT


def default_rate(config: Mapping[str, Any], updates: int) -> float:
    """Of attention, by the language model's config: what a step of Adam changes grows with the
    number of inputs (arXiv 2203.03466). Few updates cannot average out what large ones overshoot.

    >>> default_rate({"hidden_size": 600}, updates=1000), default_rate({"hidden_size": 600}, 60)
    (0.0005, 0.00025)
    """
    size = config.get("hidden_size") or config.get("n_embd")
    most = min(1e-3, 0.3 / size) if isinstance(size, int) and size > 0 else 5e-5
    return most * min(1.0, (updates / _ENOUGH_UPDATES) ** 0.5)


def default_updates(tokens: int, context: int) -> int:
    """How often weights are changed by so many tokens, where nobody says what a batch is."""
    return _updates(tokens, _default_batch(tokens), context)


def _default_batch(tokens: int) -> int:
    """So many that there are 512 updates, within what was tried."""
    return min(4096, max(1024, tokens // 512))


def _sequences(batch_tokens: int, context: int) -> int:
    return max(1, batch_tokens // context)


def _updates(tokens: int, batch_tokens: int, context: int) -> int:
    return max(1, tokens // (_sequences(batch_tokens, context) * context))


def _check_together(request: HealRequest) -> None:
    if not request.texts:
        raise InputError("no text to heal on", "name one or more with --text")
    if request.tokens < request.context:
        raise InputError(
            f"--tokens {request.tokens}: expected at least {request.context}, one sequence",
            "more --tokens or a smaller --context",
        )
    if request.lora_rank and request.train == "all":
        raise InputError("--lora-rank trains attention only", "drop --train all or --lora-rank")


def check_heal(
    request: HealRequest, out: Path, *, force: bool = False, resume: bool = False
) -> None:
    """Check everything that configs, headers and the file system can tell.

    Args:
        resume: whether OUT may be there already: made by a run that was killed just after.

    Raises:
        InputError: with the reason why healing cannot run.
    """
    folded = _open(request.folded, "FOLDED")
    teacher = _open(request.teacher, "--teacher")
    check_apart(out, request.paths)
    check_apart(out, [resolve(request.folded), resolve(request.teacher)])  # of hub names
    check_place(out)
    if not resume:
        check_older(out, force)
    carried_files(resolve(request.folded))
    if (resolve(request.folded) / RECORD).exists():
        read_record(resolve(request.folded))  # it becomes part of the new one, when all is done
    check_pair(folded, teacher)
    longest = folded.config.get("max_position_embeddings")
    if longest and request.context > int(longest):
        raise InputError(
            f"--context {request.context} is longer than the model's {longest} positions",
            f"use at most --context {longest}",
        )
    for text in request.texts:
        check_source(text)
    checkpoints = (request.keep + 1) * _STATE_BYTES_PER_WEIGHT * folded.parameters
    state = checkpoints if "kl" in request.stages else 0
    written = total_bytes(plan_shards(folded, stored_specs(folded)))
    check_disk(out, 2 * written + state)


def files_to_read(request: HealRequest) -> Files:
    """Everything that healing reads, by what it is to the command.

    A dataset on the hub is known by its name alone.
    """
    files: dict[str, dict[str, Path]] = {}
    for what, model in (("FOLDED", request.folded), ("the teacher", request.teacher)):
        folder = resolve(model)
        files[what] = files_read(open_checkpoint(folder), folder)
    for name in (*(text.name for text in request.texts), *(request.eval_texts or ())):
        path = Path(name).expanduser()
        if path.exists():
            files[f"the text {name}"] = files_of(path)
    return files


def _open(source: str, what: str) -> Checkpoint:
    if is_gguf(source):
        raise InputError(
            f"{what} {source} is a GGUF file; healing needs a Hugging Face folder",
            "`kvfold convert SRC.gguf OUT --kv-heads N` with its own N writes one",
        )
    return open_checkpoint(source)


def check_pair(folded: Checkpoint, teacher: Checkpoint) -> None:
    """Refuse a student and a teacher that cannot be compared token by token, layer by layer.

    Raises:
        InputError: naming what differs.
    """
    sizes = [c.config.get("vocab_size") for c in (folded, teacher)]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"the vocabularies differ: {folded.label} has {sizes[0]} tokens, "
            f"{teacher.label} has {sizes[1]}",
            "the teacher must be the source of FOLDED, or share its tokenizer",
        )
    kinds = [c.config.get("model_type") for c in (folded, teacher)]
    if kinds[0] != kinds[1]:
        target = teacher.family.target
        target_kind = target and target(teacher.config, 1).get("model_type")
        if kinds[0] != target_kind and not isinstance(folded.geometry, LatentGeometry):
            raise InputError(
                f"{folded.label} is a {kinds[0]} model, {teacher.label} a {kinds[1]} one: "
                "different families",
                "the teacher must be the source of FOLDED",
            )
    a, b = folded.geometry, teacher.geometry
    for name in ("num_layers", "hidden_size", "num_heads"):
        if getattr(a, name) != getattr(b, name):
            raise InputError(
                f"{name} differs: {folded.label} has {getattr(a, name)}, "
                f"{teacher.label} has {getattr(b, name)}",
                "the teacher must be the source of FOLDED",
            )
