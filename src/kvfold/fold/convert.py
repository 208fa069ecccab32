"""``kvfold convert``: check, plan, fold layer by layer, write, verify.

Everything is made in ``OUT.partial`` beside OUT and renamed when whole. A folded layer is kept
there as soon as it is done, so an interrupted run can be taken up with ``resume``.
"""

import errno
import hashlib
import json
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvfold.checkpoint.gguf import is_gguf, transcode
from kvfold.checkpoint.source import Checkpoint, TensorFiles, open_checkpoint, resolve
from kvfold.checkpoint.tensors import (
    TensorEntry,
    TensorSpec,
    dtype_name,
    read_header,
    read_tensor,
    write_tensors,
)
from kvfold.checkpoint.writer import (
    MAX_SHARD_BYTES,
    Shard,
    carry_files,
    folded_config,
    plan_shards,
    write_json,
    write_shards,
)
from kvfold.errors import InputError, RunError
from kvfold.fold.methods import AUTO
from kvfold.fold.record import BUILTIN_WARNING, geometry_record, model_card, summary, versions
from kvfold.fold.request import (
    DEFAULT_CALIBRATION_TOKENS,
    DEFAULT_CONTEXT,
    LEAST_TOKENS,
    Request,
    calibration_text,
    command_line,
    make_request,
    preview,
)
from kvfold.quality.run import load_tokenizer
from kvfold.quality.scores import Progress, no_progress
from kvfold.quality.text import token_windows

if TYPE_CHECKING:
    import torch

    from kvfold.fold.pipeline import FoldedLayer

RECORD = "kvfold.json"


