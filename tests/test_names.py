"""Names of files, models and texts: whatever bytes they hold, they are names and nothing else."""

import io
import json
import os
import shutil
import unicodedata
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from kvfold.names import json_text, printable, shown
from kvfold.report.tables import print_table
from tests.conftest import Kvfold, Run

NASTY = [
    "$a$", "_under", "$x^{", "[/b]", "[red]x", "back\\slash\\", "100%s{0}", "two\nlines", "tab\t",
    "\x1b]0;title\x07\x1b[31m", "\x9b31m", "\u202eright-to-left", "<script>alert(1)</script>",
    "&amp;", "'quoted\"", "| a | b |", "naïve 模型 🙂", os.fsdecode(b"\xff\xfe\x80"), "a: b # c",
    "-dash", "a=2", "with space",
]  # fmt: skip
UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def seen(text: str) -> bool:
    return all(c == "\n" or unicodedata.category(c) not in UNSEEN for c in text)


@given(st.text(st.characters()))
def test_printable_text_can_be_printed_anywhere(text: str) -> None:
    found = printable(text)
    assert seen(found)
    assert "\n" not in found
    found.encode()
    assert len(found.splitlines()) <= 1
    if seen(text) and "\n" not in text:
        assert found == text


@given(st.recursive(
    st.none() | st.integers() | st.text(st.characters()),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters()), inner),
))  # fmt: skip
def test_json_holds_any_text_and_can_be_printed(document: Any) -> None:
    text = json_text(document)
    assert seen(text)
    text.encode()
    assert json.loads(text) == document


@given(st.text(st.characters()) | st.integers() | st.floats() | st.binary())
def test_what_messages_repeat_is_short(value: object) -> None:
    found = shown(value)
    assert seen(found)
    assert 0 < len(found) < 120


@given(st.lists(st.text(st.characters(), min_size=1), min_size=3, max_size=3))
@settings(max_examples=50)
def test_tables_show_words_as_they_are(words: list[str]) -> None:
    out = io.StringIO()
    console = Console(file=out, width=10_000)
    print_table(words[0], [words[1], "n"], [[words[2], "1"]], words[0], console)
    assert seen(out.getvalue())
    assert printable(words[2]).strip() in out.getvalue()


def test_brackets_are_no_markup_and_do_not_fail() -> None:
    out = io.StringIO()
    console = Console(file=out, width=100)
    print_table("[/b] a", ["[red]", "[/]"], [["[bold]x", "\\[y]"]], "[/i]", console)
    for word in ("[/b] a", "[red]", "[/]", "[bold]x", "\\[y]", "[/i]"):
        assert word in out.getvalue()


def _fine(run: Run, told: object) -> None:
    assert run.code == 0, (told, run.err)
    said = [line for line in run.err.split("\n") if "\r" not in line]  # transformers' bars
    for stream in (run.out, *said):
        stream.encode()
        assert seen(stream), (told, stream)


@pytest.mark.parametrize(
    "name",
    ["_$a$ [/b]%s{0}\\", "two\nlines\x1b[31m\x9b", "<script>alert(1)</script>'\"&amp;|: #",
     "naïve 模型 🙂\u202e", os.fsdecode(b"\xff\xfe")],
    ids=ascii,
)  # fmt: skip
def test_any_name_of_a_model_and_a_text(
    name: str, kvfold: Kvfold, llama_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    source, text, out = tmp_path / name, tmp_path / f"{name}.txt", tmp_path / f"out {name}"
    shutil.copytree(llama_folder, source)
    shutil.copyfile(text_file, text)
    if "\udcff" in name:  # transformers' tokenizers cannot open it
        run = kvfold("eval", source, "--text", text)
        assert (run.code, "not UTF-8" in run.err) == (2, True), run.err
        _fine(kvfold("inspect", source), name)
        _fine(kvfold("inspect", source, "--json"), name)
        return
    run = kvfold("convert", source, out, "--kv-heads", 2, "--fit", "none", "--calibration", text,
                 "--calibration-tokens", 1024, "--json")  # fmt: skip
    _fine(run, name)
    record: Any = run.json()
    assert record["source"]["name"] == str(source)
    assert json.loads((out / "kvfold.json").read_text(encoding="utf-8")) == record
    (out / "README.md").read_text(encoding="utf-8")
    options = ("--text", text, "--context", 32, "--max-tokens", 64)
    _fine(kvfold("eval", source, out, *options), name)
    rows: Any = kvfold("eval", source, out, *options, "--json").json()
    assert [row["name"] for row in rows] == [str(source), str(out)]
    _fine(kvfold("inspect", source), name)
    _fine(kvfold("plan", source, "--gpu", "h100"), name)
    html = tmp_path / f"{name}.html"
    _fine(kvfold("report", out, "-o", html), name)
    page = html.read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert seen(page)
    png = tmp_path / f"{name}.png"
    _fine(kvfold("look", source, "w3 w4 w5 w6", "--against", out, "--png", png), name)
    assert png.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", NASTY, ids=ascii)
def test_any_name_in_drawings(name: str) -> None:
    from kvfold.bench.results import Row
    from kvfold.bench.timing import Spread
    from kvfold.report.figures import decode_times, healing_curve

    rows = [{"step": s, "tokens": s * 10, "kl": 1.0, f"kl {name}": 0.5} for s in (1, 2)]
    curve = ElementTree.fromstring(healing_curve(rows))
    words = " ".join("".join(curve.itertext()).split())
    assert " ".join(printable(name).split()) in words
    case = {"model": name, "num_heads": 4, "num_kv_heads": 2, "context": 64, "batch": 1}
    row = Row("model", case, name, seconds=Spread.of([1.0, 2.0]), bytes=8, bandwidth=1e9)
    times = ElementTree.fromstring(decode_times([row]))
    assert " ".join(printable(name).split()) in " ".join("".join(times.itertext()).split())


def test_a_word_of_text_is_no_formula(kvfold: Kvfold, llama_folder: Path, tmp_path: Path) -> None:
    """The tokenizer's words label the axes of look."""
    import torch

    from kvfold.report.look import draw_layer
    from kvfold.report.maps import Seen

    words = [*NASTY[:4], "$$", "\\frac{$"]
    tensor = torch.randn(1, len(words), 4)
    seen_layer = Seen(tensor, tensor, None, 1.0, None)
    picture = draw_layer(0, ["$x^{$"], [seen_layer], words)
    assert picture.png.startswith(b"\x89PNG")


def test_progress_takes_brackets(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from kvfold.cli.progress import progress_bar

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress_bar() as progress:
        for name in NASTY:
            progress(f"evaluating on {name}", 1, 2, f"KL {name}")
