"""Layers that are done, on disk: what an interrupted run goes on from."""

from pathlib import Path

from kvfold.checkpoint.records import KEPT
from kvfold.checkpoint.tensors import (
    TensorSpec,
    dtype_name,
    read_header,
    read_tensor,
    write_tensors,
)
from kvfold.errors import CheckpointError
from kvfold.files import write_json
from kvfold.fold.layer import FoldedLayer, LayerReport


class LayerStore:
    """A folder of folded layers, each in a file of tensors and a report.

    Args:
        reported: whether the run folds, and so has a report of every layer.
    """

    def __init__(self, folder: Path, *, reported: bool = True) -> None:
        self.folder, self._reported = folder, reported
        folder.mkdir(parents=True, exist_ok=True)

    def has(self, index: int) -> bool:
        return self._report(index).is_file()

    def keep(self, layer: FoldedLayer) -> None:
        """The report is written last: it says that the layer is whole."""
        specs = [
            TensorSpec(name, dtype_name(tensor.dtype), tuple(tensor.shape))
            for name, tensor in layer.tensors.items()
        ]
        write_tensors(self._tensors(layer.index), specs, iter(layer.tensors.values()))
        report = None if layer.report is None else layer.report.as_dict()
        stored = {
            "report": report,
            "stages": layer.stages,
            "drift": layer.drift,
            "held_out": layer.held_out,
        }
        write_json(self._report(layer.index), stored)

    def read(self, index: int) -> FoldedLayer:
        """A layer that the store has."""
        path = self._report(index)
        stored = KEPT.read(path)
        if self._reported and stored["report"] is None:
            raise CheckpointError(f"{path}: report is null; expected a JSON object", KEPT.hint)
        entries = read_header(self._tensors(index))
        tensors = {name: read_tensor(entry) for name, entry in entries.items()}
        report = None if stored["report"] is None else LayerReport(**stored["report"])
        stages = [dict(stage) for stage in stored["stages"]]
        held_out = stored["held_out"]
        return FoldedLayer(index, tensors, report, stages, stored["drift"], held_out)

    def _report(self, index: int) -> Path:
        return self.folder / f"{index}.json"

    def _tensors(self, index: int) -> Path:
        return self.folder / f"{index}.safetensors"
