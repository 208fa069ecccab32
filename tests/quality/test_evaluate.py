"""Perplexity, divergence and their errors, against float64 definitions."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from kvfold import convert, evaluate
from kvfold.errors import InputError
from kvfold.quality.scores import compare
from kvfold.quality.text import token_windows
from tests.conftest import Kvfold
from tests.toolbox import tiny

# Log-softmax in float32 over a hundred entries, averaged: errors of about 1e-7 per token.
FLOAT32 = 1e-5


def test_against_the_definitions_in_float64() -> None:
    source, other = tiny.make("llama"), tiny.make("llama", seed=1)
    windows = tiny.tokens(6, 20)
    first, second = compare([("a", source), ("b", other)], windows)
    p, q = (tiny.logits(m, windows)[:, :-1].double().log_softmax(-1) for m in (source, other))
    targets = windows[:, 1:, None]
    nll_p, nll_q = (-x.gather(-1, targets)[..., 0] for x in (p, q))
    assert first.nll == pytest.approx(float(nll_p.mean()), abs=FLOAT32)
    assert first.perplexity == pytest.approx(math.exp(nll_p.mean()), rel=FLOAT32)
    lost = (nll_q - nll_p).mean(1)
    assert second.nats_lost == pytest.approx(float(lost.mean()), abs=FLOAT32)
    assert second.nats_lost_error == pytest.approx(float(lost.std() / 6**0.5), abs=FLOAT32)
    assert second.ratio == pytest.approx(math.exp(lost.mean()), rel=FLOAT32)
    kl = (p.exp() * (p - q)).sum(-1)
    assert second.kl == pytest.approx(float(kl.mean()), abs=FLOAT32)
    assert second.kl_p95 == pytest.approx(float(kl.flatten().quantile(0.95)), abs=1e-3)
    agree = (p.argmax(-1) == q.argmax(-1)).double().mean()
    assert second.top1 == pytest.approx(float(agree))
    assert (first.tokens, second.tokens) == (114, 114)


def test_a_model_against_itself() -> None:
    model = tiny.make("llama")
    _, same = compare([("a", model), ("b", model)], tiny.tokens())
    assert (same.kl, same.nats_lost, same.ratio, same.top1) == (0, 0, 1, 1)
    assert same.nats_lost_error == 0


def test_different_vocabularies_are_refused() -> None:
    models = [("a", tiny.make("llama")), ("b", tiny.make("llama", vocab_size=50))]
    with pytest.raises(InputError, match="vocabular"):
        compare(models, tiny.tokens())


def test_windows_are_spread_and_do_not_overlap(llama_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    text = " ".join(f"w{3 + i % 90}" for i in range(1000))
    ids = tokenizer(text)["input_ids"]
    every = token_windows(tokenizer, text, 50)
    assert every.flatten().tolist() == ids
    some = token_windows(tokenizer, text, 50, max_tokens=200)
    assert torch.equal(some, every[[0, 5, 10, 15]])


def test_a_beginning_token_opens_every_window(llama_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    windows = token_windows(tokenizer, tiny.words(100), 20)
    assert (windows[:, 0] == 1).all()
    assert windows.shape == (5, 20)


def test_command_and_thresholds(
    kvfold: Kvfold, llama_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    convert(llama_folder, tmp_path / "out", 1, method="mean")
    arguments = ("eval", llama_folder, tmp_path / "out", "--text", text_file, "--context", 64)
    run = kvfold(*arguments, "--max-tokens", 640, "--json")
    assert run.code == 0
    results: Any = run.json()
    source, folded = results
    assert source["kv_bytes_per_token"] == 6 * folded["kv_bytes_per_token"]
    assert folded["kl"] > 0
    limit = folded["kl"] / 2
    run = kvfold(*arguments, "--max-tokens", 640, "--max-kl", limit)
    assert run.code == 3
    assert "KL" in run.err
    assert "630 tokens" in run.out, "the table is printed even if a threshold is missed"
    assert kvfold(*arguments, "--max-kl", 2 * folded["kl"]).code == 0
    assert kvfold(*arguments, "--max-ppl-ratio", folded["ratio"] / 2).code == 3


def test_from_python(llama_folder: Path, text_file: Path) -> None:
    (only,) = evaluate([llama_folder], [text_file], context=64, max_tokens=640)
    assert only.tokens == 630
    assert only.text == "words.txt"
