"""The kinds of attention's options: what a value of each may be, and how kernels take it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, TypeGuard

import torch

from kvfold.errors import InputError
from kvfold.names import shown
from kvfold.ops.tracing import constant

Shape = tuple[int, int, int, int]  # batch, query heads, queries, keys
# What kernels hold as float32 and int32.
_TINY, _HUGE = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
_MOST_KEYS = (1 << 31) - 1


@dataclass(frozen=True, eq=False)
class Kind:
    """A kind of value; None is "none" for all that may be left out.

    Attributes:
        typed: refuses a value (name, value, call's shape) that is of another kind, or would lead
            kernels astray. ``torch.compile`` knows what is a number and what a tensor, and no
            numbers of a tensor; operators look at those again when they run.
        fits: refuses a value that does not fit, and gives it as kernels take it.
        schema: its type as an argument of a PyTorch operator.
        dtype: of its tensors as kernels read them, which have one number for every sequence
            (``along`` 0) or query head (1).
        none: the number that tells kernels there is none.
        most: larger numbers mean as much; sums with them do not overflow.
    """

    typed: Callable[[str, Any, Shape], None]
    fits: Callable[[str, Any, Shape], Any]
    schema: str = ""
    dtype: torch.dtype | None = None
    along: int = 0
    none: float = 0.0
    most: int | None = None

    @property
    def is_tensor(self) -> bool:
        return self.schema == "Tensor?"

    def number(self, x: float | None) -> float:
        """A number as kernels take it."""
        if x is None:
            return self.none
        return x if self.most is None or x < self.most else self.most

    def stored(self, x: torch.Tensor) -> torch.Tensor:
        """One number for every sequence, or head, as kernels read them."""
        return x.detach().resolve_neg().to(self.dtype).contiguous()


def check_flag(name: str, x: object) -> None:
    """Refuse anything but True and False: "no" and None would count as one of them."""
    if x is not True and x is not False:
        raise InputError(f"{name}={shown(x)}: expected True or False")


def check_tensor(name: str, x: object) -> None:
    """Refuse anything but an ordinary tensor."""
    if not isinstance(x, torch.Tensor):
        raise InputError(f"{name}={shown(x)}: expected a tensor", "torch.as_tensor makes one")
    if x.layout is not torch.strided:
        raise InputError(f"{name} is {x.layout}, expected an ordinary (strided) tensor")


def is_number(x: object) -> TypeGuard[float]:
    """Whether it is a number of Python's or NumPy's; True and False are not meant as one."""
    # Usual types come first: a step of decoding waits for this.
    return type(x) is float or type(x) is int or (isinstance(x, Real) and not isinstance(x, bool))


def _is_scalar(x: object) -> bool:
    """A tensor of one number, as a model may compute its scale."""
    if not isinstance(x, torch.Tensor):
        return False
    return x.numel() == 1 and x.is_floating_point() and not x.is_meta


def _is_whole(x: object) -> bool:
    return type(x) is int or (isinstance(x, Integral) and not isinstance(x, bool))


def check_range(name: str, given: torch.Tensor | None, batch: int, keys: int) -> None:
    """Positions must be ``[B]`` and within the keys: kernels follow them blindly."""
    if given is None:
        return
    if given.shape != (batch,):
        raise InputError(f"{name} has shape {list(given.shape)}, expected [{batch}]")
    if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
        raise InputError(f"{name} is {given.dtype}, expected whole numbers (torch.int32)")
    if given.device.type != "cpu":
        return  # reading it would wait for the GPU, whose kernels stay within the keys anyway
    if given.numel() and not 0 <= int(given.min()) <= int(given.max()) <= keys:
        low, high = int(given.min()), int(given.max())
        raise InputError(f"{name} runs from {low} to {high}, beyond the {keys} keys given")


def _as_it_is(name: str, x: Any, shape: Shape) -> Any:
    return x


def _flag(name: str, x: object, shape: Shape) -> None:
    check_flag(name, x)


def _tensor(name: str, x: object, shape: Shape) -> None:
    check_tensor(name, x)


def _limits(name: str, x: object, shape: Shape) -> None:
    whole = x if isinstance(x, tuple | list) else (x,)
    if not all(each is None or _is_whole(each) for each in whole):
        raise InputError(f"{name}={shown(x)}: expected a whole number of keys, a pair, or None")


def _whole(name: str, x: object, shape: Shape) -> None:
    if not _is_whole(x) or x > _MOST_KEYS:  # type: ignore[operator]
        raise InputError(f"{name}={shown(x)}: expected a whole number of keys")


def _not_negative(name: str, x: int, shape: Shape) -> int:
    if x < 0:
        raise InputError(f"{name}={x}: expected 0 or more")
    return x


def _real(name: str, x: object, shape: Shape) -> None:
    if not is_number(x) and not _is_scalar(x):
        raise InputError(f"{name}={shown(x)}: expected a number, or None")
    x = float(x)  # type: ignore[arg-type]
    if math.isfinite(x) and x and not _TINY <= abs(x) <= _HUGE:
        raise InputError(f"{name}={x}: float32 cannot hold it; expected {_TINY} to {_HUGE}")


def _finite(name: str, x: float, shape: Shape) -> float:
    x = constant(x)
    if not math.isfinite(x):
        raise InputError(f"{name}={x}: expected a finite number")
    return x


def _positive(name: str, x: float, shape: Shape) -> float:
    x = constant(x)
    if not (x > 0 and math.isfinite(x)):
        raise InputError(f"{name}={x}: expected a positive number, or None")
    return x


def _positions(name: str, x: torch.Tensor, shape: Shape) -> None:
    check_tensor(name, x)
    check_range(name, x, shape[0], shape[3])


def _each_head(name: str, x: torch.Tensor, shape: Shape) -> torch.Tensor:
    if x.shape != (shape[1],):
        raise InputError(f"{name} has shape {list(x.shape)}, expected [{shape[1]}]")
    if x.dtype == torch.bool or x.is_complex():
        raise InputError(f"{name} is {x.dtype}, expected a float type")
    return x


def _broadcasts(x: torch.Tensor, shape: Shape) -> bool:
    if not torch.compiler.is_compiling():  # PyTorch's own way takes longer than a small step
        pairs = zip(x.shape[::-1], shape[::-1], strict=False)
        return x.dim() <= 4 and all(size in (1, wanted) for size, wanted in pairs)
    try:
        return torch.broadcast_shapes(x.shape, shape) == torch.Size(shape)
    except RuntimeError:
        return False


def _spread(name: str, x: torch.Tensor, shape: Shape) -> torch.Tensor:
    if x.dtype != torch.bool and not x.is_floating_point():
        raise InputError(
            f"{name} is {x.dtype}, expected bool or a float type",
            "a 0/1 mask becomes boolean by mask.bool()",
        )
    if not _broadcasts(x, shape):
        raise InputError(
            f"{name} has shape {list(x.shape)}, which does not broadcast to {list(shape)}"
        )
    return x.view((1,) * (4 - x.dim()) + tuple(x.shape)) if x.dim() < 4 else x


FLAG = Kind(_flag, _as_it_is)
WINDOW = Kind(_limits, _as_it_is)  # looked at together with ``causal``
LIMIT = Kind(
    _whole, _as_it_is, "SymInt?", none=-1, most=1 << 30
)  # how many keys a window leaves on one side
COUNT = Kind(_whole, _not_negative, "SymInt")
NUMBER = Kind(_real, _finite, "float?")
POSITIVE = Kind(_real, _positive, "float?")
PER_SEQUENCE = Kind(_positions, _as_it_is, "Tensor?", torch.int32)
PER_HEAD = Kind(_tensor, _each_head, "Tensor?", torch.float32, along=1)
MASK = Kind(_tensor, _spread, "Tensor?")
