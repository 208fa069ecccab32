"""Linear layers whose weights lie as the processor's products read them, in any model on a CPU."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, NoReturn

import torch
from torch import nn

from kvfold.errors import InputError
from kvfold.kernels.cpu.linear import linear, packed, why_not
from kvfold.ops.kinds import check_flag

_ROWS = (16, 1)  # what oneDNN is told to pack for: it lays out float32 differently for one row
_PLAIN = 0  # not packed
_ROUNDS = 5
_MEASURED_BYTES = 64 << 20  # weights that one measurement reads: more than most caches hold
_WORTH = 0.97  # of the time of the plain product; more is noise
_ABSORBED = "kv_b_proj"  # what transformers' models name it that makes keys and values of latents
_UNDO = "call undo() of what prepack returned first"


class PackedLinear(nn.Module):
    """``nn.Linear`` for inference; its weight is a tensor that only oneDNN can read."""

    def __init__(self, original: nn.Linear, weight: torch.Tensor) -> None:
        super().__init__()
        self.in_features, self.out_features = original.in_features, original.out_features
        self.weight, self.bias = weight, original.bias
        self._original = (original,)  # in a tuple: it is no submodule
        self.training = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            raise InputError("prepacked layers have no gradients", "use torch.no_grad()")
        if x.dtype != self.weight.dtype and torch.is_autocast_enabled("cpu"):
            x = x.to(self.weight.dtype)
        return linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"

    def train(self, mode: bool = True) -> "PackedLinear":
        if mode:
            _refuse("trained")
        return self

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        like = torch.empty(0, dtype=self.weight.dtype)
        if (new := fn(like)).dtype != like.dtype or new.device != like.device:
            _refuse(f"made {new.dtype} on {new.device}")
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _save_to_state_dict(self, *args: Any) -> None:
        _refuse("saved")

    def _load_from_state_dict(self, *args: Any) -> None:
        _refuse("loaded into")

    def __getstate__(self) -> dict[str, Any]:
        _refuse("copied or pickled")


def _refuse(what: str) -> NoReturn:
    raise InputError(f"a model with prepacked layers cannot be {what}", _UNDO)


@dataclass
class Prepacked:
    """What ``prepack`` did to a model; also a context that undoes it at its end.

    Attributes:
        packed: names of the layers that are prepacked now.
        left: those that are not, and why.
        speedup: of one row, by a layer's outputs, inputs and dtype: what was measured.
        extra_bytes: of weights that are held twice now.
    """

    packed: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    speedup: dict[tuple[int, int, torch.dtype], float] = field(default_factory=dict)
    extra_bytes: int = 0
    _places: list[tuple[nn.Module, str, nn.Linear]] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Put the layers back as they were, bit by bit; they can be saved and trained again."""
        for parent, name, original in self._places:
            stand_in = getattr(parent, name)
            if original.weight.numel() == 0:
                original.weight.data = stand_in.weight.to_dense()
            setattr(parent, name, original)
        self.packed, self._places, self.extra_bytes = [], [], 0

    def __enter__(self) -> "Prepacked":
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()

    def __str__(self) -> str:
        lines = [
            f"{outputs} x {inputs} {str(dtype).removeprefix('torch.')}: {ratio:.2f} x as fast"
            for (outputs, inputs, dtype), ratio in self.speedup.items()
        ]
        counts = f"{len(self.packed)} layers prepacked, {len(self.left)} left as they are"
        return "\n".join([counts, *lines])