def convert(
    source: str | Path,
    out: str | Path,
    num_kv_heads: int,
    *,
    method: str = AUTO,
    fit: str | None = None,
    calibration: Sequence[str | Path] | None = None,
    calibrate: bool = True,
    calibration_tokens: int = DEFAULT_CALIBRATION_TOKENS,
    context: int = DEFAULT_CONTEXT,
    seed: int = 0,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    resume: bool = False,
    force: bool = False,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Fold a checkpoint to ``num_kv_heads`` KV heads and write it to ``out``.

    Args:
        source: a Hugging Face folder, a hub name, or a GGUF file.
        method: see ``kvfold methods``. fit: ``none``, ``refit`` or ``local``; by default
            ``local``, and ``none`` for the GQA paper's data-free methods.
        calibration: UTF-8 text files; the small built-in text by default. ``calibrate=False``
            uses none at all.
        calibration_tokens: use at most so many, in windows of ``context``.
        resume: take up an interrupted run of the same request; its output is byte-identical to
            that of an uninterrupted one (but for the ``run`` entry of the record).
        force: replace ``out`` if it exists.

    Returns:
        the record, as written to ``out/kvfold.json``.

    Raises:
        InputError: before anything heavy starts. RunError: if the disk fills up midway.

    >>> record = convert("source", "folded", 4)  # doctest: +SKIP
    """
    request = make_request(
        source, num_kv_heads, method=method, fit=fit, calibration=calibration,
        calibrate=calibrate, calibration_tokens=calibration_tokens, context=context, seed=seed,
        max_shard_bytes=max_shard_bytes,
    )  # fmt: skip
    return run_request(request, Path(out), resume=resume, force=force, progress=progress)


def run_request(
    request: Request,
    out: Path,
    *,
    resume: bool = False,
    force: bool = False,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Do what :func:`convert` describes."""
    out_path = out.expanduser().absolute()
    preview(request, out_path, force=force)
    text = calibration_text(request)
    partial = out_path.with_name(out_path.name + ".partial")
    _prepare(partial, request, resume=resume, force=force)
    started = time.monotonic()
    with _disk_errors(partial):
        record = _run(request, text, partial, progress)
        record["run"] = {
            "seconds": round(time.monotonic() - started, 1),
            "peak_memory_bytes": _peak_memory(),
            "resumed": resume,
        }
        write_json(partial / "out" / RECORD, record)
    _publish(partial, out_path)
    return record


def _prepare(partial: Path, request: Request, *, resume: bool, force: bool) -> None:
    """Make or take up the working folder."""
    asked = json.loads(json.dumps(request.as_dict()))
    stored = partial / "request.json"
    if partial.exists() and resume:
        if not stored.is_file() or json.loads(stored.read_text(encoding="utf-8")) != asked:
            raise InputError(
                f"{partial} belongs to another conversion; cannot resume it",
                "repeat the first command's arguments, or --force to start over",
            )
        return
    if partial.exists():
        if not force:
            raise InputError(
                f"{partial} is left from an interrupted run",
                "--resume to go on with it, --force to start over",
            )
        shutil.rmtree(partial)
    if resume:
        raise InputError(f"nothing to resume: there is no {partial}", "run without --resume")
    (partial / "layers").mkdir(parents=True)
    (partial / "out").mkdir()
    write_json(stored, asked)


@contextmanager
def _disk_errors(partial: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RunError(
            f"the disk is full; what is done so far is kept in {partial}",
            "free some space and repeat the command with --resume",
        ) from error


def _run(request: Request, text: str | None, partial: Path, progress: Progress) -> dict[str, Any]:
    folder = _local_source(request, partial)
    checkpoint = open_checkpoint(folder)
    assert isinstance(checkpoint.store, TensorFiles)
    hashes = _verify(checkpoint, checkpoint.store, progress)
    out = partial / "out"
    same = request.num_kv_heads == checkpoint.geometry.num_kv_heads
    windows = None if text is None or same else _windows(checkpoint, folder, request, text)
    layers = [] if same else _fold_layers(checkpoint, request, windows, partial, progress)
    shards = plan_shards(checkpoint, request.num_kv_heads, request.max_shard_bytes)
    _write(checkpoint, request, shards, partial, progress)
    write_json(out / "config.json", folded_config(checkpoint, request.num_kv_heads))
    carried = carry_files(folder, out)
    record = _record(checkpoint, request, text, windows, layers)
    record["source"] |= {"sha256": hashes, "carried": carried}
    (out / "README.md").write_text(model_card(checkpoint, record), encoding="utf-8")
    open_checkpoint(out)  # the headers of what was written are as planned
    return record


def _local_source(request: Request, partial: Path) -> Path:
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


def _verify(checkpoint: Checkpoint, store: TensorFiles, progress: Progress) -> dict[str, str]:
    """Read the source once: hash its files, and find NaNs now rather than in an hour."""
    for index, name in enumerate(store.names(), 1):
        checkpoint.tensor(name)
        progress("checking the source", index, len(store.names()))
    hashes = {}
    for file in store.files:
        with file.open("rb") as opened:
            hashes[file.name] = hashlib.file_digest(opened, "sha256").hexdigest()
    return hashes


def _windows(checkpoint: Checkpoint, folder: Path, request: Request, text: str) -> "torch.Tensor":
    longest = checkpoint.config.get("max_position_embeddings") or request.context
    context = min(request.context, int(longest))
    windows = token_windows(load_tokenizer(folder), text, context, request.calibration_tokens)
    if windows.numel() < LEAST_TOKENS:
        raise InputError(
            f"the calibration text has {windows.numel()} tokens; expected at least {LEAST_TOKENS}",
            "give more text: 50,000 tokens is good",
        )
    return windows


def _fold_layers(
    checkpoint: Checkpoint,
    request: Request,
    windows: "torch.Tensor | None",
    partial: Path,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Fold all layers, keeping each on disk; return their reports."""
    from kvfold.fold.pipeline import FoldPlan, fold_all

    plan = FoldPlan(request.num_kv_heads, request.method, request.fit, request.seed)
    kept = partial / "layers"
    reports = []
    stored = _stored_layers(kept)
    for layer in fold_all(checkpoint, plan, windows, partial / "hidden", stored, progress):
        if stored(layer.index) is None:
            _keep_layer(kept, layer)
        reports.append({**layer.report.as_dict(), "stages": layer.stages})
    shutil.rmtree(partial / "hidden", ignore_errors=True)
    return reports


def _keep_layer(folder: Path, layer: "FoldedLayer") -> None:
    """The report is renamed into place last: it says that the layer is whole."""
    specs = [
        TensorSpec(name, dtype_name(tensor.dtype), tuple(tensor.shape))
        for name, tensor in layer.tensors.items()
    ]
    write_tensors(folder / f"{layer.index}.safetensors", specs, iter(layer.tensors.values()))
    temporary = folder / f"{layer.index}.json.tmp"
    write_json(temporary, {"report": layer.report.as_dict(), "stages": layer.stages})
    temporary.replace(folder / f"{layer.index}.json")


def _stored_layers(folder: Path) -> "Callable[[int], FoldedLayer | None]":
    def stored(index: int) -> "FoldedLayer | None":
        path = folder / f"{index}.json"
        if not path.is_file():
            return None
        from kvfold.fold.layer import LayerReport
        from kvfold.fold.pipeline import FoldedLayer

        value = json.loads(path.read_text(encoding="utf-8"))
        entries = read_header(folder / f"{index}.safetensors")
        tensors = {name: read_tensor(entry) for name, entry in entries.items()}
        return FoldedLayer(index, tensors, LayerReport(**value["report"]), value["stages"])

    return stored


def _write(
    checkpoint: Checkpoint,
    request: Request,
    shards: list[Shard],
    partial: Path,
    progress: Progress,
) -> None:
    """Stream the output: folded tensors from the kept layers, the rest from the source."""
    changed: dict[str, TensorEntry] = {}
    for path in (partial / "layers").glob("*.safetensors"):
        changed |= read_header(path)
    rewrite = checkpoint.family.rewrite if changed else None

    def load(name: str) -> "torch.Tensor":
        if name in changed:
            return read_tensor(changed[name])
        tensor = checkpoint.tensor(name)
        return rewrite(name, tensor) if rewrite else tensor

    write_shards(
        partial / "out", shards, load, lambda done, total: progress("writing", done, total)
    )


def _record(
    checkpoint: Checkpoint,
    request: Request,
    text: str | None,
    windows: "torch.Tensor | None",
    layers: list[dict[str, Any]],
) -> dict[str, Any]:
    folded = checkpoint.geometry.with_kv_heads(request.num_kv_heads)
    builtin = windows is not None and not request.calibration
    calibration = None
    if windows is not None and text is not None:
        calibration = {
            "texts": list(request.calibration or ["built-in"]),
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
            "tokens": windows.numel(),
            "context": windows.shape[1],
            "builtin": builtin,
        }
    return {
        "format": 1,
        "versions": versions(),
        "command": command_line(request),
        "source": {"name": request.source, "family": checkpoint.family.name},
        "geometry": geometry_record(checkpoint.geometry, folded),
        "method": request.method,
        "fit": request.fit,
        "seed": request.seed,
        "calibration": calibration,
        "warnings": [BUILTIN_WARNING] if builtin else [],
        "summary": summary(layers),
        "layers": layers,
    }


def _publish(partial: Path, out: Path) -> None:
    """Rename the finished folder into place; an older OUT goes only then."""
    old = out.with_name(out.name + ".old")
    if out.exists():
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
    (partial / "out").rename(out)
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(partial, ignore_errors=True)


def _peak_memory() -> int:
    """The largest resident size of this process, bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
