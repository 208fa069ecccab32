"""Running models over the calibration windows, one layer at a time.

Two run side by side: the source, and the folded model as it comes into being. So every layer is
fitted on the inputs it will really get, and what earlier layers lost can be made good by later
ones.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kvfold.arch.carried import Carrier
from kvfold.arch.families import BY_TYPE
from kvfold.checkpoint.source import Checkpoint
from kvfold.checkpoint.writer import carried_from
from kvfold.fold.fit import FITS, FitTask
from kvfold.fold.hidden import BATCH_TOKENS, TEXT, HiddenStates, Room, Windows, dealt, median
from kvfold.fold.layer import FoldedLayer, as_stored
from kvfold.fold.statistics import LayerStatistics, StatisticsCollector
from kvfold.fold.stored_layer import StoredLayer, Tensors
from kvfold.fold.stream import LayerStream, LiveLayer
from kvfold.progress import Progress
from kvfold.quality.world import ALONE, World

STATISTICS_TOKENS = 16_384  # second moments change little with more, and cost as much as the rest
CPU = torch.device("cpu")

Load = Callable[[str], torch.Tensor]  # by the name in transformers' module
Ending = AbstractContextManager[Callable[[torch.Tensor], torch.Tensor]]


@dataclass(frozen=True)
class Calibration:
    """The text that models are run on, and where.

    Attributes:
        windows: token ids ``[N, T]``.
        spill: folder for hidden states too large for memory; None keeps them there.
        device: what layers run and are fitted on. dtype: what they multiply in; weights, hidden
            states and sums are float32, what is solved float64.
        first: see :func:`kvfold.fold.windows.first_tokens`. They are run and fitted, but not heard
            by statistics.
        held_out: token ids ``[M, T]`` that are run through both models and nothing else.
        world: the processes that share the windows.
        room: how many tokens the device has memory for at once.
    """

    windows: torch.Tensor
    spill: Path | None = None
    device: torch.device = CPU
    dtype: torch.dtype = torch.float32
    first: torch.Tensor | None = None
    held_out: torch.Tensor | None = None
    world: World = ALONE
    room: Room = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "room", Room(self.device))

    @property
    def _all(self) -> list[torch.Tensor]:
        """Token ids ``[N, T]`` of the texts of ``fold.hidden``, first tokens as windows of one."""
        none = self.windows[:0]
        first = none[:, :1] if self.first is None else self.first[:, None]
        return [self.windows, first, none if self.held_out is None else self.held_out]

    @property
    def texts(self) -> list[torch.Tensor]:
        """This process's windows of each text."""
        return [
            windows[dealt(text, len(windows), windows.shape[1], self.world)]
            for text, windows in enumerate(self._all)
        ]

    def states(self, name: str, hidden_size: int) -> HiddenStates:
        rank = f"-{self.world.rank}" if self.world.size > 1 else ""
        file = self.spill / f"{name}{rank}.f32" if self.spill else None
        counts = [(len(text), text.shape[1]) for text in self._all]
        return HiddenStates(
            counts, hidden_size, self.device, file, world=self.world, room=self.room
        )


