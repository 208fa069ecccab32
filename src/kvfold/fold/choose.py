"""Heads or a latent, and which? What keeps more of the source's attention in so much cache.

Where a request leaves its target open, layers spread over the depth are folded to each candidate in
closed form, run on the source's own inputs, and compared by what their attention puts out: in the
windows that calibration has, and in long ones, for what no longer turns with distance fails late.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch

from kvfold.arch.families import BY_TYPE
from kvfold.arch.target import Latent, Target
from kvfold.checkpoint.records import COMPARED, ComparedRow
from kvfold.checkpoint.source import Checkpoint
from kvfold.errors import RunError
from kvfold.files import write_json
from kvfold.fold.layer import FoldPlan, fold_layer
from kvfold.fold.passes import Calibration, Load, SourcePass, loader
from kvfold.fold.stored_layer import StoredLayer
from kvfold.fold.stream import LayerStream
from kvfold.progress import Progress, no_progress

TOKENS = 8192  # of the calibration text; the order of candidates needs no more
LONG = 4096  # tokens of a long window
LAYERS = 8  # that are folded; the source is run through all before the last of them
KEPT = "compared.json"


@dataclass(frozen=True)
class Compared:
    """A candidate and how far its attention is from the source's.

    Attributes:
        errors: by tokens of a window: |a - a_source|^2 / |a_source|^2 of what attention puts out,
            mean over the layers that were folded.
    """

    target: Target
    errors: dict[int, float]

    def as_dict(self) -> ComparedRow:
        errors = {str(tokens): error for tokens, error in self.errors.items()}
        return {"target": self.target.label, "attention_error": errors}


def choose(
    kept: Path, targets: Sequence[Target], measure: Callable[[], list[Compared]]
) -> tuple[Target, list[ComparedRow]]:
    """The best target, and how all of them compare.

    Args:
        kept: the file that keeps the comparison for a run that is taken up again.
        measure: makes the comparison, if it is not kept.

    Raises:
        RunError: if the file is no comparison of these targets.
    """
    if not kept.exists():
        write_json(kept, [each.as_dict() for each in measure()])
    rows = COMPARED.read(kept)
    if [row["target"] for row in rows] != [target.label for target in targets]:
        raise RunError(f"{kept} compares something else", "--force instead of --resume starts over")
    errors = [fmean(row["attention_error"].values()) for row in rows]  # lengths count alike
    return targets[errors.index(min(errors))], rows


def compare(
    checkpoint: Checkpoint,
    targets: Sequence[Target],
    windows: torch.Tensor,
    *,
    method: str,
    seed: int,
    progress: Progress = no_progress,
) -> list[Compared]:
    """Fold some layers to each target, without fitting, and measure; see :class:`Compared`.

    Args:
        windows: token ids ``[N, T]``; about the first ``TOKENS`` of them are used.
    """
    load = loader(checkpoint)
    cut = _short_and_long(checkpoint, windows)
    lengths = [_Length(checkpoint, targets, each, load) for each in cut]
    scales = [_residual_scale(checkpoint, target) for target in targets]
    plans = [FoldPlan(target, method, "none", seed) for target in targets]
    chosen = _spread(checkpoint.geometry.num_layers)
    found: list[list[dict[int, float]]] = []
    for index in range(chosen[-1] + 1):
        layer = StoredLayer(checkpoint, index)
        if index in chosen:
            found.append(_errors(layer, plans, lengths, scales))
        else:
            for each in lengths:
                each.source.run(layer)
        for each in lengths:
            each.source.advance()
        progress("comparing what to fold to", index + 1, chosen[-1] + 1)
    return [
        Compared(target, {tokens: fmean(row[tokens] for row in rows) for tokens in rows[0]})
        for target, rows in zip(targets, zip(*found, strict=True), strict=True)
    ]


def _spread(layers: int) -> list[int]:
    """The middles of ``LAYERS`` parts of the depth; all of fewer layers."""
    parts = min(LAYERS, layers)
    return [(2 * part + 1) * layers // (2 * parts) for part in range(parts)]


def _errors(
    layer: StoredLayer, plans: Sequence[FoldPlan], lengths: Sequence["_Length"], scales: list[float]
) -> list[dict[int, float]]:
    """Of the layer folded by each plan, by tokens of a window."""
    short, *others = lengths
    attended = any(isinstance(plan.target, Latent) for plan in plans)
    statistics = short.source.statistics(layer, short.attention, attended=attended)
    for other in others:
        other.source.run(layer, other.attention)
    rows = []
    for number, plan in enumerate(plans):
        tensors = fold_layer(layer, plan, statistics).completed(layer, plan.target)
        rows.append({
            each.tokens: _error(
                each,
                each.streams[number],
                layer.index,
                tensors,
                each.source.residual_scale / scales[number],
            )
            for each in lengths
        })  # fmt: skip
    return rows


def _short_and_long(checkpoint: Checkpoint, windows: torch.Tensor) -> list[torch.Tensor]:
    """About as many tokens in windows as they are, and laid end to end in long ones."""
    tokens = windows.shape[1]
    some = windows[: max(1, TOKENS // tokens)]
    most = checkpoint.config.get("max_position_embeddings") or LONG
    joined = min(LONG, int(most), some.numel()) // tokens
    if joined < 2:
        return [some]
    return [some, some[: len(some) // joined * joined].reshape(-1, joined * tokens)]


class _Length:
    """The source, run on windows of one length.

    Attributes:
        attention: what its attention puts out in the layer that was run last.
        streams: each target's layers, ready to run on such windows.
    """

    def __init__(
        self, checkpoint: Checkpoint, targets: Sequence[Target], windows: torch.Tensor, load: Load
    ) -> None:
        calibration = Calibration(windows)
        self.tokens = windows.shape[1]
        self.source = SourcePass(checkpoint, calibration, load)
        self.attention = calibration.states("attention", checkpoint.geometry.hidden_size)
        self.streams = [_stream(checkpoint, target, calibration) for target in targets]


def _stream(checkpoint: Checkpoint, target: Target, calibration: Calibration) -> LayerStream:
    """The folded model, ready to run single layers."""
    family = checkpoint.family
    config = target.config(family, checkpoint.config)
    stream = LayerStream(config, family.layer, family.attention, calibration.device)
    first = Calibration(calibration.windows[:1], device=calibration.device)
    states = first.states("first", checkpoint.geometry.hidden_size)
    stream.start(first.texts, loader(checkpoint), states)  # for what layers are called with
    return stream


def _residual_scale(checkpoint: Checkpoint, target: Target) -> float:
    config = target.config(checkpoint.family, checkpoint.config)
    return BY_TYPE[config["model_type"]].residual_factor(config)


@torch.no_grad()
def _error(
    length: _Length,
    stream: LayerStream,
    index: int,
    tensors: dict[str, torch.Tensor],
    scale: float,
) -> float:
    """Of one layer's attention, on the source's inputs.

    Args:
        scale: of the source's attention in the folded model, whose blocks may be scaled otherwise.
    """
    inputs = length.source.inputs
    apart, size = 0.0, 0.0
    with stream.layer(index, tensors) as live:
        for batch in inputs.batches():
            wanted = length.attention[batch] * scale
            apart += float((live.attention_of(inputs[batch]) - wanted).square().sum())
            size += float(wanted.square().sum())
    return apart / max(size, 1e-300)
