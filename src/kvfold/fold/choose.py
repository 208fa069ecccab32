"""Heads or a latent, and which? What keeps more of the source's predictions in so much cache.

Where a request leaves its target open, layers spread over the depth are folded to each candidate,
on the source's own inputs, put into the source together, and its predictions compared with those it
makes without them: in the windows that calibration has, and in long ones, for what no longer turns
with distance fails late. (What single layers' attention puts out hardly shows that: an error of a
few tokens far back may be small in it, and all that a later layer looks for.) Where layers will be
fitted, those are fitted too, for a short time, and compared on other text: what a closed form is
worth says little about what it is worth after a fit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
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
from kvfold.fold.hidden import TEXT, HiddenStates, Windows
from kvfold.fold.layer import FoldPlan, fold_layer
from kvfold.fold.passes import CPU, Calibration, Load, SourcePass, fit_task, go_on, loader
from kvfold.fold.stored_layer import StoredLayer, Tensors
from kvfold.fold.stream import LayerStream, LiveLayer
from kvfold.progress import Progress, no_progress
from kvfold.quality.scores import divergence

TOKENS = 8192  # of the calibration text; the order of candidates needs no more
MEASURED = 4096  # of them, or of others, that candidates are run on, in short windows and in long
LONG = 4096  # tokens of a long window
LAYERS = 8  # that are folded; the source is run through all before the last of them
FITTED_LAYERS = 4  # where they are fitted, which takes longer,
STEPS = 30  # with so many steps
PREDICTED = 256  # tokens of a window whose predictions are in memory at once
ROUNDING = 1e-5  # nats that predictions may be apart by their rounding alone
KEPT = "compared.json"


@dataclass(frozen=True)
class Compared:
    """A candidate and how far its attention is from the source's.

    Attributes:
        errors: by tokens of a window: |a - a_source|^2 / |a_source|^2 of what attention puts out,
            mean over the layers that were folded.
        kl: by tokens of a window: the divergence of the source's predictions with those layers in
            it from its own, nats per token.
    """

    target: Target
    errors: dict[int, float]
    kl: dict[int, float]

    def as_dict(self) -> ComparedRow:
        errors = {str(tokens): error for tokens, error in self.errors.items()}
        kl = {str(tokens): nats for tokens, nats in self.kl.items()}
        return {"target": self.target.label, "attention_error": errors, "kl": kl}


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
    lost = [fmean(row["kl"].values()) for row in rows]  # lengths count alike
    errors = [fmean(row["attention_error"].values()) for row in rows]
    alike = [i for i, kl in enumerate(lost) if kl <= min(lost) + ROUNDING]
    return targets[min(alike, key=errors.__getitem__)], rows


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
    fitted_on, measured_on = _cut(checkpoint, windows, fitted)

    def run_on(some: torch.Tensor) -> _Text:
        return _Text(checkpoint, Calibration(some, device=device, dtype=dtype), load)

    seen = run_on(fitted_on)
    measured = [run_on(some) for some in measured_on]
    plans = [FoldPlan(target, method, fit, seed) for target in targets]
    candidates = [_Candidate(checkpoint, plan, seen, measured, load) for plan in plans]
    count = checkpoint.geometry.num_layers
    chosen = _spread(count, FITTED_LAYERS if fitted else LAYERS)
    found: list[list[dict[int, float]]] = []
    for index in range(count):
        layer = StoredLayer(checkpoint, index)
        if index in chosen:
            found.append(_errors(layer, candidates, seen, measured))
        else:
            if index < chosen[-1]:
                seen.source.run(layer)
            for text in measured:
                begun = [each for each in candidates if each.states]
                text.source.run(layer, beside=[each.states[text.tokens] for each in begun])
        for text in (seen, *measured):
            text.source.advance()
        progress("comparing what to fold to", index + 1, count)
    lost = _divergences(candidates, measured, loader(checkpoint, torch.float32))
    return [
        Compared(target, {tokens: fmean(row[tokens] for row in rows) for tokens in rows[0]}, kl)
        for target, rows, kl in zip(targets, zip(*found, strict=True), lost, strict=True)
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
    some = max(1, MEASURED // windows.shape[1])
    if not fitted:
        return windows[:count], _short_and_long(checkpoint, windows[:some])
    count = max(1, min(count, len(windows) // 2))
    return windows[:count], _short_and_long(checkpoint, windows[-min(count, some) :])


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
    """A target, and the source with some layers folded to it.

    Attributes:
        states: what goes from layer to layer in the latter, by tokens of a window; none before the
            first of those layers.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: FoldPlan,
        seen: _Text,
        measured: Sequence[_Text],
        load: Load,
    ) -> None:
        config = plan.target.config(checkpoint.family, checkpoint.config)
        family = BY_TYPE[config["model_type"]]
        self.plan, self._config = plan, config
        self._scale = family.residual_factor(config)
        like, size = seen.calibration, checkpoint.geometry.hidden_size
        self._stream = LayerStream(config, family, like.device, like.dtype)
        for text in (seen, *measured):  # for what layers are called with
            first = Calibration(text.calibration.windows[:1], device=like.device)
            self._stream.start(first.texts, load, first.states("first", size))
        self.states: dict[int, HiddenStates] = {}

    def run(
        self, layer: StoredLayer, tensors: Tensors, seen: _Text, measured: Sequence[_Text]
    ) -> dict[int, float]:
        """Go on with the folded layer; its attention's errors on the source's inputs, by tokens."""
        fitted = self.plan.fit == "local"
        if not self.states:
            self.states = {text.tokens: text.source.inputs.copy() for text in measured}
        with self._stream.layer(layer.index, tensors, copied=fitted) as live:
            if fitted:
                source, seed = seen.source, self.plan.seed + layer.index
                task = fit_task(
                    live, self._config, source, seen.attention, source.inputs, seed, STEPS
                )
                fit_attention(task, no_progress)
            errors = {text.tokens: self._error(live, text) for text in measured}
            with torch.no_grad():
                for states in self.states.values():
                    states.each(partial(go_on, live, states))
        return errors

    @torch.no_grad()
    def _error(self, live: LiveLayer, text: _Text) -> float:
        # blocks of the folded model may be scaled otherwise
        inputs, scale = text.source.inputs, text.source.residual_scale / self._scale
        found = []

        def compare(batch: Windows) -> None:
            wanted = text.attention[batch] * scale
            apart = (live.attention_of(inputs[batch]) - wanted).square().sum()
            found.append((float(apart), float(wanted.square().sum())))

        inputs.each(compare)
        apart, size = (sum(each) for each in zip(*found, strict=True))
        return apart / max(size, 1e-300)


