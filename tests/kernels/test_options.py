"""Options on their way to kernels: by name, and not to those that do not know them."""

import pytest
import torch

import kvfold
from kvfold.kernels.cpu.backend import Cpu
from kvfold.kernels.cpu.call import KNOWN
from kvfold.kernels.cpu.header import fields_of
from kvfold.ops.options import FIELDS, check_options
from tests.toolbox.attention_cases import distance, filled, naive, needs_kernels, qkv


def test_all_kernels_know_all_options() -> None:
    assert set(FIELDS) == KNOWN


def test_triton_kernels_know_all_options() -> None:
    pytest.importorskip("triton")
    from kvfold.kernels.triton.options import KNOWN

    assert set(FIELDS) == KNOWN


@needs_kernels
def test_a_backend_without_an_option_is_passed_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both over tensors and over a cache, whose pages are decoded then."""
    q, k, v = qkv(keys=40)
    cache = filled(kvfold.KVCache(2, 32, batch=2, dtype="fp32"), 40)
    before = torch.as_tensor(cache.attend(q, softcap=2.0))
    monkeypatch.setattr(Cpu, "knows", frozenset(FIELDS) - {"softcap"})
    assert kvfold.explain(q, k, v).name == "kernel"
    assert kvfold.explain(q, k, v, softcap=2.0).name == "matmul"
    truth, _ = naive(q, k, v, softcap=2.0)
    for found, wanted in (
        (kvfold.attention(q, k, v, softcap=2.0), truth),
        (cache.attend(q, softcap=2.0), before),
    ):
        assert distance(torch.as_tensor(found), wanted) < 1e-5
    asked = check_options((2, 4, 1, 40), {"softcap": 2.0})
    assert Cpu().lacks(asked) == "cpu has no softcap"


@pytest.mark.parametrize("line", ["double x", "int32_t x = 1", "Other x", "int32_t x y", "int* x["])
def test_only_plain_c_is_read(line: str) -> None:
    with pytest.raises(ValueError, match="unknown kind"):
        fields_of("A", text=f"struct A {{ int32_t n; {line}; }};")
