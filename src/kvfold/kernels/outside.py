"""What ``torch.compile`` must not look into."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def outside_graphs(reason: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator: the function, and all that it calls, is run between two compiled graphs.

    With ``fullgraph=True`` PyTorch raises an error with the reason instead. Called eagerly it
    costs a fraction of a microsecond, half of what ``torch.compiler.disable`` does by itself.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        hidden: Callable[P, R] = torch.compiler.disable(function, reason=reason)

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if torch.compiler.is_compiling():
                return hidden(*args, **kwargs)
            return function(*args, **kwargs)

        return call

    return decorate


#: How many tokens a ``KVCache`` holds is known to Python alone, which a graph does not run.
python_state = outside_graphs(
    "the lengths of a kvfold KVCache are Python state, not tensors: leave out fullgraph=True, or"
    " use kvfold.FixedKVCache, kvfold.transformers.FixedKVCache or transformers' StaticCache"
)
