"""gpt-oss's sinks: they move with their query heads, are fitted, healed and written."""

from pathlib import Path

import pytest
import torch

from kvfold import heal
from kvfold.checkpoint.source import open_checkpoint
from kvfold.errors import UnsupportedError
from kvfold.files import write_json
from kvfold.fold.model import fold_model
from tests.toolbox import tiny
from tests.toolbox.healing_cases import OPTIONS, weights

NAME = "model.layers.{}.self_attn.sinks"


def test_they_move_with_their_heads() -> None:
    """And are no others than before, where nothing is fitted."""
    model = tiny.hidden_mha(tiny.make("gpt_oss"))
    folded = fold_model(model, 2, "auto", "none", tiny.tokens(8, 32, seed=5))
    moved = 0
    for layer, report in enumerate(folded.record):
        own, kept = (m.state_dict()[NAME.format(layer)] for m in (model, folded.model))
        order = [head for group in report["groups"] for head in group]
        assert torch.equal(kept, own[order])
        moved += order != sorted(order)
    assert moved, "no head was moved: nothing was tried"


def test_they_are_fitted() -> None:
    model = tiny.make("gpt_oss")
    folded = fold_model(model, 1, "pca", "local", tiny.tokens(16, 32, seed=5))
    name = NAME.format(0)
    assert not torch.equal(folded.model.state_dict()[name], model.state_dict()[name])
    for report in folded.record:
        errors = [stage["error_after"] for stage in report["stages"]]
        assert errors[-1] < report["stages"][0]["error_before"]


def test_they_are_healed(tmp_path: Path) -> None:
    source = tiny.save_with_tokenizer(tiny.make("gpt_oss"), tmp_path / "source")
    model = fold_model(tiny.make("gpt_oss"), 1, "pca", "none", tiny.tokens(8, 32)).model
    folded = tiny.save_with_tokenizer(model, tmp_path / "folded")
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(tiny.words(300, seed) for seed in range(40)))
    heal(folded, tmp_path / "healed", source, [text], **OPTIONS)
    before, after = (weights(tmp_path / name)[NAME.format(0)] for name in ("folded", "healed"))
    assert before.shape == after.shape
    assert not torch.equal(before, after)


def test_packed_weights_are_told_how_to_be_unpacked(tmp_path: Path) -> None:
    folder = tiny.save_with_tokenizer(tiny.make("gpt_oss"), tmp_path / "source")
    config = dict(open_checkpoint(folder).config)
    write_json(folder / "config.json", {**config, "quantization_config": {"quant_method": "mxfp4"}})
    with pytest.raises(UnsupportedError, match="is quantized") as error:
        open_checkpoint(folder)
    assert "Mxfp4Config(dequantize=True)" in error.value.hint
