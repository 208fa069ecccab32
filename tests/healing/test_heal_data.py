"""Healing's text: nothing lost, nothing crossed, nothing leaked, and the same order each time."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.errors import InputError, RunError
from kvfold.healing.packing import Batch, Tokens, TrainingStream, hold_out, pack
from kvfold.healing.sources import TextSource, fingerprint, open_corpus, parse_source, pieces
from tests.toolbox import tiny

DOCUMENTS = [f"document {i} " + "abcdefgh"[: i % 8 + 1] * (i % 5 + 1) for i in range(40)]


class Characters:
    """A tokenizer of characters: what went in can be read off the ids."""

    eos_token_id = 0

    def __init__(self, opening: int | None = None) -> None:
        self.bos_token_id = opening

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        start = [] if self.bos_token_id is None else [self.bos_token_id]
        special = start if options.get("add_special_tokens", True) else []
        return {"input_ids": special + [ord(letter) for letter in text]}


class Fixed:
    """A corpus of given documents, in order; remembers how often it was opened."""

    def __init__(self, documents: list[str]) -> None:
        self.texts = documents

    def documents(self, epoch: int, start: int = 0) -> Iterator[str]:
        return iter(self.texts[start:])


def stream(
    documents: list[str],
    context: int = 16,
    held_out: set[bytes] | None = None,
    opening: int | None = None,
) -> TrainingStream:
    tokens = Tokens(Characters(opening))
    return TrainingStream([("text", Fixed(documents), 1.0)], tokens, context, held_out or set(), 0)


def text_of(batch: Batch) -> str:
    return "".join("|" if i == 0 else chr(i) for i in batch.ids.flatten().tolist())


def test_every_document_is_read_whole_and_in_order() -> None:
    context = 16
    whole = "|".join(DOCUMENTS) + "|"
    batch = stream(DOCUMENTS, context).batch(len(whole) // context)
    assert text_of(batch) == whole[: len(whole) // context * context]


def test_positions_start_anew_with_each_document_and_sequence() -> None:
    batch = stream(DOCUMENTS).batch(20)
    starts = batch.positions == 0
    assert bool(starts[:, 0].all())
    after_end = batch.ids[:, :-1] == 0
    assert torch.equal(starts[:, 1:], after_end)
    assert torch.equal(batch.valid, ~after_end)


def test_segments_open_as_the_tokenizer_opens_texts() -> None:
    batch = stream(DOCUMENTS, opening=7).batch(20)
    opens = batch.positions == 0
    last = torch.zeros_like(opens)
    last[:, -1] = True  # a lone opening token at the end of a sequence would teach nothing
    assert bool((batch.ids[opens & ~last] == 7).all())


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 30), st.integers(1, 5))
def test_a_restored_stream_goes_on_with_the_very_next_batch(before: int, size: int) -> None:
    whole = stream(DOCUMENTS)
    for _ in range(before):
        whole.batch(size)
    state = json.loads(json.dumps(whole.state()))  # it goes through a file
    resumed = stream(DOCUMENTS)
    resumed.restore(state)
    for _ in range(3):
        a, b = whole.batch(size), resumed.batch(size)
        assert torch.equal(a.ids, b.ids)
        assert torch.equal(a.positions, b.positions)


def test_held_out_documents_are_never_trained_on_even_if_they_occur_twice() -> None:
    documents = [*DOCUMENTS, DOCUMENTS[8]]
    tokens = Tokens(Characters())
    held, chosen = hold_out([("text", Fixed(documents), 1.0)], tokens, 16, 40)
    assert held is not None
    assert fingerprint(DOCUMENTS[8]) in chosen
    trained = text_of(stream(documents, held_out=chosen).batch(200))
    assert DOCUMENTS[8] not in trained
    assert DOCUMENTS[9] in trained


def test_every_text_holds_out_a_sequence_where_its_share_is_shorter() -> None:
    tokens = Tokens(Characters())
    corpora = [(name, Fixed(DOCUMENTS), 1.0) for name in "abc"]
    held, _ = hold_out(corpora[:1], tokens, 16, 40)
    assert held is not None
    assert held.ids.shape == (2, 16)
    held, _ = hold_out(corpora, tokens, 16, 40)  # 13 tokens each would be no sequence at all
    assert held is not None
    assert held.ids.shape == (3, 16)
    assert hold_out(corpora, tokens, 16, 0) == (None, set())


def test_sources_are_drawn_by_weight() -> None:
    tokens = Tokens(Characters())
    corpora = [("a", Fixed(["a" * 99]), 3.0), ("b", Fixed(["b" * 99]), 1.0)]
    batch = TrainingStream(corpora, tokens, 10, set(), seed=0).batch(2000)
    share = float((batch.ids[:, 0] == ord("a")).float().mean())
    # Three standard errors of 2,000 draws at 3/4 are 0.029.
    assert abs(share - 0.75) < 0.03


def test_too_little_text_is_refused() -> None:
    tokens = Tokens(Characters())
    with pytest.raises(InputError, match=r"short.txt is too short: about 6 tokens"):
        hold_out([("short.txt", Fixed(["hello"]), 1.0)], tokens, 16, 0)


def test_text_that_is_all_held_out_is_refused() -> None:
    only = stream(["abc"], held_out={fingerprint("abc")})
    with pytest.raises(InputError, match="no text to train on"):
        only.batch(1)


@pytest.mark.parametrize("case", [*tiny.CASES, "gpt_bigcode", "gpt2"])
def test_documents_of_one_sequence_do_not_see_each_other(case: str) -> None:
    """Packed and apart, every document gets the same logits."""
    model = tiny.make(case) if case in tiny.CASES else tiny.build(case, tiny.GPT2)
    ids = tiny.tokens(1, 24)[0].tolist()
    segments = [ids[:5], ids[5:6], ids[6:24]]
    batch = pack([segments])
    with torch.no_grad():
        packed = model(input_ids=batch.ids, position_ids=batch.positions, use_cache=False).logits[0]
        apart = [model(torch.tensor([part]), use_cache=False).logits[0] for part in segments]
    torch.testing.assert_close(packed, torch.cat(apart), rtol=1e-4, atol=1e-4)


# -- sources --------------------------------------------------------------------------------


def test_weights_are_read_from_the_name(tmp_path: Path) -> None:
    assert parse_source("a.txt=2.5") == TextSource("a.txt", 2.5)
    assert parse_source("a=b.txt") == TextSource("a=b.txt")
    named = tmp_path / "x=2"
    named.write_text("text")
    assert parse_source(str(named)) == TextSource(str(named))
    for bad in ("a=0", "a=-1", "a=nan", "a=inf"):
        with pytest.raises(InputError, match=r"weight of --text a: .*above 0"):
            parse_source(bad)


def test_pieces_of_a_text_are_the_text() -> None:
    text = "\n\n".join(f"paragraph {i} " * (i % 7) for i in range(2000))
    parts = pieces(text)
    assert "\n\n".join(parts) == text
    assert 30 <= len(parts) <= 70


def test_epochs_of_a_file_are_shuffled_and_repeatable(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in DOCUMENTS))
    corpus = open_corpus(TextSource(str(path)), seed=0)
    first, second = list(corpus.documents(1)), list(corpus.documents(2))
    assert sorted(first) == sorted(second) == sorted(DOCUMENTS)
    assert first != second
    assert list(corpus.documents(2, start=7)) == second[7:]
    assert list(corpus.documents(0)) == DOCUMENTS


@pytest.mark.parametrize(
    ("line", "message"),
    [("{oops", "line 1 is not valid JSON"), ('{"content": "x"}', "no column 'text'.*content")],
)
def test_bad_json_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(InputError, match=message):
        open_corpus(TextSource(str(path)), seed=0)


def test_parquet_and_saved_datasets_are_streamed(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"text": DOCUMENTS})
    table.to_parquet(str(tmp_path / "a.parquet"))
    table.save_to_disk(str(tmp_path / "saved"))
    for name in ("a.parquet", "saved"):
        corpus = open_corpus(TextSource(str(tmp_path / name)), seed=0)
        assert list(corpus.documents(0)) == DOCUMENTS
        shuffled = list(corpus.documents(1))
        assert sorted(shuffled) == sorted(DOCUMENTS)
        assert list(corpus.documents(1, start=11)) == shuffled[11:]


def test_a_dataset_of_the_hub_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[tuple[Any, ...]] = []

    def load_dataset(*arguments: Any, **options: Any) -> Any:
        asked.append((*arguments, options["split"], options["streaming"]))
        return datasets.Dataset.from_dict({"text": DOCUMENTS}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in ("org/name", "org/name:en"):
        corpus = open_corpus(TextSource(name), seed=0)
        assert list(corpus.documents(0)) == DOCUMENTS
    assert asked == [("org/name", None, "train", True), ("org/name", "en", "train", True)]

    def offline(*arguments: Any, **options: Any) -> Any:
        raise ConnectionError("no network\nmore")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(RunError, match=r"org/name cannot be opened \(no network\)"):
        open_corpus(TextSource("org/name"), seed=0)
