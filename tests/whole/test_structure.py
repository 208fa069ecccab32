"""How the house is built: imports go one way, tests stand as the source does."""

from collections.abc import Iterator
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ROOT / "src" / "kvfold"
TESTS = ROOT / "tests"
NO_ROOM = {"whole", "toolbox"}  # what is about the whole package, and what tests share


def test_rooms_import_one_way() -> None:
    from importlinter.cli import lint_imports

    assert lint_imports(config_filename=str(ROOT / "pyproject.toml")) == 0


def circles(imports: dict[str, set[str]]) -> Iterator[set[str]]:
    """Modules that import each other, whichever way round."""
    reached: dict[str, set[str]] = {}
    for module in imports:
        found, waiting = set[str](), [module]
        while waiting:
            new = imports[waiting.pop()] - found
            found |= new
            waiting += new
        reached[module] = found
    for module, found in reached.items():
        circle = {other for other in found if module in reached[other]}
        if circle and module == min(circle):
            yield circle


def test_circles_are_found() -> None:
    imports = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set[str](), "e": {"a"}}
    assert list(circles(imports)) == [{"b", "c"}]


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Imports for types alone count, and those within functions."""
    graph = grimp.build_graph("kvfold", exclude_type_checking_imports=False, cache_dir=None)
    imports = {name: set(graph.find_modules_directly_imported_by(name)) for name in graph.modules}
    assert len(imports) > 100
    assert list(circles(imports)) == []


@pytest.mark.parametrize(
    "folder",
    sorted(path for path in TESTS.iterdir() if any(path.glob("test_*.py"))),
    ids=lambda path: path.name,
)
def test_tests_stand_as_the_source_does(folder: Path) -> None:
    """Every folder of tests is a room's; what stands beside the rooms is tested beside them."""
    if folder.name not in NO_ROOM:
        assert (ROOMS / folder.name / "__init__.py").is_file()
    assert (folder / "__init__.py").is_file()


def test_every_room_is_tested() -> None:
    rooms = {path.parent.name for path in ROOMS.glob("*/__init__.py")}
    assert rooms - {path.name for path in TESTS.iterdir()} <= set()


def test_modules_beside_the_rooms_are_tested_beside_them() -> None:
    for path in TESTS.glob("test_*.py"):
        assert (ROOMS / path.name.removeprefix("test_")).is_file(), path.name


def test_tests_take_from_the_toolbox_and_not_from_each_other() -> None:
    for path in TESTS.rglob("*.py"):
        for line in path.read_text(encoding="utf-8").splitlines():
            assert not (line.startswith("from tests.") and ".test_" in line), f"{path}: {line}"
