"""What a run reads, and how often: each tensor once per pass that needs it, each text once."""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from kvfold import convert, heal
from kvfold.checkpoint.source import open_checkpoint
from kvfold.checkpoint.tensors import TensorFiles
from tests.toolbox import tiny

SMALL: dict[str, Any] = {"calibration_tokens": 1024, "context": 64}


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each tensor of a safetensors folder was read, below the folder's name."""
    counted: Counter[str] = Counter()
    read = TensorFiles.tensor

    def counting(self: TensorFiles, name: str) -> torch.Tensor:
        counted[f"{self.entries[name].file.parent.name}/{name}"] += 1
        return read(self, name)

    monkeypatch.setattr(TensorFiles, "tensor", counting)
    return counted


@contextmanager
def counted_opens(path: Path) -> Iterator[list[str]]:
    """Every opening of a file while the block runs."""
    seen: list[str] = []
    watching = True

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event == "open" and str(arguments[0]) == str(path):
            seen.append(str(arguments[0]))

    sys.addaudithook(hook)  # for good, so it is told when to stop
    try:
        yield seen
    finally:
        watching = False


@pytest.mark.parametrize("fit", ["none", "refit", "local"])
@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_a_conversion_reads_each_tensor_once_per_pass(
    case: str, fit: str, text_file: Path, tmp_path: Path, reads: Counter[str]
) -> None:
    """It is checked, folded, copied where it has not changed; what is behind the layers ends both
    models once they are compared."""
    model = tiny.build("gpt2", tiny.GPT2) if case == "gpt2" else tiny.make(case)
    folder = tiny.save_with_tokenizer(model, tmp_path / "source")
    convert(folder, tmp_path / "out", 1, fit=fit, calibration=[text_file], **SMALL)
    checkpoint = open_checkpoint(folder)
    layers = range(checkpoint.geometry.num_layers)
    replaced = {name for layer in layers for name in checkpoint.attention_shapes(layer)}
    output = f"{checkpoint.family.mlp_output}.weight"
    for name in checkpoint.names:
        head = name == "lm_head.weight"  # no layer's input passes through it
        changed = name in replaced or (fit != "none" and name.endswith(output))
        outside = not any(name.startswith(f"{checkpoint.layer_prefix(x)}.") for x in layers)
        inputs = name.endswith(("embed_tokens.weight", "wte.weight"))
        ends = (
            outside and fit != "none" and (not inputs or checkpoint.config["tie_word_embeddings"])
        )
        expected = 1 + (not head) + (not changed) + ends
        assert reads[f"source/{name}"] == expected, name


def test_the_local_stage_reads_each_model_once(
    text_file: Path, tmp_path: Path, reads: Counter[str]
) -> None:
    source = tiny.save_with_tokenizer(tiny.make("llama"), tmp_path / "source")
    folded = tmp_path / "folded"
    convert(source, folded, 1, calibrate=False)
    reads.clear()
    options: dict[str, Any] = {"context": 64, "local_tokens": 1024, "held_out_tokens": 256}
    heal(folded, tmp_path / "out", source, [text_file], stages=["local"], **options)
    for checkpoint in map(open_checkpoint, (source, folded)):
        for layer in range(checkpoint.geometry.num_layers):
            for name in checkpoint.layer_names(layer):
                assert reads[f"{Path(checkpoint.label).name}/{name}"] == 1, name


def test_a_tensor_is_scanned_once(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(llama_folder)
    name = next(iter(checkpoint.names))
    first = checkpoint.tensor(name)
    monkeypatch.setattr(torch, "isfinite", None)  # calling it would fail
    assert torch.equal(checkpoint.tensor(name), first)


def test_the_text_is_read_once(llama_folder: Path, text_file: Path, tmp_path: Path) -> None:
    with counted_opens(text_file) as opens:
        convert(llama_folder, tmp_path / "out", 2, fit="none", calibration=[text_file], **SMALL)
    assert len(opens) == 1
