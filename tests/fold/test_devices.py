"""No allocation of folding takes the device for granted: each says where, or follows its inputs."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from kvfold.fold.methods import method_names
from kvfold.fold.model import fold_model
from tests.toolbox import tiny

FACTORIES = {
    torch.arange, torch.as_tensor, torch.empty, torch.eye, torch.full, torch.linspace, torch.ones,
    torch.rand, torch.randint, torch.randn, torch.randperm, torch.tensor, torch.zeros,
}  # fmt: skip


class Allocations(TorchFunctionMode):
    """Lists the lines of ``kvfold.fold`` that allocate where PyTorch would by default."""

    def __init__(self) -> None:
        super().__init__()
        self.silent: set[str] = set()

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        caller = sys._getframe(1)
        name = caller.f_code.co_filename
        if function in FACTORIES and "device" not in kwargs and "/kvfold/fold/" in name:
            self.silent.add(f"{name}:{caller.f_lineno}")
        return function(*args, **kwargs)


@pytest.mark.parametrize("method", ["auto", *method_names()])
def test_every_allocation_says_where(method: str) -> None:
    windows = tiny.tokens(8, 64, seed=5)
    for case in ("llama", "qwen3", "phi"):
        model = tiny.make(case, num_key_value_heads=6)
        with Allocations() as allocations:
            fold_model(model, 2, method, "local", windows)
            fold_model(model, 2, method, "none")
        assert not allocations.silent
