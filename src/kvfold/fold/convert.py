"""``kvfold convert``: check, plan, fold layer by layer, write, verify.

Everything is made in a working folder beside OUT (``checkpoint.workspace``) and renamed when
whole. A folded layer is kept there as soon as it is done, so an interrupted run can be taken up
with ``resume``.
"""

import hashlib
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvfold.arguments import callback, flag, location, new_folder, several
from kvfold.checkpoint.gguf import is_gguf, transcode
from kvfold.checkpoint.inputs import Files, files_of, take_prints
from kvfold.checkpoint.places import full_path
from kvfold.checkpoint.pretrained import check_complete
from kvfold.checkpoint.source import (
    Checkpoint,
    open_checkpoint,
    resolve,
)
from kvfold.checkpoint.tensors import (
    TensorEntry,
    read_header,
    read_tensor,
)
from kvfold.checkpoint.workspace import Workspace, opened, peak_memory
from kvfold.checkpoint.writer import (
    Shard,
    carried_from,
    carry_files,
    files_read,
    folded_config,
    folded_specs,
    plan_shards,
    write_shards,
)
from kvfold.files import write_json, write_text
from kvfold.fold.preview import Preview, calibration_text, preview
from kvfold.fold.record import (
    BUILTIN_WARNING,
    constant_warnings,
    geometry_record,
    model_card,
    read_folding,
    summary,
)
from kvfold.fold.request import NO_CALIBRATION, ConvertRequest
from kvfold.fold.settle import compared, fold_layers, searched
from kvfold.fold.windows import Cut, early_windows, windows_of
from kvfold.progress import Progress, no_progress
from kvfold.quality.device import pick_dtype
from kvfold.quality.launched import launched_rank
from kvfold.quality.text import GivenText
from kvfold.record import RECORD, command_line, versions

if TYPE_CHECKING:
    import torch

    from kvfold.quality.world import World

_SOURCE = "the source"


