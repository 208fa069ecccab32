"""Prepacked linear layers compute what plain ones do, and hold weights once."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import kvfold.transformers as drop_in
from kvfold.errors import InputError
from kvfold.kernels.cpu.build import compiler
from kvfold.kernels.cpu.linear import why_not
from kvfold.transformers import linear as room
from tests.toolbox.tiny import CASES, make, tokens

pytestmark = pytest.mark.skipif(
    why_not(torch.zeros(1, 1)) is not None, reason="this PyTorch has no prepacked layers"
)


@pytest.fixture(autouse=True)
def _everything_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers as tiny as these gain nothing: take what is measured for what would be kept."""
    monkeypatch.setattr(room, "_WORTH", float("inf"))


def bound(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """How far sums of ``in`` products and a bias, in any order, may be from the exact ones.

    n additions in float32 err by n * eps32 of the sum of the terms' sizes; the sum is rounded to
    its dtype, and perhaps once more before the bias.
    """
    sizes = x.double().abs() @ layer.weight.detach().double().abs().T
    if layer.bias is not None:
        sizes = sizes + layer.bias.double().abs()
    n = layer.in_features + 1
    return sizes * (n * torch.finfo(torch.float32).eps + 2 * torch.finfo(x.dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(7, 13), (64, 48), (131, 577)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_is_itself(dtype: torch.dtype, shape: tuple[int, int], bias: bool) -> None:
    """Against float64, for one row, many, none and rows that lie apart; undone bit by bit."""
    if why_not(torch.zeros(1, 1, dtype=dtype)):
        pytest.skip(f"no prepacked {dtype} here")
    torch.manual_seed(1)
    layer = nn.Linear(shape[1], shape[0], bias=bias).to(dtype)
    model = nn.Sequential(layer).eval()
    weight, before = layer.weight, layer.weight.detach().clone()
    inputs = [torch.randn(*rows, shape[1], dtype=dtype) for rows in ((1,), (2, 3), (40,), (0,))]
    inputs.append(torch.randn(5, 2 * shape[1], dtype=dtype)[:, ::2])
    exact = [
        nn.functional.linear(
            x.double(), before.double(), None if layer.bias is None else layer.bias.double()
        )
        for x in inputs
    ]
    allowed = [bound(layer, x) for x in inputs]
    with torch.no_grad(), drop_in.prepack(model) as done:
        assert done.packed == ["0"]
        assert weight.numel() == 0  # its memory is not held twice
        for x, wanted, most in zip(inputs, exact, allowed, strict=True):
            found = model(x)
            assert found.dtype == dtype
            assert ((found.double() - wanted).abs() <= most).all()
    assert model[0] is layer
    assert layer.weight is weight
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("case", list(CASES))
def test_every_family_computes_the_same(case: str) -> None:
    model, ids = make(case), tokens()
    with torch.no_grad():
        wanted = model(ids).logits
        done = drop_in.prepack(model)
        packed, found = done.packed, model(ids).logits
        done.undo()
        again = model(ids).logits
    assert {*packed, *done.left} == {n for n, x in model.named_modules() if type(x) is nn.Linear}
    assert set(done.left) <= {"lm_head"}
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(again, wanted)


def test_tied_weights_are_left_unless_told() -> None:
    model, ids = make("llama-wide-tied"), tokens()
    with torch.no_grad():
        wanted = model(ids).logits
        with drop_in.prepack(model) as done:
            assert "shared" in done.left["lm_head"]
            assert done.extra_bytes == 0
        with drop_in.prepack(model, copy_tied=True) as done:
            assert "lm_head" in done.packed
            assert done.extra_bytes == model.model.embed_tokens.weight.nbytes
            torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-4, atol=1e-4)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_layer_in_two_places_is_one() -> None:
    layer = nn.Linear(16, 16)
    model = nn.Sequential(layer, nn.ReLU(), layer).eval()
    x = torch.randn(3, 16)
    with torch.no_grad():
        wanted = model(x)
        with drop_in.prepack(model):
            assert model[0] is model[2]
            torch.testing.assert_close(model(x), wanted)
    assert model[0] is model[2] is layer


def test_only_what_gains_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_WORTH", 0.0)  # nothing is that fast
    model = nn.Sequential(nn.Linear(16, 16)).eval()
    done = drop_in.prepack(model)
    assert type(model[0]) is nn.Linear
    assert done.left == {"0": "the plain product is as fast"}
    assert not done.packed


def test_what_others_watch_is_left() -> None:
    class Special(nn.Linear):
        pass

    hooked, patched = nn.Linear(8, 8), nn.Linear(8, 8)
    hooked.register_forward_hook(lambda *_: None)
    vars(patched)["forward"] = lambda x: x
    model = nn.Sequential(hooked, patched, Special(8, 8), nn.Linear(8, 8).double()).eval()
    done = drop_in.prepack(model)
    assert done.packed == []
    assert "hooked" in done.left["0"]
    assert "hooked" in done.left["1"]
    assert "float64" in done.left["3"]


REFUSED: dict[str, Callable[[Any], Any]] = {
    "trained": lambda model: model.train(),
    "saved": lambda model: model.state_dict(),
    "loaded": lambda model: model.load_state_dict({}),
    "made torch.float64": lambda model: model.double(),
    "copied": copy.deepcopy,
    "no gradients": lambda model: model(torch.ones(1, 16, requires_grad=True)),
    "already": drop_in.prepack,
}


@pytest.mark.parametrize("what", list(REFUSED))
def test_refused_until_undone(what: str) -> None:
    model = nn.Sequential(nn.Linear(16, 16)).eval()
    with drop_in.prepack(model), pytest.raises(InputError, match=what):
        REFUSED[what](model)
    model.to("cpu").train().double().state_dict()


def test_wrong_calls() -> None:
    with pytest.raises(InputError, match="in training"):
        drop_in.prepack(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(InputError, match=r"torch\.nn\.Module"):
        drop_in.prepack("model")  # type: ignore[arg-type]


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
def test_compiled() -> None:
    """One graph, whose weights are inputs: nothing of them is folded into it."""
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)).eval()
    x = torch.randn(2, 3, 32)
    with torch.no_grad(), drop_in.prepack(model):
        wanted = model(x)
        found = torch.compile(model, fullgraph=True)(x)
    torch.testing.assert_close(found, wanted)
    torch.compiler.reset()
