"""Heads or a latent, and which? What keeps more of the source's attention in so much cache.

Where a request leaves its target open, layers spread over the depth are folded to each candidate,
run on the source's own inputs, and compared by what their attention puts out: in the windows that
calibration has, and in long ones, for what no longer turns with distance fails late. Where layers
will be fitted, those are fitted too, for a short time, and compared on other text: what a closed
form is worth says little about what it is worth after a fit.
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
from kvfold.fold.fit import fit_attention
from kvfold.fold.layer import FoldPlan, fold_layer
from kvfold.fold.passes import CPU, Calibration, Load, SourcePass, fit_task, loader
from kvfold.fold.stored_layer import StoredLayer, Tensors
from kvfold.fold.stream import LayerStream, LiveLayer
from kvfold.progress import Progress, no_progress

TOKENS = 8192  # of the calibration text; the order of candidates needs no more
LONG = 4096  # tokens of a long window
LAYERS = 8  # that are folded; the source is run through all before the last of them
FITTED_LAYERS = 4  # where they are fitted, which takes longer,
STEPS = 30  # with so many steps
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
    fit: str,
    seed: int,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
    progress: Progress = no_progress,
) -> list[Compared]:
    """Fold some layers to each target and measure; see :class:`Compared`.

    Args:
        device, dtype: as in ``Calibration``.
        windows: token ids ``[N, T]``; about the first ``TOKENS`` of them are used, and as many
            more to fit on where ``fit`` is ``local``.
    """
    fitted = fit == "local"
    load = loader(checkpoint)
    seen, measured = _cut(checkpoint, windows, fitted)
    texts = [
        _Text(checkpoint, Calibration(each, device=device, dtype=dtype), load)
        for each in (seen, *measured)
    ]
    if not fitted:
        texts = texts[1:]  # the first two are one
    plans = [FoldPlan(target, method, fit, seed) for target in targets]
    candidates = [_Candidate(checkpoint, plan, texts, load) for plan in plans]
    chosen = _spread(checkpoint.geometry.num_layers, FITTED_LAYERS if fitted else LAYERS)
    found: list[list[dict[int, float]]] = []
    for index in range(chosen[-1] + 1):
        layer = StoredLayer(checkpoint, index)
        if index in chosen:
            found.append(_errors(layer, candidates, texts, fitted))
        else:
            for each in texts:
                each.source.run(layer)
        for each in texts:
            each.source.advance()
        progress("comparing what to fold to", index + 1, chosen[-1] + 1)
    return [
        Compared(target, {tokens: fmean(row[tokens] for row in rows) for tokens in rows[0]})
        for target, rows in zip(targets, zip(*found, strict=True), strict=True)
    ]


def _spread(layers: int, parts: int) -> list[int]:
    """The middles of ``parts`` parts of the depth; all of fewer layers."""
    parts = min(parts, layers)
    return [(2 * part + 1) * layers // (2 * parts) for part in range(parts)]


def _cut(
    checkpoint: Checkpoint, windows: torch.Tensor, fitted: bool
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """What layers are folded and fitted on, and what they are measured on: other text if fitted."""
    count = max(1, TOKENS // windows.shape[1])
    if not fitted:
        return windows[:count], _short_and_long(checkpoint, windows[:count])
    count = max(1, min(count, len(windows) // 2))
    return windows[:count], _short_and_long(checkpoint, windows[-count:])


def _short_and_long(checkpoint: Checkpoint, some: torch.Tensor) -> list[torch.Tensor]:
    """The windows as they are, and laid end to end in long ones."""
    tokens = some.shape[1]
    most = checkpoint.config.get("max_position_embeddings") or LONG
    joined = min(LONG, int(most), some.numel()) // tokens
    if joined < 2:
        return [some]
    return [some, some[: len(some) // joined * joined].reshape(-1, joined * tokens)]


class _Text:
    """The source, run on windows of one length.

    Attributes:
        attention: what its attention puts out in the layer that was run last.
    """

    def __init__(self, checkpoint: Checkpoint, calibration: Calibration, load: Load) -> None:
        self.calibration = calibration
        self.tokens = calibration.windows.shape[1]
        self.source = SourcePass(checkpoint, self.calibration, load)
        self.attention = self.calibration.states("attention", checkpoint.geometry.hidden_size)


class _Candidate:
    """A target, and the folded model whose single layers can be run on windows of the texts."""

    def __init__(
        self, checkpoint: Checkpoint, plan: FoldPlan, texts: Sequence[_Text], load: Load
    ) -> None:
        config = plan.target.config(checkpoint.family, checkpoint.config)
        family = BY_TYPE[config["model_type"]]
        self.plan, self._config = plan, config
        self._scale = family.residual_factor(config)
        like = texts[0].calibration
        self._stream = LayerStream(config, family, like.device, like.dtype)
        for text in texts:  # for what layers are called with
            first = Calibration(text.calibration.windows[:1], device=like.device)
            states = first.states("first", checkpoint.geometry.hidden_size)
            self._stream.start(first.texts, load, states)

    def errors(
        self, layer: StoredLayer, tensors: Tensors, fitted_on: _Text | None, texts: Sequence[_Text]
    ) -> dict[int, float]:
        """Of one layer's attention, by tokens of a window, on the source's inputs.

        Args:
            fitted_on: what it is fitted on before; None for a closed form.
        """
        with self._stream.layer(layer.index, tensors, copied=fitted_on is not None) as live:
            if fitted_on is not None:
                source, seed = fitted_on.source, self.plan.seed + layer.index
                task = fit_task(
                    live, self._config, source, fitted_on.attention, source.inputs, seed, STEPS
                )
                fit_attention(task, no_progress)
            return {text.tokens: self._error(live, text) for text in texts}

    @torch.no_grad()
    def _error(self, live: LiveLayer, text: _Text) -> float:
        # blocks of the folded model may be scaled otherwise
        inputs, scale = text.source.inputs, text.source.residual_scale / self._scale
        apart, size = 0.0, 0.0
        for batch in inputs.batches():
            wanted = text.attention[batch] * scale
            apart += float((live.attention_of(inputs[batch]) - wanted).square().sum())
            size += float(wanted.square().sum())
        return apart / max(size, 1e-300)


def _errors(
    layer: StoredLayer, candidates: Sequence[_Candidate], texts: Sequence[_Text], fitted: bool
) -> list[dict[int, float]]:
    """Of the layer, folded to each candidate on the first of the texts, by tokens of a window."""
    first, *others = texts
    attended = any(isinstance(each.plan.target, Latent) for each in candidates)
    statistics = first.source.statistics(layer, first.attention, attended=attended)
    for other in others:
        other.source.run(layer, other.attention)
    rows = []
    for each in candidates:
        tensors = fold_layer(layer, each.plan, statistics).completed(layer, each.plan.target)
        fitted_on, measured = (first, others) if fitted else (None, texts)
        rows.append(each.errors(layer, tensors, fitted_on, measured))
    return rows
