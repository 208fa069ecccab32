"""One ladder: whoever stands on it first and has nothing against a call computes it."""

from typing import Any

import pytest
import torch

import kvfold
from kvfold import KVCache
from kvfold.kernels import pages, registry
from kvfold.kernels.backend import Call, Found, Kernels
from kvfold.kernels.torch.products import products
from kvfold.kernels.view import Angles, KVView
from tests.toolbox.attention_cases import naive, noise


class Toy(Kernels):
    """Decoding by PyTorch, and a list of what it was asked."""

    name = "toy"
    max_dim = 64

    def __init__(self) -> None:
        self.asked: list[str] = []

    def here(self, device: torch.device) -> bool:
        return device.type == "cpu"

    def why_not(self, call: Call) -> str | None:
        return None if call.q.shape[2] == 1 else "toys take one query"

    def why(self, call: Call) -> str:
        return "it is a toy"

    def attend(self, call: Call) -> Found:
        self.asked.append("views" if call.views else "tensors")
        return products(call)

    def append(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        view: KVView,
        angles: Angles | None = None,
        kept: Any = None,
    ) -> None:
        self.asked.append("append")
        pages.write(k, v, view)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Toy:
    toy = Toy()
    monkeypatch.setattr(registry, "LADDER", [toy, *registry.LADDER])
    return toy


@pytest.mark.parametrize("dtype", ["fp32", "int4"])
def test_a_registered_backend_gets_everything(toy: Toy, dtype: str) -> None:
    q, k, v = noise(2, 4, 1, 32), noise(2, 2, 90, 32, seed=1), noise(2, 2, 90, 32, seed=2)
    truth, _ = naive(q, k, v)
    assert str(kvfold.explain(q, k, v)) == "kernel: it is a toy"
    torch.testing.assert_close(kvfold.attention(q, k, v), truth.float(), rtol=0, atol=1e-5)
    cache = KVCache(2, 32, batch=2, dtype=dtype)
    cache.append(k, v)
    found = torch.as_tensor(cache.attend(q))
    truth, _ = naive(q, *cache.tensors(torch.float32))
    torch.testing.assert_close(found, truth.float(), rtol=0, atol=1e-5)
    assert {"tensors", "views", "append"} == set(toy.asked)


def test_what_it_does_not_take_goes_on_down(toy: Toy) -> None:
    many = noise(2, 4, 40, 32), noise(2, 2, 40, 32), noise(2, 2, 40, 32)
    assert kvfold.explain(*many).name == "sdpa"
    kvfold.attention(*many)
    assert toy.asked == []


@pytest.mark.parametrize(("wished", "name"), [("torch", "torch"), ("toy", "toy"), ("?", "toy")])
def test_the_environment_chooses(
    toy: Toy, wished: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVFOLD_BACKEND", wished)
    assert registry.home(torch.device("cpu")).name == name


def test_every_call_has_a_backend_and_a_reason() -> None:
    small: dict[str, Any] = {"softcap": 2.0, "return_lse": True}
    for tokens, keys, options in ((1, 64, {}), (64, 64, {}), (64, 64, small), (0, 3, {})):
        q, k = noise(1, 2, tokens, 8), noise(1, 2, keys, 8)
        assert kvfold.explain(q, k, k, **options).why