def prepack(model: nn.Module, *, copy_tied: bool = False) -> Prepacked:
    """Let a model's linear layers read their weights in the order of the processor's products.

    Of every shape of weight the product with one row is measured, plain and prepacked, here and
    now; what gains becomes prepacked, in place, the rest stays. Results are those of the same
    layers up to the order of sums. The model is then for inference: training, saving, copying,
    casting and moving it are refused until ``undo``.

    Args:
        model: any module on the CPU, in ``eval`` mode; its ``nn.Linear`` layers are looked at.
        copy_tied: also prepack weights that something else reads too, as an embedding reads the
            output layer's. Their memory is then needed twice (``extra_bytes``).

    Raises:
        InputError: for a model in training, or one that is prepacked already.

    >>> model = nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 64)).eval()
    >>> with torch.no_grad(), prepack(model) as done:
    ...     y = model(torch.randn(1, 64))
    >>> len(done.left) <= 2
    True
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model={model!r:.60}: expected a torch.nn.Module")
    check_flag("copy_tied", copy_tied)
    if any(isinstance(module, PackedLinear) for module in model.modules()):
        raise InputError("the model is prepacked already", _UNDO)
    if model.training:
        raise InputError("a model in training cannot be prepacked", "call model.eval() first")
    done = Prepacked()
    tied = _tied(model)
    groups: dict[tuple[int, int, torch.dtype], list[str]] = {}
    layers = _linear_layers(model)
    for name, layer in layers.items():
        reason = _why_not(layer, tied=id(layer.weight) in tied and not copy_tied)
        if reason is None and name.rpartition(".")[2] == _ABSORBED:
            reason = "attention over latents reads its weight as it is"
        if reason is not None:
            done.left[name] = reason
            continue
        groups.setdefault((*layer.weight.shape, layer.weight.dtype), []).append(name)
    for kind, names in groups.items():
        rows, done.speedup[kind] = _measured([layers[name].weight.detach() for name in names])
        if rows is None:
            done.left |= dict.fromkeys(names, "the plain product is as fast")
            continue
        for name in names:
            _replace(model, layers[name], rows, id(layers[name].weight) in tied, done)
        done.packed += names
    return done


def _linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """All that are just ``nn.Linear``: what derives from it may read its weight elsewhere."""
    return {name: x for name, x in model.named_modules() if type(x) is nn.Linear and name}


def _tied(model: nn.Module) -> set[int]:
    """Which parameters have memory that is read in more than one place."""
    readers: dict[int, list[nn.Parameter]] = {}
    for module in model.modules():
        for x in module.parameters(recurse=False):
            memory = x.data_ptr() if x.layout == torch.strided else 0
            readers.setdefault(memory or id(x), []).append(x)
    return {id(each) for found in readers.values() if len(found) > 1 for each in found}


def _why_not(layer: nn.Linear, tied: bool) -> str | None:
    hooks = layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks
    if any(hooks) or "forward" in vars(layer):
        return "something is hooked to it"
    if tied:
        return "its weight is shared: copy_tied=True would hold it twice"
    return why_not(layer.weight)


@torch.no_grad()
def _measured(weights: list[torch.Tensor]) -> tuple[int | None, float]:
    """For how many rows to pack, None if not at all, and how much faster one row is then."""
    sample = weights[: max(1, _MEASURED_BYTES // weights[0].nbytes)]
    x = torch.ones(1, sample[0].shape[1], dtype=sample[0].dtype)
    ways = {_PLAIN: sample}
    for rows in _ROWS:
        try:
            ways[rows] = [packed(weight, rows) for weight in sample]
        except RuntimeError:  # PyTorch says which shapes it has only when asked
            continue
    times: dict[int, list[float]] = {rows: [] for rows in ways}
    for _ in range(_ROUNDS):
        for rows, each in ways.items():
            times[rows].append(_seconds(x, each, rows == _PLAIN))
    least = {rows: min(found) for rows, found in times.items()}
    plain = least.pop(_PLAIN)
    if not least:
        return None, 1.0
    best = min(least, key=lambda rows: least[rows])
    return best if least[best] < _WORTH * plain else None, plain / least[best]


def _seconds(x: torch.Tensor, weights: list[torch.Tensor], plain: bool) -> float:
    product = nn.functional.linear if plain else linear
    start = perf_counter()
    for weight in weights:
        product(x, weight, None)
    return perf_counter() - start


def _replace(model: nn.Module, layer: nn.Linear, rows: int, tied: bool, done: Prepacked) -> None:
    """Put a prepacked layer wherever this one is, and let go of its weight's memory."""
    stand_in = PackedLinear(layer, packed(layer.weight, rows))
    for parent, name in _places(model, layer):
        setattr(parent, name, stand_in)
        done._places.append((parent, name, layer))
    if tied:
        done.extra_bytes += layer.weight.nbytes
    else:
        layer.weight.data = layer.weight.new_empty(0)


def _places(model: nn.Module, layer: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children leaves out doubles
            if child is layer:
                yield parent, name