def _errors(
    layer: StoredLayer, candidates: Sequence[_Candidate], seen: _Text, measured: Sequence[_Text]
) -> list[dict[int, float]]:
    """Of the layer, folded to each candidate by what was seen, by tokens of a window."""
    attended = any(isinstance(each.plan.target, Latent) for each in candidates)
    statistics = seen.source.statistics(layer, seen.attention, attended=attended)
    for text in measured:
        text.source.run(layer, text.attention)
    rows = []
    for each in candidates:
        tensors = fold_layer(layer, each.plan, statistics).completed(layer, each.plan.target)
        rows.append(each.run(layer, tensors, seen, measured))
    return rows


@torch.no_grad()
def _divergences(
    candidates: Sequence[_Candidate], measured: Sequence[_Text], load: Load
) -> list[dict[int, float]]:
    """Of what each model predicts, behind the last layer, by tokens of a window."""
    found: list[dict[int, float]] = [{} for _ in candidates]
    for text in measured:
        windows, tokens = text.calibration.windows.shape
        sums = [0.0 for _ in candidates]
        with text.source.ending(load) as predict:

            def predicted(states: HiddenStates, window: int, part: int) -> torch.Tensor:
                some = states[Windows(TEXT, slice(window, window + 1))]
                return predict(some[:, part : part + PREDICTED]).float().log_softmax(-1)

            for window, part in product(range(windows), range(0, tokens, PREDICTED)):
                wanted = predicted(text.source.inputs, window, part)
                for i, each in enumerate(candidates):
                    got = predicted(each.states[tokens], window, part)
                    sums[i] += float(divergence(got, wanted).sum())
        for row, total in zip(found, sums, strict=True):
            row[tokens] = total / (windows * tokens)
    return found
