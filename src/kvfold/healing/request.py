"""What healing is asked to do, and everything that can be checked before it starts. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

from kvfold.arguments import choice, flag, location, several, source
from kvfold.checkpoint.gguf import is_gguf
from kvfold.checkpoint.inputs import Files, files_of
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
from kvfold.fold.record import RECORD, read_record
from kvfold.healing.sources import TextSource, check_source, parse_source
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
from kvfold.version import __version__

DEFAULT_CONTEXT = 512
STAGES = ("local", "kl")
TRAINED = ("attention", "all")
DTYPES = ("float32", "bfloat16")
PARALLEL = ("ddp", "fsdp")
# What a resumed run may change: everything that does not change which batch comes next.
CHANGEABLE = ("lr", "lr_rest", "clip", "keep", "save_tokens", "eval_tokens", "device", "parallel")
_STATE_BYTES_PER_WEIGHT = 12  # a float32 weight and Adam's two moments


@dataclass(frozen=True)
class HealRequest:
    """What was asked for, with every default filled in; equal requests give equal output.

    Attributes:
        tokens: training tokens of the ``kl`` stage; batch_tokens: per optimizer step, over all
            processes; context: tokens per sequence; micro_batch: sequences per forward pass and
            process.
        train: ``attention`` (q, k, v, o) or ``all``. lr: peak learning rate of attention;
            lr_rest: of everything else.
        temperature: of the divergence; cross_entropy: the share of the loss that is plain
            next-token cross-entropy; hidden: the weight of matching hidden states.
        lora_rank: 0 trains the weights themselves.
    """

    folded: str
    teacher: str
    texts: tuple[TextSource, ...]
    stages: tuple[str, ...]
    tokens: int
    batch_tokens: int
    context: int
    micro_batch: int
    local_tokens: int
    held_out_tokens: int
    eval_texts: tuple[str, ...] | None
    train: str
    lr: float
    lr_rest: float
    warm_up: float
    clip: float
    temperature: float
    cross_entropy: float
    hidden: float
    lora_rank: int
    gradient_checkpointing: bool
    dtype: str | None
    parallel: str | None
    device: str | None
    save_tokens: int
    eval_tokens: int
    keep: int
    seed: int

    @property
    def sequences(self) -> int:
        """Sequences per optimizer step, over all processes."""
        return max(1, self.batch_tokens // self.context)

    @property
    def steps(self) -> int:
        """Optimizer steps of the ``kl`` stage."""
        return max(1, self.tokens // (self.sequences * self.context))

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


def make_heal_request(
    folded: str | Path,
    teacher: str | Path,
    texts: Sequence[str | Path],
    *,
    stages: Sequence[str] | None = None,
    tokens: int = 10_000_000,
    batch_tokens: int = 4096,
    context: int | None = None,
    micro_batch: int | None = None,
    local_tokens: int = 50_000,
    held_out_tokens: int = 16_384,
    eval_texts: Sequence[str | Path] | None = None,
    train: str = "attention",
    lr: float = 5e-5,
    lr_rest: float = 1e-5,
    warm_up: float = 0.05,
    clip: float = 1.0,
    temperature: float = 1.0,
    cross_entropy: float = 0.0,
    hidden: float = 0.0,
    lora_rank: int = 0,
    gradient_checkpointing: bool = False,
    dtype: str | None = None,
    parallel: str | None = None,
    device: str | None = None,
    save_tokens: int | None = None,
    eval_tokens: int | None = None,
    keep: int = 2,
    seed: int = 0,
) -> HealRequest:
    """Fill in defaults and refuse what contradicts itself.

    Args:
        context: 512 by default, or the model's number of positions if that is less.
        stages: by default ``kl``, with ``local`` before it where ``convert`` has not done it.
        save_tokens, eval_tokens: a tenth of ``tokens`` by default.

    Raises:
        InputError: naming the option and what it expects.
    """
    folded = source(folded, "FOLDED")
    tokens = TOKENS.check(tokens, "--tokens")
    tenth = max(1, tokens // 10)
    request = HealRequest(
        folded=folded,
        teacher=source(teacher, "--teacher"),
        texts=several(texts, "--text", _text_source),
        stages=_default_stages(folded) if stages is None else several(stages, "--stages", _stage),
        tokens=tokens,
        batch_tokens=TOKENS.check(batch_tokens, "--batch-tokens"),
        context=_default_context(folded) if context is None else WINDOW.check(context, "--context"),
        micro_batch=MICRO_BATCH.check(1 if micro_batch is None else micro_batch, "--micro-batch"),
        local_tokens=CALIBRATION.check(local_tokens, "--local-tokens"),
        held_out_tokens=HELD_OUT.check(held_out_tokens, "--held-out-tokens"),
        eval_texts=None if eval_texts is None else several(eval_texts, "--eval-text", _path),
        train=choice(train, "--train", TRAINED),
        lr=RATE.check(lr, "--lr"),
        lr_rest=RATE.check(lr_rest, "--lr-rest"),
        warm_up=FRACTION.check(warm_up, "--warm-up"),
        clip=CLIP.check(clip, "--clip"),
        temperature=TEMPERATURE.check(temperature, "--temperature"),
        cross_entropy=FRACTION.check(cross_entropy, "--cross-entropy"),
        hidden=WEIGHT.check(hidden, "--hidden"),
        lora_rank=LORA_RANK.check(lora_rank, "--lora-rank"),
        gradient_checkpointing=flag(gradient_checkpointing, "--gradient-checkpointing"),
        dtype=None if dtype is None else choice(dtype, "--dtype", DTYPES),
        parallel=None if parallel is None else choice(parallel, "--parallel", PARALLEL),
        device=None if device is None else str(device),
        save_tokens=tenth if save_tokens is None else TOKENS.check(save_tokens, "--save-tokens"),
        eval_tokens=tenth if eval_tokens is None else TOKENS.check(eval_tokens, "--eval-tokens"),
        keep=KEEP.check(keep, "--keep"),
        seed=SEED.check(seed, "--seed"),
    )
    _check_together(request)
    return replace(request, batch_tokens=max(request.batch_tokens, request.context))


# What `heal` takes beyond its own arguments.
OPTIONS = tuple(
    name
    for name, parameter in signature(make_heal_request).parameters.items()
    if parameter.kind is Parameter.KEYWORD_ONLY
)


def _text_source(value: object, name: str) -> TextSource:
    return parse_source(source(value, name))


def _stage(value: object, name: str) -> str:
    return choice(value, name, STAGES)


def _path(value: object, name: str) -> str:
    return str(location(value, name))


def _default_stages(folded: str | Path) -> tuple[str, ...]:
    """``local`` is what ``convert --fit local`` does; once is enough."""
    folder = Path(folded).expanduser()
    done = (folder / RECORD).exists() and read_record(folder).get("fit") == "local"
    return ("kl",) if done else STAGES


def _default_context(folded: str | Path) -> int:
    folder = Path(folded).expanduser()
    if not (folder / "config.json").exists():  # what is the matter is said later
        return DEFAULT_CONTEXT
    longest = read_config(folder).get("max_position_embeddings")
    return min(DEFAULT_CONTEXT, longest) if longest else DEFAULT_CONTEXT


def _check_together(request: HealRequest) -> None:
    if not request.texts:
        raise InputError("no text to heal on", "name one or more with --text")
    if not request.stages:
        raise InputError("--stages is empty", "--stages local,kl does both")
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
    written = total_bytes(plan_shards(stored_specs(folded)))
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
        if kinds[0] != target_kind:
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
