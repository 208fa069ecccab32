"""Folding on a GPU: what it loses there and on the CPU, and the same bytes for the same seed."""

from pathlib import Path
from typing import Any

import pytest
import torch

from kvfold import convert, evaluate
from tests.toolbox import tiny

CASES = ("llama", "qwen3", "phi3")


def folded(source: Path, out: Path, text: Path, **options: Any) -> dict[str, bytes]:
    """The files of weights of a conversion with every stage."""
    convert(source, out, 1, calibration=[text], context=64, fit_steps=20, seed=3, **options)
    return {path.name: path.read_bytes() for path in out.glob("*.safetensors")}


@pytest.fixture(params=CASES)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    found: Path = tiny.save_with_tokenizer(tiny.make(request.param), tmp_path / "source")
    return found


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(tiny.words(6000, 0))
    return file


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_same_seed_gives_the_same_bytes(
    source: Path, text: Path, tmp_path: Path, device: str
) -> None:
    once, again = (folded(source, tmp_path / n, text, device=device) for n in ("a", "b"))
    assert once == again


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gpu_loses_what_a_cpu_loses(source: Path, text: Path, tmp_path: Path, dtype: str) -> None:
    """Within 0.01 nats."""
    assert torch.cuda.is_available()
    for device in ("cpu", "cuda"):
        folded(source, tmp_path / device, text, device=device, dtype=dtype)
    scores = evaluate([source, tmp_path / "cpu", tmp_path / "cuda"], [text], context=64)
    assert scores[1].nats_lost == pytest.approx(scores[2].nats_lost, abs=0.01)
