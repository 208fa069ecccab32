"""Calibration text that the model writes itself."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvfold import convert
from kvfold.fold import own_text
from kvfold.fold.own_text import chat_opening, own_windows, sample
from tests.conftest import Kvfold
from tests.toolbox import tiny

SMALL: dict[str, Any] = {"calibration_tokens": 1024, "context": 64, "fit": "refit"}


def test_it_is_sampled_from_what_the_model_predicts() -> None:
    """Nats with a cache are those of the whole text at once; common tokens come more often."""
    model = tiny.make("llama")
    begun = torch.tensor([[3], [4], [5]])
    ids, nats = sample(model, begun, 40, torch.Generator().manual_seed(0))
    assert ids.shape == (3, 40)
    assert torch.equal(ids[:, :1], begun)
    with torch.no_grad():
        logs = model(ids).logits[:, :-1].log_softmax(-1)
    whole = -logs.gather(2, ids[:, 1:, None])[..., 0].mean(1)
    torch.testing.assert_close(nats, whole, rtol=1e-4, atol=1e-5)
    many, _ = sample(model, begun[:1].expand(4000, -1), 2, torch.Generator().manual_seed(1))
    wanted = logs[0, 0].exp()
    found = torch.bincount(many[:, 1], minlength=len(wanted)) / 4000
    assert (found - wanted).abs().max() < 6 * (wanted.max() / 4000) ** 0.5  # standard errors


def test_the_surest_and_the_least_sure_windows_are_left_out(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def numbered(
        model: Any, begun: torch.Tensor, context: int, generator: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        first = len(made) * own_text._AT_ONCE
        made.append(len(begun))
        number = torch.arange(first, first + len(begun))
        return number[:, None].expand(-1, context), ((number * 7) % 40).float()

    made: list[int] = []
    monkeypatch.setattr(own_text, "sample", numbered)
    windows = own_windows(llama_folder, 32, 64, seed=0)
    assert sum(made) == 40
    surprise = (windows[:, 0] * 7) % 40
    assert sorted(surprise.tolist()) == list(range(4, 36))
    assert torch.equal(windows[:, 0], windows[:, 0].sort().values)  # as they were written


def test_the_same_seed_gives_the_same_text(llama_folder: Path) -> None:
    first, second, other = (own_windows(llama_folder, 5, 24, seed=seed) for seed in (0, 0, 1))
    assert first.shape == (5, 24)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_a_chat_begins_with_the_users_turn() -> None:
    def rendered(turn: Any, tokenize: bool) -> str:
        return f"<start>user {turn[0]['content']}<end>"

    def ids(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [len(word) for word in text.split()]}

    class Tokenizer(SimpleNamespace):
        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            return ids(text, add_special_tokens)

    assert chat_opening(Tokenizer(chat_template="x", apply_chat_template=rendered)) == [11]
    assert not chat_opening(Tokenizer(chat_template=None))

    def broken(turn: Any, tokenize: bool) -> str:
        raise ValueError("no system turn")

    assert not chat_opening(Tokenizer(chat_template="x", apply_chat_template=broken))


@pytest.mark.parametrize("chat", [[], [5] * 40, [5, 6]])
def test_where_chats_have_no_beginning_windows_begin_as_texts_do(
    llama_folder: Path, chat: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or one that fills half of a window."""
    monkeypatch.setattr(own_text, "_AT_ONCE", 2)
    monkeypatch.setattr(own_text, "opening_tokens", lambda tokenizer: [3])
    monkeypatch.setattr(own_text, "chat_opening", lambda tokenizer: chat)
    windows = own_windows(llama_folder, 6, 64, seed=0)
    usable = chat == [5, 6]
    assert (windows[:, 0] == 3).sum() == (4 if usable else 6)
    assert (windows[:, 0] == 5).sum() == (2 if usable else 0)


def test_it_is_calibrated_on_alone_or_beside_text(
    llama_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    own = convert(llama_folder, tmp_path / "own", 1, calibration=["self"], **SMALL)
    assert own["calibration"]["texts"] == ["self"]
    assert own["calibration"]["tokens"] == 1024
    assert own["held_out"]["tokens"] == 8 * 63
    both = convert(llama_folder, tmp_path / "both", 1, calibration=["self", text_file], **SMALL)
    assert both["calibration"]["texts"] == ["self", str(text_file)]
    assert both["calibration"]["tokens"] == 1024
    assert both["held_out"]["tokens"] == 16 * 63


def test_a_run_that_goes_on_writes_no_more(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(BaseException):
        pass

    def stop(label: str, done: int, total: int) -> None:
        if label == "folding layers":
            raise Stop

    convert(llama_folder, tmp_path / "whole", 1, calibration=["self"], **SMALL)
    with pytest.raises(Stop):
        convert(llama_folder, tmp_path / "out", 1, calibration=["self"], progress=stop, **SMALL)
    monkeypatch.setattr(own_text, "own_windows", None)
    convert(llama_folder, tmp_path / "out", 1, calibration=["self"], resume=True, **SMALL)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_bad_input(kvfold: Kvfold, llama_folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    tiny.make("llama", num_key_value_heads=6).save_pretrained(bare)
    arguments = ("--kv-heads", 1, "--calibration", "self")
    run = kvfold("convert", bare, tmp_path / "out", *arguments)
    assert run.code == 2
    assert "no tokenizer" in run.err
    healed = kvfold("convert", llama_folder, tmp_path / "out", *arguments, "--heal", 1000)
    assert healed.code == 2
    assert "give a file with --calibration" in healed.err
    assert not (tmp_path / "out").exists()
    told = json.loads(kvfold("convert", llama_folder, tmp_path / "out", *arguments, "--dry-run",
                             "--json").out)  # fmt: skip
    assert told["request"]["calibration"] == ["self"]
