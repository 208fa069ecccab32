"""Heads or a latent? What keeps more of the source's attention, at one size of the cache.

Asked for a share of the source's cache, kvfold folds every layer to each candidate in closed form,
runs it on the source's own inputs, and compares what its attention puts out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvfold.arch.families import BY_TYPE
from kvfold.arch.latent_config import check_latent
from kvfold.arch.target import Grouped, Latent, Target
from kvfold.checkpoint.source import Checkpoint
from kvfold.errors import InputError, UnsupportedError
from kvfold.fold.hidden import HiddenStates
from kvfold.fold.layer import FoldPlan, fold_layer
from kvfold.fold.passes import Calibration, SourcePass, loader
from kvfold.fold.stored_layer import StoredLayer
from kvfold.fold.stream import LayerStream
from kvfold.geometry import divisors
from kvfold.progress import Progress, no_progress

TOKENS = 8192  # of the calibration text; the order of candidates needs no more


@dataclass(frozen=True)
class Compared:
    """A candidate and how far its attention is from the source's.

    Attributes:
        error: |a - a_source|^2 / |a_source|^2 of what attention puts out, mean over layers.
    """

    target: Target
    error: float

    def as_dict(self) -> dict[str, Any]:
        return {"target": self.target.label, "attention_error": self.error}


def candidates(checkpoint: Checkpoint, share: float, layout: str) -> list[Target]:
    """Heads and latents that fit into a share of the source's cache: the largest of each kind.

    Latents keep the upper half or three quarters of the rotary frequencies.

    Raises:
        InputError: if there is none.
    """
    g, family, config = checkpoint.geometry, checkpoint.family, checkpoint.config
    each = g.head_dim + g.v_head_dim
    room = int(share * g.num_kv_heads * each)
    fitting = [heads for heads in divisors(g.num_kv_heads)[:-1] if heads * each <= room]
    found: list[Target] = [Grouped(max(fitting))] if fitting else []
    rotary_dim = family.rotary_dim(config, g)
    for rotary in (rotary_dim // 4 * 2, rotary_dim // 8 * 6):
        latent = Latent(max(room - rotary, 2), rotary, layout=layout)
        try:
            check_latent(family, config)
            latent.geometry(g, family, config)
            latent.config(family, config)
        except (InputError, UnsupportedError):
            continue
        if latent.rank + rotary <= room:
            found.append(latent)
    if not found:
        raise InputError(
            f"--kv-bytes {share:.0%}: neither heads nor a latent fit into {room} numbers a token "
            f"and layer; the source has {g.num_kv_heads * each}",
            "ask for more",
        )
    return found


def compare(
    checkpoint: Checkpoint,
    targets: Sequence[Target],
    windows: torch.Tensor,
    *,
    method: str,
    seed: int,
    progress: Progress = no_progress,
) -> list[Compared]:
    """Fold all layers to each target, without fitting, and measure; see :class:`Compared`.

    Args:
        windows: token ids ``[N, T]``; the first ``TOKENS`` of them are used.
    """
    calibration = Calibration(windows[: max(1, TOKENS // windows.shape[1])])
    load = loader(checkpoint)
    source = SourcePass(checkpoint, calibration, load)
    attention = calibration.states("attention", checkpoint.geometry.hidden_size)
    streams = [_stream(checkpoint, target, calibration) for target in targets]
    scales = [_residual_scale(checkpoint, target) for target in targets]
    errors = torch.zeros(len(targets), dtype=torch.float64, device="cpu")
    attended = any(isinstance(target, Latent) for target in targets)
    layers = checkpoint.geometry.num_layers
    for index in range(layers):
        layer = StoredLayer(checkpoint, index)
        statistics = source.statistics(layer, attention, attended=attended)
        for number, target in enumerate(targets):
            folded = fold_layer(layer, FoldPlan(target, method, "none", seed), statistics)
            tensors = folded.completed(layer, target)
            scale = source.residual_scale / scales[number]
            errors[number] += _error(streams[number], index, tensors, source, attention, scale)
        source.advance()
        progress("comparing heads and latents", index + 1, layers)
    found = zip(targets, (errors / layers).tolist(), strict=True)
    return [Compared(target, error) for target, error in found]


def _stream(checkpoint: Checkpoint, target: Target, calibration: Calibration) -> LayerStream:
    """The folded model, ready to run single layers."""
    family = checkpoint.family
    config = target.config(family, checkpoint.config)
    stream = LayerStream(config, family.layer, family.attention, calibration.device)
    first = Calibration(calibration.windows[:1], device=calibration.device)
    states = first.states("first", checkpoint.geometry.hidden_size)
    stream.start(first.windows, loader(checkpoint), states)  # for what layers are called with
    return stream


def _residual_scale(checkpoint: Checkpoint, target: Target) -> float:
    config = target.config(checkpoint.family, checkpoint.config)
    return BY_TYPE[config["model_type"]].residual_factor(config)


@torch.no_grad()
def _error(
    stream: LayerStream,
    index: int,
    tensors: dict[str, torch.Tensor],
    source: SourcePass,
    attention: HiddenStates,
    scale: float,
) -> float:
    """Of one layer's attention, on the source's inputs.

    Args:
        scale: of the source's attention in the folded model, whose blocks may be scaled otherwise.
    """
    apart, size = 0.0, 0.0
    seen: list[torch.Tensor] = []
    with stream.layer(index, tensors) as live, live.listening(attention_output=seen.append):
        for batch in source.inputs.batches():
            live(source.inputs[batch])
            wanted = attention[batch] * scale
            apart += float((seen.pop() - wanted).square().sum())
            size += float(wanted.square().sum())
    return apart / max(size, 1e-300)
