"""Going down the layers: make one, fit it, keep it, run it, next layer.

The one loop that conversion and the local stage of healing share. They differ in what a layer is
made from, and how (:class:`Making`).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from kvfold.arch.carried import Carrier
from kvfold.arch.target import Latent
from kvfold.checkpoint.source import Checkpoint
from kvfold.errors import RunError
from kvfold.fold.held_out import compare_ends
from kvfold.fold.layer import FoldedLayer, FoldPlan, fold_layer
from kvfold.fold.layer_store import LayerStore
from kvfold.fold.passes import Calibration, FoldedPass, Load, SourcePass, loader
from kvfold.fold.request import DEFAULT_STEPS
from kvfold.fold.statistics import LayerStatistics
from kvfold.fold.stored_layer import StoredLayer
from kvfold.fold.windows import first_tokens
from kvfold.progress import Progress, no_progress
from kvfold.quality.world import ALONE


@dataclass(frozen=True)
class Making:
    """How the layers of a folded model come about.

    Attributes:
        label: what progress calls it.
        source: what they are to behave like. base: what they are made from.
        config: the folded model's. carrier: what becomes of the base's other tensors.
        make: makes a layer of one of ``base``; given statistics of ``source``'s layer where
            ``gathers`` says that it looks at them, and there is text to gather them from.
        latent: whether it makes a latent, which also looks at ``LayerStatistics.attended``.
        fit: a name in ``fold.fit.FITS``. steps: of gradient descent on each layer. measured:
            whether the folded model is run, and compared at its end, even if nothing is fitted.
    """

    label: str
    source: Checkpoint
    base: Checkpoint
    config: Mapping[str, Any]
    carrier: Carrier
    make: Callable[[StoredLayer, LayerStatistics | None], FoldedLayer]
    gathers: bool
    latent: bool
    fit: str
    seed: int
    measured: bool = False
    steps: int = DEFAULT_STEPS

    @property
    def runs(self) -> bool:
        """Whether the folded model is run beside its source."""
        return self.measured or self.fit != "none"


def fold_all(
    source: Checkpoint,
    plan: FoldPlan,
    calibration: Calibration | None = None,
    store: LayerStore | None = None,
    progress: Progress = no_progress,
) -> Iterator[FoldedLayer]:
    """Fold every layer in order; those that the store has are taken from there."""
    making = Making(
        label=plan.label,
        source=source,
        base=source,
        config=plan.target.config(source.family, source.config),
        carrier=plan.target,
        make=lambda layer, statistics: fold_layer(layer, plan, statistics),
        gathers=True,
        latent=isinstance(plan.target, Latent),
        fit=plan.fit,
        seed=plan.seed,
        measured=plan.measured,
        steps=plan.steps,
    )
    return go_down(making, calibration, store, progress)


def go_down(
    making: Making,
    calibration: Calibration | None,
    store: LayerStore | None,
    progress: Progress,
) -> Iterator[FoldedLayer]:
    """Yield every layer in order, made or taken from the store, which keeps those that are made.

    Args:
        calibration: None makes layers by their weights alone.
    """
    count = making.source.geometry.num_layers
    world = ALONE if calibration is None else calibration.world
    missing = world.tell([i for i in range(count) if store is None or not store.has(i)])
    both = _SideBySide(making, calibration) if calibration and missing else None
    for index in range(count):
        if index not in missing:
            stored = world.tell(None if store is None else store.read(index))
            assert stored is not None  # what is not missing the first process has
            folded = stored
            if both is not None and index < missing[-1]:  # for the sake of a later layer
                both.pass_over(folded)
        else:
            base = StoredLayer(making.base, index)
            folded = both.make(base, progress) if both else making.make(base, None)
            if store is not None:
                store.keep(folded)
        yield folded
        progress(making.label, index + 1, count)


class _SideBySide:
    """The source and the folded model on their way down; the latter only if it is needed."""

    def __init__(self, making: Making, calibration: Calibration) -> None:
        self._making = making
        if not making.runs:  # there is no end to compare
            calibration = replace(calibration, held_out=None)
        elif making.fit != "none":
            vocabulary = making.source.config["vocab_size"]
            calibration = replace(calibration, first=first_tokens(calibration.windows, vocabulary))
        self._calibration, self._last = calibration, making.source.geometry.num_layers - 1
        load, base_load = self._loaders(None)
        self._source = SourcePass(making.source, calibration, load)
        self._folded: FoldedPass | None = None
        if making.runs:
            self._folded = FoldedPass(
                making.base, making.config, making.carrier, self._source, calibration, base_load,
                fit=making.fit, seed=making.seed, steps=making.steps,
            )  # fmt: skip

    def make(self, base: StoredLayer, progress: Progress) -> FoldedLayer:
        world = self._calibration.world
        try:
            # All find the same; should processors round otherwise, the first one's counts.
            folded = world.tell(self._making.make(base, self._run_source(base)))
            if self._folded is not None:
                self._folded.fit(folded, base, progress)
                folded = world.tell(folded)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise RunError(
                f"layer {base.index} cannot be fitted: the calibration text says too little",
                "give text of more different tokens, that the tokenizer knows",
            ) from error
        if self._folded is not None:
            folded.drift = self._folded.run(folded, base)
        self._source.advance()
        if self._folded is not None and folded.index == self._last:
            loaders = self._loaders(torch.float32)  # what both models share is there once
            folded.held_out = compare_ends(self._calibration, self._source, self._folded, loaders)
        return folded

    def _loaders(self, dtype: torch.dtype | None) -> tuple[Load, Load]:
        """Of the source and of the base, which are often one."""
        making = self._making
        load = loader(making.source, dtype)
        return load, load if making.base is making.source else loader(making.base, dtype)

    def pass_over(self, folded: FoldedLayer) -> None:
        """Run a layer that an earlier run has made."""
        base = StoredLayer(self._making.base, folded.index)
        self._source.run(self._source_layer(base))
        if self._folded is not None:
            self._folded.run(folded, base)
        self._source.advance()

    def _run_source(self, base: StoredLayer) -> LayerStatistics | None:
        attention = self._folded.attention if self._folded else None
        layer = self._source_layer(base)
        if self._making.gathers:
            return self._source.statistics(layer, attention, attended=self._making.latent)
        self._source.run(layer, attention)
        return None

    def _source_layer(self, base: StoredLayer) -> StoredLayer:
        """The source's layer beside one of ``base``: the same where they are one checkpoint."""
        source = self._making.source
        return base if source is base.checkpoint else StoredLayer(source, base.index)
