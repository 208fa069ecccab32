"""The benchmarks' pages: their tables say what was measured, their commands are accepted."""

import argparse
import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from kvfold.plan import evidence

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py"))
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *FOLDER.glob("*.md")]
}


def cells(line: str) -> int:
    r"""How many cells a line of a table has; ``\|`` and bars in code are text."""
    text = re.sub(r"`[^`]*`|\\\|", "", line.strip())
    return text.strip("|").count("|") + 1


def uneven(page: str) -> list[str]:
    """The lines of tables that have other cells than their table's first line."""
    text = re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL)
    tables = re.findall(r"(?:^\|.*(?:\n|\Z))+", text, flags=re.MULTILINE)
    return [
        line
        for table in tables
        for line in table.splitlines()
        if cells(line) != cells(table.splitlines()[0])
    ]


def test_a_short_row_is_found() -> None:
    page = "| a | b | c |\n| --- | --- | ---: |\n| 1 | `x|y` | 2 |\n| 1 | 2 |\n"
    assert uneven(page) == ["| 1 | 2 |"]


@pytest.mark.parametrize("page", PAGES)
def test_every_row_of_a_table_has_as_many_cells(page: str) -> None:
    assert uneven(PAGES[page]) == []


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module(name)


def test_tables_say_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = script("tables", monkeypatch)
    for page in tables.PAGES:
        text = page.read_text(encoding="utf-8")
        assert tables.filled(text) == text, f"run python benchmarks/tables.py: {page.name}"
    placed = [
        name for page in tables.PAGES for _, name, _ in tables.PLACE.findall(page.read_text())
    ]
    assert sorted(placed) == sorted(tables.TABLES)


def test_plans_tell_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers in ``kvfold.plan.evidence`` are those of the results."""
    results = script("pages.rows", monkeypatch).results
    healing = {(row["name"], row["text"]): row for row in results("healing", "name", "text")}
    for told, name in zip(evidence.FOLDED, ("converted", "finished", "healed"), strict=True):
        texts = (healing[name, f"{text}.txt"] for text in ("handbook", "documentation"))
        assert (told.similar, told.other) == tuple(round(row["nats_lost"], 2) for row in texts)
    selected = results("select_quality", "text", "page_size", "by", "budget")
    for budget, kl in evidence.SELECTED.items():
        asked = {"by": "spread", "page_size": 32, "budget": budget}
        rows = [row for row in selected if "text" in row and asked.items() <= row.items()]
        assert {row["text"] for row in rows} == {"handbook", "code"}
        assert kl == round(max(row["kl"] for row in rows), 4)
    evicted = results(
        "evict_quality", "text", "by", "budget", only=lambda row: row.get("model") == "smollm2"
    )
    for budget, kl in evidence.EVICTED.items():
        rows = [
            row
            for row in evicted
            if row.get("text") and (row["by"], row["budget"]) == ("attention", budget)
        ]
        assert {row["text"] for row in rows} == {"handbook", "code"}
        assert kl == round(max(row["kl"] for row in rows), 4)
    caches = results("cache_quality", "text", "cache")
    for name, said in evidence.CACHES.items():
        rows = [row for row in caches if row["cache"] == f"kvfold {name}"]
        kl, ratio = (max(row[score] for row in rows) for score in ("kl", "perplexity_ratio"))
        assert said in (f"KL {kl:.4f} nats per token", f"perplexity times {ratio:.3f}")


def commands(name: str) -> list[list[str]]:
    """The arguments of a script's commands on the page of results."""
    page = PAGES["benchmarks/README.md"].replace("\\\n", " ")
    found = re.findall(rf"python benchmarks/{name}\.py([^\n`#]*)", page)
    return [shlex.split(arguments) for arguments in found]


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_benchmark_has_a_command_that_it_accepts(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Accepted(Exception):
        """Stands for all the work."""

    honest = argparse.ArgumentParser.parse_args

    def parse(parser: argparse.ArgumentParser) -> None:
        honest(parser)
        raise Accepted

    module = script(name, monkeypatch)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    assert commands(name)
    for arguments in commands(name):
        monkeypatch.setattr("sys.argv", [f"{name}.py", *arguments])
        with pytest.raises(Accepted):
            module.main()
