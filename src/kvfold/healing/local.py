"""Stage one: every layer by itself, towards what the source's layer puts out.

One layer of each model is in memory at a time. The fitting is that of ``convert --fit local``:
Adam on q, k, v and o through the layer's own MLP, then the output projections in closed form.
"""

from pathlib import Path
from typing import Any

import torch

from kvfold.arch.carried import Unchanged
from kvfold.checkpoint.source import Checkpoint
from kvfold.fold.layer import FoldedLayer
from kvfold.fold.layer_store import LayerStore
from kvfold.fold.loop import Making, go_down
from kvfold.fold.passes import CPU, Calibration
from kvfold.geometry import LatentGeometry
from kvfold.progress import Progress


def heal_layers(
    teacher: Checkpoint,
    folded: Checkpoint,
    windows: torch.Tensor,
    folder: Path,
    seed: int,
    progress: Progress,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Fit all layers of ``folded`` in order, on token windows ``[N, T]``.

    Args:
        folder: for layers that are done; an interrupted run goes on from them.
        device, dtype: as in ``Calibration``.

    Returns:
        the changed tensors, and what each stage gained in each layer.
    """
    making = Making(
        label="healing layers",
        source=teacher,
        base=folded,
        config=folded.config,
        carrier=Unchanged(),
        make=lambda layer, statistics: FoldedLayer(layer.index, layer.all(), None),
        gathers=False,
        latent=isinstance(folded.geometry, LatentGeometry),
        fit="local",
        seed=seed,
    )
    store = LayerStore(folder, reported=False)  # they were folded elsewhere
    tensors: dict[str, torch.Tensor] = {}
    reports = []
    calibration = Calibration(windows, folder / "hidden", device, dtype)
    for layer in go_down(making, calibration, store, progress):
        tensors |= layer.tensors
        reports.append(layer.as_dict())
    return tensors, reports
