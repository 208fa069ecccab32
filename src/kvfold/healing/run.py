"""``kvfold heal``: check, fit layer by layer, distil, write, measure."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvfold.arguments import callback, check_options, flag, new_folder
from kvfold.checkpoint.inputs import take_prints
from kvfold.checkpoint.places import full_path, working_folder
from kvfold.checkpoint.pretrained import check_complete, load_tokenizer
from kvfold.checkpoint.source import open_checkpoint, resolve
from kvfold.checkpoint.workspace import Workspace, opened, peak_memory
from kvfold.checkpoint.writer import carry_files, plan_shards, stored_specs, write_shards
from kvfold.errors import RunError
from kvfold.files import copy_file, write_json, write_text
from kvfold.healing import saves
from kvfold.healing.local import heal_layers
from kvfold.healing.loop import Distillation
from kvfold.healing.models import (
    family_of_model,
    load_student,
    load_teacher,
    parameter_groups,
    use_kvfold,
    without_lora,
)
from kvfold.healing.packing import Batch, Tokens, TrainingStream, hold_out, pack
from kvfold.healing.parallel import distribute, world
from kvfold.healing.placing import check_places, healed_tensors, take_trained
from kvfold.healing.record import heal_record, model_card, read_healing
from kvfold.healing.request import (
    CHANGEABLE,
    OPTIONS,
    HealRequest,
    check_heal,
    files_to_read,
)
from kvfold.healing.sources import Corpus, fingerprint, open_corpus
from kvfold.healing.watch import MetricsFile, Watch, unwatched
from kvfold.progress import Progress, no_progress
from kvfold.quality.device import is_out_of_memory, pick_dtype
from kvfold.quality.launched import launched_rank
from kvfold.quality.run import load_model
from kvfold.quality.scores import Quality, compare
from kvfold.quality.text import python_topics, read_texts, token_windows
from kvfold.quality.world import World
from kvfold.record import METRICS, RECORD

_WATCHED_TOKENS = 4096  # of each held-out text, at every evaluation on the way
_DECIDING_TOKENS = 2048  # of held-out text, that decide how much of what training changed is kept
HELD_OUT = "held-out"


def heal(
    folded: str | Path,
    out: str | Path,
    teacher: str | Path,
    texts: Sequence[str | Path],
    *,
    resume: bool = False,
    force: bool = False,
    progress: Progress = no_progress,
    watch: Watch = unwatched,
    **options: Any,
) -> dict[str, Any]:
    """Train a folded checkpoint towards its source and write the result to ``out``.

    First layer by layer (stage ``local``), then as a whole: the Kullback-Leibler divergence of
    its predictions from the source's (stage ``kl``; arXiv 1503.02531).

    Args:
        folded: a folder that :func:`kvfold.convert` made. teacher: its source.
        texts: sources of training text, ``NAME`` or ``NAME=WEIGHT``; see ``healing.sources``.
        resume: go on with an interrupted run of the same request.
        watch: called with every step's metrics.
        options: see :class:`kvfold.healing.request.HealRequest`.

    Returns:
        the record, as written to ``out/kvfold.json``.

    Raises:
        InputError: before anything heavy starts. RunError: if training diverges, or memory or
        disk run out; the last checkpoint stays. KeyboardInterrupt: after saving one.

    >>> heal("folded", "healed", "source", ["text.txt"], tokens=1_000_000)  # doctest: +SKIP
    """
    check_options(options, OPTIONS)
    request = HealRequest.asked(folded=folded, teacher=teacher, texts=texts, **options)
    place = new_folder(out, "OUT")
    resume, force = flag(resume, "resume"), flag(force, "force")
    callback(progress, "progress")
    callback(watch, "watch", takes=1)
    check_heal(request, place, force=force, resume=resume)
    return run_heal(request, place, resume=resume, force=force, progress=progress, watch=watch)


def run_heal(
    request: HealRequest,
    out: Path,
    *,
    resume: bool = False,
    force: bool = False,
    progress: Progress = no_progress,
    watch: Watch = unwatched,
    draw: Callable[[Path], None] = lambda folder: None,
    work: Workspace | None = None,
) -> dict[str, Any]:
    """Do what :func:`heal` describes, for a request that ``check_heal`` has passed.

    Args:
        draw: adds pictures to the finished folder, before it becomes ``out``.
        work: of ``out``, if it is locked already.
    """
    models = _Models(request)
    first = launched_rank() == 0
    with ExitStack() as stack:
        if first and work is None:  # before the processes meet: a second run is told at once
            work = stack.enter_context(opened(out))
        peers = stack.enter_context(world(request.parallel, request.device, request.sequences))
        stack.enter_context(_memory_errors())
        if work is not None and first:
            _start(request, work, resume, force, progress)
        finished = peers.sum([float(work is not None and work.finished)])
        if any(finished):
            return read_healing(full_path(out))
        return _heal(request, models, out, work, peers, resume, progress, watch, draw)


def _start(
    request: HealRequest, work: Workspace, resume: bool, force: bool, progress: Progress
) -> None:
    asked, files = request.as_dict(), files_to_read(request)
    if not work.start(asked, resume=resume, force=force, free=CHANGEABLE, files=files):
        work.begin(asked, take_prints(files, progress))


def _heal(
    request: HealRequest,
    models: "_Models",
    out: Path,
    work: Workspace | None,
    peers: World,
    resume: bool,
    progress: Progress,
    watch: Watch,
    draw: Callable[[Path], None],
) -> dict[str, Any]:
    """All stages, in every process; only the first has the working folder locked, and writes."""
    started = time.monotonic()
    run = _Run(request, models, working_folder(out), peers, progress, watch)
    changed, layers = run.local()
    trained = run.distil(changed)
    record: dict[str, Any] = {}
    if work is not None:
        run.write(work.fresh(), changed, trained)
        quality = run.measure(work.new)
        facts: dict[str, Any] = {
            "seconds": round(time.monotonic() - started, 1),
            "peak_memory_bytes": peak_memory(),
            "resumed": resume,
            "processes": peers.size,
            "device": str(peers.device),
            "dtype": str(run.dtype).removeprefix("torch."),
        }
        record = heal_record(request, run.folder, run.folded, layers, run.kept, quality, facts)
        write_json(work.new / RECORD, record)
        write_text(work.new / "README.md", model_card(record, request))
        draw(work.new)
        work.publish(files_to_read(request))
    peers.barrier()
    return record


@contextmanager
def _memory_errors() -> Iterator[None]:
    hint = "lower --micro-batch or --context, add --gradient-checkpointing, or use more processes"
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise RunError("out of memory", hint) from error


class _Models:
    """The two models and the text, checked before there is a working folder.

    Raises:
        InputError: for weights that are missing, a broken tokenizer, or text that is too short.
        RunError: for a tensor that the healed model could not keep.
    """

    def __init__(self, request: HealRequest) -> None:
        self.folder, self.teacher_folder = resolve(request.folded), resolve(request.teacher)
        self.folded = open_checkpoint(self.folder)
        check_complete(self.folded)
        check_places(self.folded)
        check_complete(open_checkpoint(self.teacher_folder))
        self.vocabulary = self.folded.config.get("vocab_size")
        self.tokens = Tokens(load_tokenizer(self.folder), self.vocabulary)
        self.corpora: list[tuple[str, Corpus, float]] = [
            (source.name, open_corpus(source, request.seed), source.weight)
            for source in request.texts
        ]
        held_out, self.chosen = hold_out(
            self.corpora, self.tokens, request.context, request.held_out_tokens
        )
        self.held_out, self.deciding = _split(held_out)
        self.others = self._other_texts(request)

    def _other_texts(self, request: HealRequest) -> dict[str, torch.Tensor]:
        """Windows of text that is not trained on, by name."""
        texts: dict[str, str] = {}
        if request.eval_texts is not None:
            texts = {Path(p).name: read_texts([p], request.context) for p in request.eval_texts}
        else:
            with suppress(RunError):  # a Python without its documentation
                texts = {"Python documentation": "\n\n".join(python_topics().values())}
        size = max(request.held_out_tokens, request.context)
        return {
            name: token_windows(self.tokens.tokenizer, text, request.context, size, self.vocabulary)
            for name, text in texts.items()
        }


@dataclass
class _Run:
    """One healing run in one process."""

    request: HealRequest
    models: _Models
    partial: Path
    peers: World
    progress: Progress
    watch: Watch

    def __post_init__(self) -> None:
        models = self.models
        self.folder, self.teacher_folder = models.folder, models.teacher_folder
        self.folded, self.tokens, self.corpora = models.folded, models.tokens, models.corpora
        self.held_out, self.chosen, self.others = models.held_out, models.chosen, models.others
        self.kept: dict[str, Any] | None = None

    # -- stages -----------------------------------------------------------------------------

    def local(self) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
        """Layer by layer, in the first process; every process reads the result."""
        if "local" not in self.request.stages:
            return {}, []
        teacher = open_checkpoint(self.teacher_folder)

        def run() -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
            windows, layers = self._local_windows(), self.partial / "layers"
            progress = self.progress if self.peers.first else no_progress
            seed, device = self.request.seed, self.peers.device
            return heal_layers(
                teacher, self.folded, windows, layers, seed, progress, device, self.dtype
            )

        result = run() if self.peers.first else None
        self.peers.barrier()
        return result or run()

    def _local_windows(self) -> torch.Tensor:
        r = self.request
        texts: list[str] = []
        size = 0
        for text in _alternating([corpus for _, corpus, _ in self.corpora]):
            if fingerprint(text) not in self.chosen:
                texts.append(text)
                size += len(self.tokens.of(text))
            if size >= r.local_tokens:
                break
        joined = "\n\n".join(texts)
        return token_windows(self.tokens.tokenizer, joined, r.context, r.local_tokens)

    def distil(self, changed: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The whole model; returns what was trained (in the first process)."""
        if "kl" not in self.request.stages:
            return {}
        training = self._training(changed)
        resumed = training.take_up()
        if self.peers.first:
            file = MetricsFile(self.partial / METRICS, training.step if resumed else 0)
            outside = self.watch

            def both(row: dict[str, Any]) -> None:
                file(row)
                outside(row)

            training.watch = both
        training.run(self.progress if self.peers.first else no_progress)
        self.kept = training.kept
        return saves.trained_tensors(training.student)

    def _training(self, changed: dict[str, torch.Tensor]) -> Distillation:
        r, peers, dtype = self.request, self.peers, self.dtype
        student = load_student(r, changed)
        family = family_of_model(student)
        if peers.device.type == "cpu":
            use_kvfold(student)
        student = distribute(student, peers, dtype, trained=True)
        teacher = distribute(load_teacher(r, dtype), peers, dtype, trained=False)
        return Distillation(
            request=r,
            student=student,
            teacher=teacher,
            groups=parameter_groups(student, family, r),
            stream=TrainingStream(self.corpora, self.tokens, r.context, self.chosen, r.seed),
            held_out=self._watched(),
            deciding=self._deciding(),
            world=peers,
            dtype=dtype,
            folder=self.partial / "checkpoints",
            watch=unwatched,
            at_once=r.at_once(self.models.vocabulary),
        )

    @property
    def dtype(self) -> torch.dtype:
        """What both models multiply in."""
        return pick_dtype(self.request.dtype, self.peers.device)

    def _deciding(self) -> Batch | None:
        most = max(1, _DECIDING_TOKENS // self.request.context)
        deciding = self.models.deciding
        return None if deciding is None else _spread(deciding, most)

    def _watched(self) -> dict[str, Batch]:
        sequences = max(1, _WATCHED_TOKENS // self.request.context)
        texts = {name: pack([[w] for w in ids.tolist()]) for name, ids in self.others.items()}
        if self.held_out is not None:
            texts = {HELD_OUT: self.held_out, **texts}
        return {name: _spread(batch, sequences) for name, batch in texts.items()}

    # -- results ----------------------------------------------------------------------------

    def write(
        self, out: Path, changed: dict[str, torch.Tensor], trained: dict[str, torch.Tensor]
    ) -> None:
        """The healed checkpoint, laid out as the folded one, into an empty folder."""
        model = load_student(self.request, changed)
        take_trained(model, trained)
        read = healed_tensors(self.folded, without_lora(model), trained)
        shards = plan_shards(self.folded, stored_specs(self.folded))
        write_shards(self.folded, out, shards, read)
        copy_file(self.folder / "config.json", out / "config.json")
        carry_files(self.folder, out)
        if (self.partial / METRICS).is_file():
            copy_file(self.partial / METRICS, out / METRICS)
        open_checkpoint(out)  # the headers of what was written are as planned

    def measure(self, healed: Path) -> list[Quality]:
        """Source, folded and healed on held-out text and on text of another kind."""
        texts = dict(self.others)
        if self.held_out is not None:
            texts = {HELD_OUT: self.held_out.ids, **texts}
        device, dtype = str(self.peers.device), self.request.dtype or "float32"
        teacher = load_model(self.teacher_folder, dtype, device)
        results: dict[str, list[Quality]] = {name: [] for name in texts}
        for label, folder in (("folded", self.folder), ("healed", healed)):
            # Two models at a time, however large they are.
            models = [("source", teacher), (label, load_model(folder, dtype, device))]
            for name, windows in texts.items():
                pair = compare(models, windows, name, self.progress)
                results[name] += pair[1:] if results[name] else pair
        return [quality for scores in results.values() for quality in scores]


def _alternating(corpora: list[Corpus]) -> Iterator[str]:
    """A document of each corpus in turn, until all are read."""
    readers = [corpus.documents(epoch=1) for corpus in corpora]
    while readers:
        for reader in list(readers):
            text = next(reader, None)
            if text is None:
                readers.remove(reader)
            else:
                yield text


def _spread(batch: Batch, count: int) -> Batch:
    """So many sequences, evenly spread."""
    index = torch.arange(min(count, len(batch))) * len(batch) // min(count, len(batch))
    return batch.rows(index)


def _split(held_out: Batch | None) -> tuple[Batch | None, Batch | None]:
    """Held-out text to measure on, and a quarter of it to decide on; all for both if it is one."""
    if held_out is None or len(held_out) < 2:
        return held_out, held_out
    rows = torch.arange(len(held_out))
    decides = rows % min(4, len(rows)) == 1
    return held_out.rows(rows[~decides]), held_out.rows(rows[decides])
