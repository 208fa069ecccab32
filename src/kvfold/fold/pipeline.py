"""Going down the layers: statistics, fold, fit, next layer.

Two models run side by side over the calibration windows, one layer at a time: the source, and
the folded model as it comes into being. So every layer is fitted on the inputs it will really
get, and what earlier layers lost can be made good by later ones.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kvfold.arch.projections import AttentionWeights
from kvfold.arch.target import Target
from kvfold.checkpoint.source import Checkpoint
from kvfold.checkpoint.tensors import torch_dtype
from kvfold.errors import RunError
from kvfold.fold.fit import FITS, FitTask
from kvfold.fold.layer import LayerReport, fold_layer, layer_pairs
from kvfold.fold.statistics import LayerStatistics, StatisticsCollector
from kvfold.fold.stream import LayerStream, LiveLayer, batches, hidden_states, layer_tensors
from kvfold.progress import Progress, no_progress

Tensors = dict[str, torch.Tensor]

STATISTICS_TOKENS = 16_384  # second moments change little with more, and cost as much as the rest


@dataclass(frozen=True)
class FoldPlan:
    """What to fold to, and how.

    Attributes:
        fit: ``none``, ``refit`` or ``local``; more than ``none`` needs calibration windows.
    """

    target: Target
    method: str
    fit: str
    seed: int


@dataclass
class FoldedLayer:
    """The tensors of one layer that differ from the source's, under the folded model's names.

    Attributes:
        report: what folding did; None for a layer that was folded in another run.
        drift: how far the hidden states after it are from the source's, |x - x_source| /
            |x_source|, median over tokens; None where the folded model was not run.
    """

    index: int
    tensors: Tensors
    report: LayerReport | None
    stages: list[dict[str, Any]] = field(default_factory=list)
    drift: float | None = None


def fold_without_data(checkpoint: Checkpoint, plan: FoldPlan, layer: int) -> FoldedLayer:
    """Fold one layer from its weights alone."""
    statistics = LayerStatistics.without_data(checkpoint.geometry.hidden_size)
    weights, report = fold_layer(checkpoint, layer, plan.target, plan.method, statistics, plan.seed)
    return FoldedLayer(layer, stored_attention(checkpoint, plan.target, layer, weights), report)


def stored_attention(
    checkpoint: Checkpoint, target: Target, layer: int, weights: AttentionWeights
) -> Tensors:
    """A layer's folded projections as the folded checkpoint stores them, in its dtype."""
    projections = target.projections(checkpoint.family)
    tensors = projections.write(checkpoint.attention_prefix(layer), weights)
    some_name = next(iter(checkpoint.attention_shapes(layer)))
    dtype = torch_dtype(checkpoint.store.dtype(some_name))
    return {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}


