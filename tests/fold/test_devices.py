"""No allocation of folding takes the device for granted: each says where, or follows its inputs."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from kvfold.arch.target import Grouped, Latent
from kvfold.fold.methods import all_methods
from kvfold.fold.model import fold_model
from kvfold.fold.stored_layer import StoredLayer
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


@pytest.mark.parametrize("case", ["llama", "qwen3", "phi"])
def test_every_allocation_says_where(case: str) -> None:
    windows = tiny.tokens(4, 32, seed=5)
    model = tiny.make(case, num_key_value_heads=6)
    with Allocations() as allocations:
        fold_model(model, 2, "auto", "local", windows)
        for name, method in all_methods().items():
            if Grouped in method.targets:
                fold_model(model, 2, name, "none", windows)
            elif case == "llama":  # QK-norm and layer norms have no place in a latent model
                fold_model(model, Latent(12, 4), name, "none", windows)
    assert not allocations.silent


@pytest.mark.parametrize("case", ["qwen3", "phi3", "starcoder2"])
def test_heads_lie_where_they_are_folded(case: str) -> None:
    heads = StoredLayer(tiny.checkpoint_of(tiny.make(case)), 0).heads(torch.device("meta"))
    parts = [heads.q, heads.k, heads.v, heads.o, heads.o_bias]
    if heads.norm:
        parts += [heads.norm.q, heads.norm.k]
    assert all(part.is_meta for part in parts if part is not None)
