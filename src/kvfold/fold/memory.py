"""How much memory a conversion takes at least, told before it starts. No torch."""

from math import prod

from kvfold.checkpoint.source import Checkpoint

_FLOAT = 4
_STATES = 2  # of all tokens: before and after a layer of the source's; where layers are fitted
_FITTED_STATES = 4  # also what goes into folded ones, and what attention puts out
_SPILLED = 2**30  # of each; what is larger lies in a file (fold.hidden)
# Bytes of a number of what an MLP's last layer is solved from: float64, and what is added to it in
# float32 and in float64.
_SOLVED = 8 + 4 + 8
_ENDING = 5  # arrays of a window's logits, where predictions are compared


def least_memory(checkpoint: Checkpoint, *, tokens: int, context: int, fitted: bool) -> int:
    """Bytes that the device needs, whatever else it does; PyTorch itself takes more.

    The larger of what one layer takes, its weights and, where it is fitted, the products that its
    MLP is solved from, and of what the ends do, embeddings and a window's predictions; and what
    goes from layer to layer.

    Args:
        tokens: of the calibration text, no more than it has, in windows of ``context``.
    """
    geometry, store = checkpoint.geometry, checkpoint.store
    layers = range(geometry.num_layers)
    layer = max(
        sum(prod(store.shape(name)) for name in checkpoint.layer_names(index)) for index in layers
    )
    wide, family = 0, checkpoint.family
    if fitted and not family.post_norm and (output := family.mlp_output) is not None:
        names = {f"{checkpoint.layer_prefix(index)}.{output}.weight" for index in layers}
        shapes = [store.shape(name) for name in names & set(checkpoint.names)]
        wide = max((max(shape) for shape in shapes), default=0)
    vocabulary, size = checkpoint.config.get("vocab_size") or 0, geometry.hidden_size
    ends = vocabulary * (size + (_ENDING * context if fitted else 0))
    states = min(tokens * size * _FLOAT, _SPILLED) * (_FITTED_STATES if fitted else _STATES)
    return states + max(_FLOAT * layer + _SOLVED * wide**2, _FLOAT * ends)
