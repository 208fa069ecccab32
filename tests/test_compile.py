"""``torch.compile``: one graph, whatever the path and options; what eager execution gives.

Compiled with ``eager``, which traces every operator with symbols for sizes and generates no code.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import kvfold
from kvfold.kernels.dispatch import explain
from tests.attention_cases import noise, skip_without_kernels, without_kernels

# How each path is reached: number of queries, whether kernels may be used, and gradients.
PATHS = {
    "kernel": (3, True, False),
    "sdpa": (37, True, False),
    "sdpa, gradients": (37, True, True),
    "matmul": (3, False, False),
}
Outputs = tuple[torch.Tensor, ...]
# Sums of some dozens of products of size one, in another order.
CLOSE: dict[str, Any] = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(params=list(PATHS))
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name = str(request.param)
    if name == "kernel":
        skip_without_kernels()
    if not PATHS[name][1]:
        without_kernels(monkeypatch)
    return name


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def options_of(tokens: int, keys: int) -> dict[str, dict[str, Any]]:
    return {
        "causal": {},
        "scale": {"scale": 0.3},
        "window": {"window": 11, "sinks": 2},
        "both sides": {"window": (11, 4), "causal": False},
        "boolean mask": {"mask": noise(5, 1, tokens, keys) > -1},
        "bias": {"mask": noise(tokens, keys)},
        "lengths": {"lengths": torch.tensor([keys, 40, 41, 50, 7])},
        "start": {"start": torch.tensor([0, 9, 3, 2, 4])},
        "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.2])},
        "sink logits": {"sink_logits": noise(4, seed=9)},
        "softcap": {"softcap": 2.0},
        "lse": {"return_lse": True},
        "everything": {
            "scale": 0.3, "softcap": 3.0, "window": 9, "sinks": 1, "mask": noise(tokens, keys),
            "lengths": torch.tensor([keys, 40, 41, 50, 7]), "sink_logits": noise(4, seed=9),
            "return_lse": True, "start": torch.tensor([0, 9, 3, 2, 4]),
        },
    }  # fmt: skip


def inputs(tokens: int, keys: int, gradients: bool = False) -> Outputs:
    """Of sizes that are all different: equal ones would be taken to be one symbol."""
    shapes = (5, 4, tokens, 16), (5, 2, keys, 16), (5, 2, keys, 24)
    return tuple(
        noise(*shape, seed=seed).requires_grad_(gradients) for seed, shape in enumerate(shapes)
    )


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, dynamic=True, backend="eager")


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Outputs:
    found = kvfold.attention(q * 2, k, v, **options)
    return found if isinstance(found, tuple) else (found,)


def check(step: Callable[..., Any], given: Outputs, **options: Any) -> None:
    """Outputs, and gradients if there are any, are those of eager execution."""
    ours, wanted = step(*given, **options), attend(*given, **options)
    torch.testing.assert_close(ours, wanted, **CLOSE)
    if wanted[0].requires_grad:
        found = [torch.autograd.grad(out[0].square().sum(), given) for out in (ours, wanted)]
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


OPTIONS = list(options_of(3, 65))
# What takes another path than the one it is meant for needs no second test.
BENT = {"softcap", "lse", "everything"}
ASKED = {
    "kernel": OPTIONS,
    "sdpa": [name for name in OPTIONS if name not in BENT],
    "sdpa, gradients": ["scale", "bias", "sink logits"],
    "matmul": ["causal", "scale", *sorted(BENT)],
}


@pytest.mark.parametrize(
    ("path", "name"), [(path, name) for path in PATHS for name in ASKED[path]], indirect=["path"]
)
def test_one_graph_for_all_sizes(path: str, name: str) -> None:
    """``dynamic=True``: compiled once; a call for each length, as in decoding, compiles no more."""
    tokens, _, gradients = PATHS[path]
    given = inputs(tokens, 65, gradients)
    asked = options_of(tokens, 65)[name]
    assert explain(*given, **asked).name == path.split(",")[0]
    step = compiled(attend)
    check(step, given, **asked)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for more, keys in ((tokens, 66), (tokens + 3, 91)):
            check(step, inputs(more, keys, gradients), **options_of(more, keys)[name])


def test_a_backend_gets_everything(path: str) -> None:
    """Functionalized and differentiated by ``aot_eager``, as inductor would have it."""
    tokens, _, gradients = PATHS[path]
    asked: dict[str, Any] = {"scale": 0.3, "window": 9, "sink_logits": noise(4, seed=9)}
    step = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    check(step, inputs(tokens, 65, gradients), **asked)