def convert(
    source: str | Path,
    out: str | Path,
    num_kv_heads: int | None = None,
    *,
    latent: str | None = None,
    kv_bytes: str | None = None,
    max_ppl_ratio: float | None = None,
    max_kl: float | None = None,
    layout: str = ConvertRequest.layout,
    pad: str | None = None,
    method: str = ConvertRequest.method,
    fit: str | None = None,
    fit_steps: int | None = None,
    calibration: Sequence[str | Path] | None = None,
    calibrate: bool = True,
    calibration_tokens: int = ConvertRequest.calibration_tokens,
    context: int = ConvertRequest.context,
    device: str | None = None,
    dtype: str | None = None,
    seed: int = ConvertRequest.seed,
    max_shard_bytes: int = ConvertRequest.max_shard_bytes,
    resume: bool = False,
    force: bool = False,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Fold a checkpoint to ``num_kv_heads`` KV heads, or to a latent, and write it to ``out``.

    Args:
        source: a Hugging Face folder, a hub name, or a GGUF file.
        latent: in place of ``num_kv_heads``: ``"160+32"`` makes all heads read one latent of 160
            numbers and one rotary key of 32 (multi-head latent attention, arXiv 2405.04434);
            ``"192"`` chooses between such of 192 numbers, by measuring.
        kv_bytes: in place of both: ``"50%"`` of the source's cache, by heads or a latent,
            whichever changes its predictions on the calibration text less.
        max_ppl_ratio, max_kl: in place of all of these: the fewest KV heads with no higher ratio of
            perplexities (folded to source), and no higher KL, on calibration text that is held out.
        layout: what a latent is stored as: ``deepseek_v3``, ``portable`` or ``youtu``.
        pad: sizes that a latent is padded to with zeros, for engines that take no others.
        method: see ``kvfold methods``. fit: ``none``, ``refit`` or ``local``; by default
            ``local``, and ``none`` for the GQA paper's data-free methods. fit_steps: of gradient
            descent on each layer, with ``local``.
        calibration: UTF-8 text files; the small built-in text by default. ``calibrate=False``
            uses none at all.
        calibration_tokens: use at most so many, in windows of ``context``.
        device: what layers run and are fitted on; by default a GPU if there is one.
        dtype: ``float32`` or ``bfloat16``, what they multiply in; by default bfloat16 where the
            device has it in hardware. All else is float32.
        resume: take up an interrupted run of the same request; its output is byte-identical to
            that of an uninterrupted one (but for the ``run`` entry of the record).
        force: replace ``out`` if it exists.

    Returns:
        the record, as written to ``out/kvfold.json``.

    Raises:
        InputError: before anything heavy starts. RunError: if the disk fills up midway.
        ThresholdError: if no number of KV heads keeps ``max_ppl_ratio`` and ``max_kl``.

    >>> record = convert("source", "folded", 4)  # doctest: +SKIP
    """
    texts = () if calibration is None else several(calibration, "--calibration", location)
    request = ConvertRequest.asked(
        source=source,
        grouped=num_kv_heads,
        latent=latent,
        kv_bytes=kv_bytes,
        max_ppl_ratio=max_ppl_ratio,
        max_kl=max_kl,
        layout=layout,
        pad=pad,
        method=method,
        fit=fit,
        fit_steps=fit_steps,
        calibration=NO_CALIBRATION.choose(texts, not flag(calibrate, "calibrate")),
        calibration_tokens=calibration_tokens,
        context=context,
        device=device,
        dtype=dtype,
        seed=seed,
        max_shard_bytes=max_shard_bytes,
    )
    place = new_folder(out, "OUT")
    resume, force = flag(resume, "resume"), flag(force, "force")
    callback(progress, "progress")
    options: Any = {"resume": resume, "force": force, "progress": progress}
    return run_request(request, place, **options)


def run_request(
    request: ConvertRequest,
    out: Path,
    *,
    resume: bool = False,
    force: bool = False,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Do what :func:`convert` describes."""
    found = preview(request, out, force=force, resume=resume)
    cut = None
    if not resume:  # known before there is a working folder
        cut = early_windows(found)
    from kvfold.fold.processes import check_alike
    from kvfold.quality.world import joined

    started, first = time.monotonic(), launched_rank() == 0
    if not first:
        progress = no_progress
    with ExitStack() as stack:
        work = stack.enter_context(opened(out)) if first else None  # a second run is told at once
        world = stack.enter_context(joined(request.device))
        check_alike(request, world)
        files = _files(request) if work else {}
        if work and not work.start(request.as_dict(), resume=resume, force=force, files=files):
            read = found.text.prints if found.text else None
            work.begin(request.as_dict(), take_prints(files, progress, read))
        if world.tell(work is not None and work.finished):
            return read_folding(full_path(out))
        record = world.tell(_run(found, cut, work, world, progress))
        if work is not None:
            record["run"] = {
                "seconds": round(time.monotonic() - started, 1),
                "peak_memory_bytes": peak_memory(),
                "resumed": resume,
                "processes": world.size,
            }
            write_json(work.new / RECORD, record)
            work.publish(files)
        world.barrier()
    return record


def _files(request: ConvertRequest) -> Files:
    """Everything that a conversion reads, by what it is to the command."""
    if is_gguf(request.source):
        source = files_of(Path(request.source).expanduser())
    else:
        folder = resolve(request.source)
        source = files_read(open_checkpoint(folder), folder)
    texts = {f"the text {name}": files_of(Path(name).expanduser())
             for name in request.files}  # fmt: skip
    return {_SOURCE: source, **texts}


def made_now(record: Mapping[str, Any], request: ConvertRequest) -> bool:
    """Whether a record is that of a request, on the weights and the text that are there now."""
    text = calibration_text(request)
    prints = take_prints(_files(request), taken=text.prints if text else None)[_SOURCE]
    source, calibration = record.get("source"), record.get("calibration")
    weights = source.get("sha256") if isinstance(source, Mapping) else None
    known = calibration.get("sha256") if isinstance(calibration, Mapping) else None
    return (
        record.get("command") == command_line(request)
        and isinstance(weights, Mapping)
        and all(prints[name]["sha256"] == weights.get(name) for name in prints if _holds(name))
        and (text is None or known in (None, _sha256(text.text)))
    )


def _holds(name: str) -> bool:
    """Whether a file holds weights."""
    return name.lower().endswith((".safetensors", ".gguf"))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _run(
    found: Preview,
    cut: Cut | None,
    work: Workspace | None,
    world: "World",
    progress: Progress,
) -> dict[str, Any]:
    """In every process; the first has the working folder, and writes."""
    from kvfold.fold.processes import check_enough

    request, text = found.request, found.text
    folder = world.tell(_local_source(request, work.folder) if work else Path())
    checkpoint = open_checkpoint(folder)
    if work:
        _verify(checkpoint, progress)
    same = request.keeps(checkpoint.geometry)
    if is_gguf(request.source):
        check_complete(checkpoint)
    if cut is None and work:
        own = None
        if request.writes_own:
            from kvfold.fold.own_text import kept_windows

            kept = work.folder / "own.json"
            where = world.device, pick_dtype(request.dtype, world.device)
            own = partial(kept_windows, kept, folder, request.seed, where, progress)
        cut = windows_of(checkpoint.config, checkpoint.geometry, folder, request, text, own)
    cut = world.tell(cut)
    check_enough(cut, world)
    asked, tried = request, dict[str, Any]()
    if request.is_open:
        made = None
        if work:
            settle = searched if request.searches else compared
            made = settle(found, checkpoint, cut, work.folder, world, progress)
        found_one = world.tell(made)
        assert found_one is not None
        request, tried = found_one
    layers, held_out = list[dict[str, Any]](), None
    if not same:
        place = work.folder / "layers" if work else None
        layers, held_out = fold_layers(checkpoint, request, cut, place, world, progress)
    if work is None:
        return {}
    specs = folded_specs(checkpoint, request.target)
    shards = plan_shards(checkpoint, specs, request.max_shard_bytes)
    _write(checkpoint, request, shards, work.folder, progress)
    write_json(work.new / "config.json", folded_config(checkpoint, request.target))
    carried = carry_files(folder, work.new)
    record = _record(checkpoint, request, text, cut, layers, world)
    if held_out is not None:
        record["held_out"] = held_out
    if tried:
        record |= {"command": command_line(asked), **tried}
    record["source"] |= {"sha256": _weight_hashes(work, checkpoint), "carried": carried}
    write_text(work.new / "README.md", model_card(checkpoint, request.target, record))
    open_checkpoint(work.new)  # the headers of what was written are as planned
    return record


def _local_source(request: ConvertRequest, partial: Path) -> Path:
    """The source's folder; a GGUF file is dequantized into the working folder once."""
    if not is_gguf(request.source):
        return resolve(request.source)
    folder = partial / "source"
    if not folder.exists():
        temporary = partial / "source.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        transcode(Path(request.source).expanduser(), temporary)
        temporary.rename(folder)
    return folder


def _weight_hashes(work: Workspace, checkpoint: Checkpoint) -> dict[str, str]:
    """Of the source's shards, or of its GGUF file."""
    prints = work.prints[_SOURCE]
    names = [file.name for file in checkpoint.files if file.name in prints] or list(prints)
    return {name: prints[name]["sha256"] for name in names}


def _verify(checkpoint: Checkpoint, progress: Progress) -> None:
    """Read the source once, to find NaNs now rather than in an hour."""
    names = checkpoint.store.names()
    for index, name in enumerate(names, 1):
        checkpoint.tensor(name)
        progress("checking the source", index, len(names))


def _write(
    checkpoint: Checkpoint,
    request: ConvertRequest,
    shards: list[Shard],
    partial: Path,
    progress: Progress,
) -> None:
    """Stream the output: folded tensors from the kept layers, the rest from the source."""
    changed: dict[str, TensorEntry] = {}
    for path in (partial / "layers").glob("*.safetensors"):
        changed |= read_header(path)
    carried = carried_from(checkpoint, request.target) if changed else {}

    def load(name: str) -> "torch.Tensor":
        if name in changed:
            return read_tensor(changed[name])
        if name not in carried:
            return checkpoint.tensor(name)
        source, made = carried[name]
        return made.make(checkpoint.tensor(source)).contiguous()

    def done(number: int, total: int) -> None:
        progress("writing", number, total)

    write_shards(checkpoint, partial / "out", shards, load, done)


def _record(
    checkpoint: Checkpoint,
    request: ConvertRequest,
    text: GivenText | None,
    cut: Cut | None,
    layers: list[dict[str, Any]],
    world: "World",
) -> dict[str, Any]:
    builtin = cut is not None and not request.calibration
    calibration = computed = None
    if cut is not None:
        dtype = pick_dtype(request.dtype, world.device)
        computed = {"device": world.device.type, "dtype": str(dtype).removeprefix("torch.")}
        calibration = {
            "texts": list(request.calibration or ["built-in"]),
            "sha256": None if text is None else _sha256(text.text),
            "tokens": cut.calibration.numel(),
            "context": cut.calibration.shape[1],
            "builtin": builtin,
        }
    return {
        "format": 1,
        "versions": versions(),
        "command": command_line(request),
        "source": {"name": request.source, "family": checkpoint.family.name},
        "geometry": geometry_record(checkpoint.geometry, request.target),
        "method": request.method,
        "fit": request.fit,
        "computed": computed,
        "seed": request.seed,
        "calibration": calibration,
        "warnings": [
            *([BUILTIN_WARNING] if builtin else []),
            *request.target.warnings,
            *constant_warnings(layers),
        ],
        "summary": summary(layers),
        "layers": layers,
    }
