"""Stage one: every layer by itself, towards what the source's layer puts out.

One layer of each model is in memory at a time. The fitting is that of ``convert --fit local``:
Adam on q, k, v and o through the layer's own MLP, then the output projections in closed form.
"""

from pathlib import Path
from typing import Any

import torch

from kvfold.arch.target import Grouped
from kvfold.checkpoint.source import Checkpoint
from kvfold.errors import CheckpointError
from kvfold.fold.kept import keep_layer, stored_layers
from kvfold.fold.pipeline import CalibratedFolder, FoldedLayer, FoldPlan, layer_report
from kvfold.progress import Progress


def heal_layers(
    teacher: Checkpoint,
    folded: Checkpoint,
    windows: torch.Tensor,
    kept: Path,
    seed: int,
    progress: Progress,
) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Fit all layers of ``folded`` in order, on token windows ``[N, T]``.

    Args:
        kept: folder for layers that are done; an interrupted run goes on from them.

    Returns:
        the changed tensors, and what each stage gained in each layer.
    """
    plan = FoldPlan(Grouped(folded.geometry.num_kv_heads), "given", "local", seed)
    kept.mkdir(parents=True, exist_ok=True)
    stored = stored_layers(kept, reported=False)  # they were folded elsewhere
    layers = teacher.geometry.num_layers
    tensors: dict[str, torch.Tensor] = {}
    reports = []
    healer: CalibratedFolder | None = None
    if any(stored(index) is None for index in range(layers)):
        healer = CalibratedFolder(teacher, plan, windows, kept / "hidden")
    for index in range(layers):
        layer = stored(index)
        if layer is not None:
            if healer is not None:
                healer.replay(layer)
        elif healer is not None:
            layer = healer.take(_as_folded(folded, index), progress)
            keep_layer(kept, layer)
        else:
            raise CheckpointError(
                f"layer {index} has vanished from {kept}", "--resume fits it again"
            )
        tensors |= layer.tensors
        reports.append(layer_report(layer))
        progress("healing layers", index + 1, layers)
    return tensors, reports


def _as_folded(folded: Checkpoint, index: int) -> FoldedLayer:
    tensors = {name: folded.tensor(name) for name in folded.layer_names(index)}
    return FoldedLayer(index, tensors, None)
