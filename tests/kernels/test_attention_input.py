"""``kvfold.attention`` says which path it takes and why, and what is wrong with its arguments."""

import math
from typing import Any

import pytest
import torch

import kvfold
from kvfold.errors import InputError
from tests.toolbox.attention_cases import (
    kernels,
    needs_kernels,
    noise,
    qkv,
    using,
    without_kernels,
)


@needs_kernels
def test_explain(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv(1, (4, 2), 1, 64)
    many = noise(1, 4, 64, 32)
    assert str(kvfold.explain(q, k, v)).startswith("kernel: ")
    assert kvfold.explain(many, k, v).name == "sdpa"
    assert kvfold.explain(many, k, v, softcap=1.0).name == "matmul"
    more = [x.float() for x in qkv(1, (4, 2), 512, 512)]
    vectors = kernels().isa != "baseline"
    assert kvfold.explain(*more).name == ("kernel" if vectors else "sdpa")
    with monkeypatch.context() as none:
        without_kernels(none)
        assert kvfold.explain(*more).name == "sdpa"
    with using("baseline"):
        assert kvfold.explain(*more).name == "sdpa"
    assert kvfold.explain(q.double(), k.double(), v.double()).name == "matmul"
    assert kvfold.explain(q.requires_grad_(), k, v).name != "kernel"
    with torch.no_grad():
        assert kvfold.explain(q, k, v).name == "kernel"
    with pytest.raises(InputError, match="windw"):
        kvfold.explain(q, k, v, windw=3)  # type: ignore[call-arg]
    with pytest.raises(InputError, match="window=0"):
        kvfold.explain(q, k, v, window=0)


def test_explain_says_that_kernels_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    without_kernels(monkeypatch)
    monkeypatch.setenv("KVFOLD_KERNELS", "/nowhere/libkvfold.so")
    path = kvfold.explain(*qkv(1, (4, 2), 1, 64))
    assert path.name == "matmul"
    assert "install a C++ compiler" in path.why


GOOD = qkv(2, (4, 2), 3, 8, (16, 16))
BAD: list[tuple[dict[str, Any], str]] = [
    ({"q": GOOD[0][0]}, r"\[4, 3, 16\]"),
    ({"q": noise(3, 4, 3, 16)}, r"\[3, 4, 3, 16\]"),
    ({"q": noise(2, 3, 3, 16)}, "3 query heads cannot share 2"),
    ({"q": noise(2, 4, 3, 15)}, r"\[2, 4, 3, 15\]"),
    ({"v": noise(2, 2, 9, 16)}, r"\[2, 2, 9, 16\]"),
    ({"k": noise(2, 0, 8, 16), "v": noise(2, 0, 8, 16)}, "0 KV heads"),
    ({"q": GOOD[0].half()}, "float16"),
    ({name: x.long() for name, x in zip("qkv", GOOD, strict=True)}, "int64"),
    ({"q": GOOD[0].to("meta")}, "meta"),
    ({"window": 0}, "window=0"),
    ({"window": -3}, "window=-3"),
    ({"window": 3, "causal": False}, "causal"),
    ({"window": (3, 2)}, r"window=\(3, 2\) would show later keys"),
    ({"window": (3, -2), "causal": False}, r"window=\(3, -2\)"),
    ({"window": (3,), "causal": False}, r"window=\(3,\)"),
    ({"sink_logits": torch.ones(2)}, r"sink_logits has shape \[2\]"),
    ({"sinks": -1}, "sinks=-1"),
    ({"scale": math.nan}, "scale=nan"),
    ({"scale": math.inf}, "scale=inf"),
    ({"softcap": 0.0}, "softcap=0"),
    ({"softcap": -1.0}, "softcap=-1"),
    ({"softcap": math.nan}, "softcap=nan"),
    ({"dropout": 1.0}, "dropout=1"),
    ({"dropout": -0.1}, "dropout=-0.1"),
    ({"lengths": torch.tensor([8, 9])}, "lengths runs from 8 to 9"),
    ({"lengths": torch.tensor([-1, 8])}, "lengths runs from -1"),
    ({"lengths": torch.tensor([8])}, r"lengths has shape \[1\]"),
    ({"start": torch.tensor([0, 9])}, "start runs from 0 to 9"),
    ({"start": torch.tensor(0)}, r"start has shape \[\]"),
    ({"alibi_slopes": torch.ones(2)}, r"alibi_slopes has shape \[2\]"),
    ({"mask": torch.ones(3, 9)}, r"mask has shape \[3, 9\]"),
    ({"mask": torch.ones(5, 2, 4, 3, 8)}, r"mask has shape \[5, 2, 4, 3, 8\]"),
]


@pytest.mark.parametrize(("change", "words"), BAD, ids=[words for _, words in BAD])
def test_bad_input(change: dict[str, Any], words: str) -> None:
    call = dict(zip("qkv", GOOD, strict=True)) | change
    with pytest.raises(InputError, match=words):
        kvfold.attention(**call)


@pytest.mark.parametrize(
    "change",
    [{"mask": torch.ones(3, 8, dtype=torch.long)}, {"lengths": torch.tensor([7.9, 8.0])}],
    ids=["integer mask", "fractional lengths"],
)
def test_bad_dtypes(change: dict[str, Any]) -> None:
    """An integer mask of ones and zeros, as transformers has, is not an additive one."""
    with pytest.raises(InputError, match=r"int64|float32"):
        kvfold.attention(*GOOD, **change)
