"""docs/architecture.md: every name in it exists, and its ways are twenty lines."""

import importlib
import re
from functools import reduce
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "kvfold"
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
WAYS = ("One decode step", "One tensor, from shard to shard")
PYTHON = sorted(
    set(re.findall(r"`([a-z_]+(?:\.[A-Za-z_]\w*)+)`", "".join(SECTIONS[way] for way in WAYS)))
)
CPP = sorted(set(re.findall(r"`([a-z_\d/]+\.(?:h|cpp)):(\w+)`", PAGE)))


def exists(name: str) -> bool:
    """Whether ``room.module.name.name`` is there."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            module = importlib.import_module(".".join(["kvfold", *parts[:end]]))
        except ModuleNotFoundError:
            continue
        try:
            reduce(getattr, parts[end:], module)
        except AttributeError:
            continue
        return True
    return False


def defines(text: str, name: str) -> bool:
    """Whether C++ defines a function: its name and arguments, and then a body."""
    return re.search(rf"\b{name}\([^;{{}}]*\)\s*(?:const\s*)?{{", text) is not None


@pytest.mark.parametrize("name", PYTHON)
def test_names_exist(name: str) -> None:
    assert exists(name)


@pytest.mark.parametrize(("file", "name"), CPP, ids=map(":".join, CPP))
def test_functions_of_the_kernels_exist(file: str, name: str) -> None:
    found = list((SOURCE / "kernels" / "cpu").rglob(file))
    assert found, file
    assert defines(found[0].read_text(encoding="utf-8"), name)


def test_what_does_not_exist_is_found() -> None:
    assert not exists("cache.kv.KVCache.attends")
    assert not exists("cache.kvs.KVCache")
    assert not defines("attend(call);", "attend")


@pytest.mark.parametrize("title", WAYS)
def test_a_way_is_twenty_lines_and_names_where_it_is(title: str) -> None:
    lines = re.findall(r"^\d+\. (.*(?:\n +.*)*)", SECTIONS[title], re.MULTILINE)
    assert 10 <= len(lines) <= 20
    for line in lines:
        assert re.search(r"`[\w./]+(?:\.|:)\w+`", line), line


def test_every_room_has_its_line() -> None:
    table = re.findall(r"^\| (`.*?) \|", SECTIONS["Rooms"], re.MULTILINE)
    named = re.findall(r"`(\w+)`", " ".join(table))
    assert sorted(named) == sorted(path.parent.name for path in SOURCE.glob("*/__init__.py"))
    files = re.findall(r"`(\w+)\.py`", SECTIONS["Rooms"])
    there = {path.stem for path in SOURCE.glob("*.py")} - {"__init__", "__main__"}
    assert set(files) == there
