"""GGUF files are refused by their metadata: no weight is unpacked and no folder is made before."""

from pathlib import Path

import gguf
import numpy as np
import pytest

from tests.conftest import Kvfold


def write(path: Path, architecture: str) -> None:
    """A file of one small tensor that says it is a model."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(2)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_context_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(8)
    writer.add_tensor("token_embd.weight", np.zeros((8, 64), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("architecture", "options", "words"),
    [
        ("bloom", ["--no-calibration"], "bloom"),
        ("bloom", ["--dry-run"], "bloom"),
        ("nothing", ["--no-calibration"], "nothing"),
        ("nothing", ["--dry-run"], "nothing"),
        ("gpt2", ["--no-calibration"], "gpt2 cannot be stored with 2 KV heads"),
        ("gpt2", ["--dry-run"], "gpt2 cannot be stored with 2 KV heads"),
        ("gpt2", ["--no-calibration", "--resume"], "gpt2 cannot be stored with 2 KV heads"),
        ("llama", [], "tokenizer"),
    ],
)
def test_refused_by_metadata(
    kvfold: Kvfold, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    architecture: str, options: list[str], words: str,
) -> None:  # fmt: skip
    monkeypatch.setattr("kvfold.fold.convert.transcode", None)  # calling it would fail
    write(tmp_path / "model.gguf", architecture)
    out = tmp_path / "out"
    run = kvfold("convert", tmp_path / "model.gguf", out, "--kv-heads", 2, *options)
    assert run.code == 2, run.err
    assert words in run.err
    assert "hint: " in run.err
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