def loader(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> Load:
    """Reads the tensors outside of the layers, each once however many passes start with it.

    Args:
        dtype: what they are turned into, once for all passes; None leaves them as they are.
    """
    read: Tensors = {}

    def load(name: str) -> torch.Tensor:
        if name not in read:
            tensor = checkpoint.tensor(checkpoint.stored_names.to_stored(name))
            read[name] = tensor if dtype is None else tensor.to(dtype)
        return read[name]

    return load


def carrying(load: Load, checkpoint: Checkpoint, carrier: Carrier) -> Load:
    """What becomes of those that ``load`` reads in a model that ``checkpoint`` is folded to."""
    carried = carried_from(checkpoint, carrier)

    def made(name: str) -> torch.Tensor:
        source, how = carried[checkpoint.stored_names.to_stored(name)]
        return how.make(load(source))

    return made


class SourcePass:
    """The source, run layer by layer.

    Attributes:
        inputs, outputs: hidden states before and after the layer that was run last.
        residual_scale: the factor on a block's output when it joins the residual stream.
    """

    def __init__(self, source: Checkpoint, calibration: Calibration, load: Load) -> None:
        self._size, self._device = source.geometry.hidden_size, calibration.device
        family = source.family
        self.residual_scale = family.residual_factor(source.config)
        self._stream = LayerStream(source.config, family, self._device, calibration.dtype)
        self.inputs = calibration.states("source-in", self._size)
        self.outputs = calibration.states("source-out", self._size)
        self._stream.start(calibration.texts, load, self.inputs)

    def statistics(
        self, layer: StoredLayer, attention: HiddenStates | None, *, attended: bool
    ) -> LayerStatistics:
        """Run the layer and say what its inputs look like.

        Args:
            attended: also gather what only latents look at.
        """
        keys = layer.heads(self._device).k
        collector = StatisticsCollector(
            self._size, layer.pairs, self._device,
            keys=keys if attended else None, sampled=None if attended else keys,
        )  # fmt: skip
        self.run(layer, attention, collector)
        return collector.result(self.inputs.world)

    @torch.no_grad()
    def run(
        self,
        layer: StoredLayer,
        attention: HiddenStates | None = None,
        collector: StatisticsCollector | None = None,
        beside: Sequence[HiddenStates] = (),
    ) -> None:
        """Compute the layer's outputs.

        Args:
            attention: takes up what its attention puts out.
            collector: hears some of the text's batches.
            beside: hidden states of the same texts that go through the layer, too, in their place.
        """
        windows, tokens = self.inputs.counts[TEXT], self.inputs.shapes[TEXT][1]
        stride = max(1, windows * tokens // STATISTICS_TOKENS)
        world = self.inputs.world

        def run(batch: Windows) -> None:
            number, place = _place_of(batch, tokens)
            spread = batch.text == TEXT and (number * world.size + world.rank) % stride == 0
            heard = collector.begun(place) if collector is not None and spread else None
            with live.listening(
                call=heard.call if heard else None,
                attention_input=heard.attention_input if heard else None,
                attention_output=partial(attention.put, batch) if attention else None,
            ):
                self.outputs[batch] = live(self.inputs[batch])
            if collector is not None and heard is not None:
                collector.take(heard)

        with self._stream.layer(layer.index, layer.below()) as live:
            self.inputs.each(run)
            for states in beside:
                states.each(partial(go_on, live, states))

    def ending(self, load: Load) -> Ending:
        """See :meth:`LayerStream.ending`."""
        return self._stream.ending(load)

    def advance(self) -> None:
        """What came out of this layer goes into the next."""
        self.inputs, self.outputs = self.outputs, self.inputs


def _place_of(batch: Windows, tokens: int) -> tuple[int, int]:
    """In which ``BATCH_TOKENS`` of the text a batch begins, and at which window there."""
    assert isinstance(batch.which, slice)
    return divmod(int(batch.which.start), max(1, BATCH_TOKENS // tokens))


def go_on(live: LiveLayer, states: HiddenStates, batch: Windows) -> None:
    """Through a layer, in place."""
    states[batch] = live(states[batch])


def fit_task(
    live: LiveLayer,
    config: Mapping[str, Any],
    source: SourcePass,
    attention: HiddenStates,
    inputs: HiddenStates,
    seed: int,
    steps: int,
) -> FitTask:
    """Fitting a folded layer to the source's, run just now.

    Args:
        config: the folded model's. attention: what the source's attention has put out.
        inputs: what the folded layer gets.
    """
    family = BY_TYPE[config["model_type"]]
    return FitTask(
        live=live,
        output_name=f"{family.attention}.{family.projections.o}",
        mlp_output_name=None if family.post_norm else family.mlp_output,
        source_inputs=source.inputs,
        source_attention=attention,
        source_outputs=source.outputs,
        folded_inputs=inputs,
        residual_scale=family.residual_factor(config),
        source_scale=source.residual_scale,
        drift=not family.post_norm,
        seed=seed,
        fixed=family.projections.fixed,
        steps=steps,
    )


class FoldedPass:
    """The folded model, run and fitted layer by layer beside its source.

    Args:
        base: has the names of its tensors, and those that folding leaves as they are.
        config: the folded model's. carrier: what becomes of the base's other tensors.
        fit: a name in ``fold.fit.FITS``. steps: of gradient descent on each layer.

    Attributes:
        attention: what the source's attention puts out, to be filled before a layer is fitted.
        inputs: hidden states before the layer that comes next.
    """

    def __init__(
        self,
        base: Checkpoint,
        config: Mapping[str, Any],
        carrier: Carrier,
        source: SourcePass,
        calibration: Calibration,
        load: Load,
        *,
        fit: str,
        seed: int,
        steps: int,
    ) -> None:
        self._config, self._family = config, BY_TYPE[config["model_type"]]
        self._source, self._carrier, self._fit, self._seed = source, carrier, fit, seed
        self._steps = steps
        self._base = base
        family = self._family
        self._stream = LayerStream(config, family, calibration.device, calibration.dtype)
        self.inputs = calibration.states("folded-in", base.geometry.hidden_size)
        self.attention = calibration.states("attention", base.geometry.hidden_size)
        self._stream.start(calibration.texts, carrying(load, base, carrier), self.inputs)

    def fit(self, folded: FoldedLayer, base: StoredLayer, progress: Progress) -> None:
        """Fit a folded layer to what the source's layer, run just now, puts out."""
        if not FITS[self._fit]:
            return
        tensors = folded.completed(base, self._carrier)
        with self._stream.layer(folded.index, tensors, copied=True) as live:
            seed = self._seed + folded.index
            task = fit_task(
                live, self._config, self._source, self.attention, self.inputs, seed, self._steps
            )
            error = task.error()
            for stage in FITS[self._fit]:
                stage(task, progress)
                before, error = error, task.error()
                gained = {"stage": stage.__name__, "error_before": before, "error_after": error}
                folded.stages.append(gained)
            dtype = next(iter(folded.tensors.values())).dtype
            for name, parameter in live.module.named_parameters():
                if name in task.changed:
                    folded.tensors[base.prefix + name] = as_stored(parameter, dtype)

    def ending(self, load: Load) -> Ending:
        """See :meth:`LayerStream.ending`."""
        return self._stream.ending(carrying(load, self._base, self._carrier))

    @torch.no_grad()
    def run(self, folded: FoldedLayer, base: StoredLayer) -> float:
        """Go on with the layer as it is stored; return its drift (see ``FoldedLayer``)."""
        ratios = list[torch.Tensor]()

        def run(batch: Windows) -> None:
            found, wanted = live(self.inputs[batch]), self._source.outputs[batch]
            if batch.text == TEXT:
                distance = (found - wanted).norm(dim=-1)
                ratios.append((distance / wanted.norm(dim=-1).clamp_min(1e-30)).flatten())
            self.inputs[batch] = found

        with self._stream.layer(folded.index, folded.completed(base, self._carrier)) as live:
            self.inputs.each(run)
        return median(self.inputs.world, ratios)
