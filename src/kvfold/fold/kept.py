"""Layers that are done, on disk: what an interrupted run goes on from."""

from collections.abc import Callable
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
from kvfold.fold.layer import LayerReport
from kvfold.fold.pipeline import FoldedLayer


def keep_layer(folder: Path, layer: FoldedLayer) -> None:
    """The report is written last: it says that the layer is whole."""
    specs = [
        TensorSpec(name, dtype_name(tensor.dtype), tuple(tensor.shape))
        for name, tensor in layer.tensors.items()
    ]
    write_tensors(folder / f"{layer.index}.safetensors", specs, iter(layer.tensors.values()))
    report = None if layer.report is None else layer.report.as_dict()
    kept = {"report": report, "stages": layer.stages, "drift": layer.drift}
    write_json(folder / f"{layer.index}.json", kept)


def stored_layers(folder: Path, *, reported: bool = True) -> Callable[[int], FoldedLayer | None]:
    """Looks a layer up among those that :func:`keep_layer` has written.

    Args:
        reported: whether the run folds, and so has a report of every layer.
    """

    def stored(index: int) -> FoldedLayer | None:
        path = folder / f"{index}.json"
        if not path.is_file():
            return None
        value = KEPT.read(path)
        if reported and value["report"] is None:
            raise CheckpointError(f"{path}: report is null; expected a JSON object", KEPT.hint)
        entries = read_header(folder / f"{index}.safetensors")
        tensors = {name: read_tensor(entry) for name, entry in entries.items()}
        report = None if value["report"] is None else LayerReport(**value["report"])
        return FoldedLayer(
            index, tensors, report, [dict(stage) for stage in value["stages"]], value["drift"]
        )

    return stored
