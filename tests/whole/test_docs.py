"""What the documentation shows, works: docstrings' examples, code blocks, commands."""

import ast
import doctest
import importlib
import pkgutil
import re
import runpy
from pathlib import Path

import click
import pytest

import kvfold
from kvfold.cli.main import cli

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "benchmarks").glob("*.md")),
]
MODULES = [
    module.name
    for module in pkgutil.walk_packages(kvfold.__path__, "kvfold.")
    if not module.name.endswith("__main__") and "libkvfold" not in module.name
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name: str) -> None:
    if "triton" in name:
        pytest.importorskip("triton")
    if name == "kvfold.vllm.backend":  # classes of vLLM's, for it to import
        pytest.importorskip("vllm")
    module = importlib.import_module(name)
    failed, _ = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert failed == 0


def blocks(page: Path, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [block for kind, block in found if kind == language]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_blocks_are_python_and_name_what_there_is(page: Path) -> None:
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kvfold"):
                module = importlib.import_module(str(node.module))
                assert all(hasattr(module, alias.name) for alias in node.names)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert node.value.id != "kvfold" or hasattr(kvfold, node.attr), node.attr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_their_options_exist(page: Path) -> None:
    context = click.Context(cli)
    for block in blocks(page, ""):
        whole = block.replace("\\\n", " ")
        for line in re.findall(r"^(?:.* )?kvfold [a-z].*", whole, re.MULTILINE):
            words = line.split("#")[0].split("kvfold ")[-1].split()
            command = cli.get_command(context, words[0])
            assert command is not None, line
            if isinstance(command, click.Group):
                command = command.get_command(context, words[1])
                assert command is not None, line
            known = {option for p in command.params for option in p.opts}
            for word in words:
                if word.startswith("--") and "…" not in word:
                    assert word.split("=")[0] in known | {"--json", "--help", "--debug"}, line


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_examples_run(example: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(example), run_name="__main__")
    assert len(capsys.readouterr().out.splitlines()) >= 3


def test_files_that_contributing_names_exist() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w./-]+(?:/|\.(?:py|h|cpp|md|txt)))`", page)
    assert len(named) > 10
    above = (ROOT, ROOT / "src" / "kvfold")
    assert [name for name in named if not any((folder / name).exists() for folder in above)] == []