class CalibratedFolder:
    """Folds layers in order, with calibration windows ``[N, T]``.

    Args:
        spill: folder for hidden states too large for memory; None keeps them in memory.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: FoldPlan,
        windows: torch.Tensor,
        spill: Path | None = None,
    ) -> None:
        self._checkpoint, self._plan = checkpoint, plan
        family = checkpoint.family
        size = checkpoint.geometry.hidden_size

        def buffer(name: str) -> torch.Tensor:
            return hidden_states(windows, size, spill / f"{name}.f32" if spill else None)

        self._source = LayerStream(checkpoint.config, family.layer, family.attention)
        self._inputs, self._outputs = buffer("source-in"), buffer("source-out")
        self._source.start(windows, self._load_source, self._inputs)
        self._folded: LayerStream | None = None
        if plan.fit != "none":
            config = plan.target.config(family, checkpoint.config)
            self._folded = LayerStream(config, family.layer, family.attention)
            self._folded_inputs, self._attention = buffer("folded-in"), buffer("attention")
            self._folded.start(windows, self._load_source, self._folded_inputs)

    def _load_source(self, name: str) -> torch.Tensor:
        """Load by the module's name, which old GPT-2 checkpoints store without its base."""
        return self._checkpoint.tensor(self._checkpoint.stored_names.to_stored(name))

    def fold(self, index: int, progress: Progress = no_progress) -> FoldedLayer:
        """Fold the next layer; layers must come in order."""
        pairs = layer_pairs(self._checkpoint, index)
        collector = StatisticsCollector(self._checkpoint.geometry.hidden_size, pairs)
        self._run_source(index, collector)
        weights, report = fold_layer(
            self._checkpoint,
            index,
            self._plan.target,
            self._plan.method,
            collector.result(),
            self._plan.seed,
        )
        tensors = stored_attention(self._checkpoint, self._plan.target, index, weights)
        folded = FoldedLayer(index, tensors, report)
        self._finish(folded, progress)
        return folded

    def take(self, folded: FoldedLayer, progress: Progress = no_progress) -> FoldedLayer:
        """Fit the next layer, which has been folded before."""
        self._run_source(folded.index)
        self._finish(folded, progress)
        return folded

    def _finish(self, folded: FoldedLayer, progress: Progress) -> None:
        """Fit a folded layer if that is wanted, and go on to the next one."""
        if self._folded is not None:
            # Copies: fitting changes them in place, and some may be a model's own.
            tensors = {n: t.clone() for n, t in self._folded_tensors(folded).items()}
            with self._folded.layer(folded.index, tensors) as live:
                self._fit(live, folded, progress)
            self._run_folded(self._folded, folded)
        self._advance()

    def replay(self, folded: FoldedLayer) -> None:
        """Pass over a layer that an interrupted run has folded already."""
        self._run_source(folded.index)
        if self._folded is not None:
            self._run_folded(self._folded, folded)
        self._advance()

    @torch.no_grad()
    def _run_source(self, index: int, collector: StatisticsCollector | None = None) -> None:
        """Compute the source layer's outputs; with a collector, its statistics too."""
        tensors = layer_tensors(self._checkpoint, index)
        with self._source.layer(index, tensors) as live:
            for rows, sampled in zip(batches(self._inputs), _samples(self._inputs), strict=True):

                def keep(output: torch.Tensor, rows: slice = rows) -> None:
                    if self._folded is not None:
                        self._attention[rows] = output

                with live.listening(
                    call=collector.call if collector and sampled else None,
                    attention_input=collector.attention_input if collector else None,
                    attention_output=keep,
                ):
                    self._outputs[rows] = live(self._inputs[rows])

    def _folded_tensors(self, folded: FoldedLayer) -> Tensors:
        """All tensors of a folded layer, named below it."""
        checkpoint, rewrite = self._checkpoint, self._checkpoint.family.rewrite
        prefix = checkpoint.layer_prefix(folded.index) + "."
        replaced = set(checkpoint.attention_shapes(folded.index))
        tensors = dict(folded.tensors)
        for name in checkpoint.layer_names(folded.index):
            if name not in replaced and name not in tensors:
                tensor = checkpoint.tensor(name)
                tensors[name] = rewrite(name, tensor) if rewrite else tensor
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}

    def _fit(self, live: LiveLayer, folded: FoldedLayer, progress: Progress) -> None:
        """Run the plan's fitting stages and take up the parameters they changed."""
        family = self._checkpoint.family
        projections = self._plan.target.projections(family)
        scale_key = family.residual_scale
        task = FitTask(
            live=live,
            output_name=f"{family.attention}.{projections.o}",
            mlp_output_name=None if family.post_norm else family.mlp_output,
            source_inputs=self._inputs,
            source_attention=self._attention,
            source_outputs=self._outputs,
            folded_inputs=self._folded_inputs,
            residual_scale=float(self._checkpoint.config.get(scale_key, 1.0)) if scale_key else 1.0,
            drift=not family.post_norm,
            seed=self._plan.seed + folded.index,
        )
        error = task.error()
        for stage in FITS[self._plan.fit]:
            stage(task, progress)
            before, error = error, task.error()
            gained = {"stage": stage.__name__, "error_before": before, "error_after": error}
            folded.stages.append(gained)
        prefix = self._checkpoint.layer_prefix(folded.index) + "."
        dtype = next(iter(folded.tensors.values())).dtype
        for name, parameter in live.module.named_parameters():
            if name in task.changed:
                folded.tensors[prefix + name] = parameter.detach().to(dtype).contiguous()

    @torch.no_grad()
    def _run_folded(self, stream: LayerStream, folded: FoldedLayer) -> None:
        """Advance the folded stream with the weights as they are stored."""
        with stream.layer(folded.index, self._folded_tensors(folded)) as live:
            for rows in batches(self._folded_inputs):
                self._folded_inputs[rows] = live(self._folded_inputs[rows])
        folded.drift = self._drift()

    def _drift(self) -> float:
        """Of the hidden states after a layer; see ``FoldedLayer``."""
        ratios = []
        for rows in batches(self._outputs):
            wanted = self._outputs[rows]
            distance = (self._folded_inputs[rows] - wanted).norm(dim=-1)
            ratios.append((distance / wanted.norm(dim=-1).clamp_min(1e-30)).flatten())
        return float(torch.cat(ratios).median())

    def _advance(self) -> None:
        self._inputs, self._outputs = self._outputs, self._inputs


def _samples(windows: torch.Tensor) -> list[bool]:
    """Which batches of ``[N, T, …]`` the statistics are taken from, spread over the text."""
    tokens = windows.shape[0] * windows.shape[1]
    stride = max(1, tokens // STATISTICS_TOKENS)
    return [index % stride == 0 for index, _ in enumerate(batches(windows))]


def layer_report(folded: FoldedLayer) -> dict[str, Any]:
    """What was done to a layer, for the record."""
    report = {"layer": folded.index} if folded.report is None else folded.report.as_dict()
    return {**report, "stages": folded.stages, "drift": folded.drift}


def fold_all(
    checkpoint: Checkpoint,
    plan: FoldPlan,
    windows: torch.Tensor | None,
    spill: Path | None = None,
    finished: Callable[[int], FoldedLayer | None] = lambda index: None,
    progress: Progress = no_progress,
) -> Iterator[FoldedLayer]:
    """Fold every layer in order; ``finished`` returns layers that are done already."""
    layers = checkpoint.geometry.num_layers
    folder = None if windows is None else CalibratedFolder(checkpoint, plan, windows, spill)
    for index in range(layers):
        folded = finished(index)
        if folded is not None:
            if folder is not None:
                folder.replay(folded)
        elif folder is not None:
            try:
                folded = folder.fold(index, progress)
            except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
                raise RunError(
                    f"layer {index} cannot be fitted: the calibration text says too little",
                    "give text of more different tokens, that the tokenizer knows",
                ) from error
        else:
            folded = fold_without_data(checkpoint, plan, index)
        yield folded
        progress("folding layers", index + 1, layers)  # by now it is kept
