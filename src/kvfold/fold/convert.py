"""``kvfold convert``: check, plan, fold layer by layer, write, verify.

Everything is made in ``OUT.partial`` beside OUT and renamed when whole. A folded layer is kept
there as soon as it is done, so an interrupted run can be taken up with ``resume``.
"""

import hashlib
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvfold.checkpoint.gguf import is_gguf, transcode
from kvfold.checkpoint.source import Checkpoint, TensorFiles, open_checkpoint, resolve
from kvfold.checkpoint.tensors import (
    TensorEntry,
    read_header,
    read_tensor,
)
from kvfold.checkpoint.workspace import (
    disk_errors,
    partial_folder,
    peak_memory,
    prepare,
    publish,
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
from kvfold.errors import InputError
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
    partial = partial_folder(out_path)
    prepare(partial, request.as_dict(), resume=resume, force=force)
    (partial / "layers").mkdir(exist_ok=True)
    started = time.monotonic()
    with disk_errors(partial):
        record = _run(request, text, partial, progress)
        record["run"] = {
            "seconds": round(time.monotonic() - started, 1),
            "peak_memory_bytes": peak_memory(),
            "resumed": resume,
        }
        write_json(partial / "out" / RECORD, record)
    publish(partial, out_path)
    return record


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
    from kvfold.fold.kept import keep_layer, stored_layers
    from kvfold.fold.pipeline import FoldPlan, fold_all, layer_report

    plan = FoldPlan(request.num_kv_heads, request.method, request.fit, request.seed)
    kept = partial / "layers"
    reports = []
    stored = stored_layers(kept)
    for layer in fold_all(checkpoint, plan, windows, partial / "hidden", stored, progress):
        if stored(layer.index) is None:
            keep_layer(kept, layer)
        reports.append(layer_report(layer))
    shutil.rmtree(partial / "hidden", ignore_errors=True)
    return reports


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
