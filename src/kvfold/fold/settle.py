"""What an open request folds to: what is compared, or tried, for that; and folding all layers.

PyTorch is imported when something is folded.
"""

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvfold.checkpoint.records import ComparedRow, HeldOut, TriedRow
from kvfold.checkpoint.source import Checkpoint
from kvfold.fold.preview import Preview
from kvfold.fold.request import DEFAULT_STEPS, ConvertRequest
from kvfold.fold.search import CLOSED, Limit, Search, measured
from kvfold.fold.windows import Cut
from kvfold.progress import Progress
from kvfold.quality.device import pick_dtype

if TYPE_CHECKING:
    from kvfold.quality.world import World


def compared(
    found: Preview,
    checkpoint: Checkpoint,
    cut: Cut | None,
    folder: Path,
    world: "World",
    progress: Progress,
) -> tuple[ConvertRequest, dict[str, list[ComparedRow]]]:
    """The request with what is folded to, and what was compared for that."""
    from kvfold.fold.choose import KEPT, choose, compare

    assert cut is not None  # an open request has text
    request, targets = found.request, found.targets
    device, dtype = world.device, pick_dtype(request.dtype, world.device)
    measure = partial(
        compare, checkpoint, targets, cut.calibration,
        method=request.method, fit=request.fit, seed=request.seed,
        device=device, dtype=dtype, progress=progress,
    )  # fmt: skip
    target, rows = choose(folder / KEPT, targets, measure)
    return request.settled(target), {"compared": rows}


def searched(
    found: Preview,
    checkpoint: Checkpoint,
    cut: Cut | None,
    folder: Path,
    world: "World",
    progress: Progress,
) -> tuple[ConvertRequest, dict[str, list[TriedRow]]]:
    """The request with the fewest heads that hold what was asked, and what was tried for that."""
    from kvfold.quality.world import World

    request, alone = found.request, World(0, 1, world.device)
    search = Search(
        folder, found.targets, request.fit or CLOSED,
        Limit(request.max_ppl_ratio, request.max_kl),
        lambda target, fit, layers: measured(
            fold_layers(
                checkpoint, _fitted(request.settled(target), fit), cut, layers, alone, progress,
                label=f"trying {target.label}" + (", fitted" if fit != CLOSED else ""),
            )[1]
        ),
    )  # fmt: skip
    return request.settled(search.run()), {"tried": search.rows}


def _fitted(request: ConvertRequest, fit: str) -> ConvertRequest:
    return replace(request, fit=fit, fit_steps=request.fit_steps if fit == request.fit else None)


def fold_layers(
    checkpoint: Checkpoint,
    request: ConvertRequest,
    cut: Cut | None,
    kept: Path | None,
    world: "World",
    progress: Progress,
    label: str | None = None,
) -> tuple[list[dict[str, Any]], HeldOut | None]:
    """Fold all layers, keeping each on disk; their reports, and what was measured at the end.

    Args:
        kept: the folder for them; None in processes that keep none.
        label: of a try, which is measured whatever fits it.
    """
    from kvfold.fold.layer import FoldPlan
    from kvfold.fold.layer_store import LayerStore
    from kvfold.fold.loop import fold_all
    from kvfold.fold.passes import Calibration

    steps = request.fit_steps or DEFAULT_STEPS
    plan = FoldPlan(request.target, request.method, request.fit, request.seed, steps=steps)
    if label is not None:
        plan = replace(plan, measured=True, label=label)
    hidden = world.tell(None if kept is None else kept.with_name("hidden"))
    calibration = None
    if cut is not None:
        dtype = pick_dtype(request.dtype, world.device)
        calibration = Calibration(
            cut.calibration, hidden, world.device, dtype, held_out=cut.held_out, world=world
        )
    store = None if kept is None else LayerStore(kept)
    layers = fold_all(checkpoint, plan, calibration, store, progress)
    reports, held_out = [], None
    for layer in layers:
        reports.append(layer.as_dict())
        held_out = layer.held_out
    world.barrier()
    if kept is not None and hidden is not None:
        shutil.rmtree(hidden, ignore_errors=True)
    return reports, held_out
