"""Whose a folder is: sources, texts and what carries no mark are never touched."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvfold import convert
from kvfold.checkpoint.places import check_out, working_folder
from kvfold.errors import InputError, RunError
from tests.toolbox.runs import stopped, tree


@pytest.mark.parametrize(
    ("source", "out"),
    [("m.old", "m"), ("m.partial", "m"), ("m.folded", "m"), (".m.kvfold-partial", "m")],
)
@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("there", [False, True])
def test_a_source_is_never_touched_whatever_it_is_called(
    source: str, out: str, force: bool, there: bool, llama_folder: Path, tmp_path: Path
) -> None:
    """It was removed where its name was one that the run worked under."""
    if there:
        convert(llama_folder, tmp_path / out, 3, calibrate=False)
    shutil.copytree(llama_folder, tmp_path / source)
    before = tree(tmp_path / source)
    try:
        convert(tmp_path / source, tmp_path / out, 2, calibrate=False, force=force)
        expected = {source, out}
    except InputError:
        expected = {source, out} if there else {source}
    assert {path.name for path in tmp_path.iterdir()} == expected
    assert tree(tmp_path / source) == before


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file", "link", "dangling link"])
@pytest.mark.parametrize("force", [False, True])
def test_what_carries_no_mark_is_left_alone(
    kind: str, force: bool, llama_folder: Path, tmp_path: Path
) -> None:
    aside, place = tmp_path / "aside", working_folder(tmp_path / "out")
    aside.mkdir()
    (aside / "thesis.txt").write_text("years of work")
    if kind == "folder":
        shutil.copytree(aside, place)
    elif kind == "empty folder":
        place.mkdir()
    elif kind == "file":
        place.write_text("years of work")
    else:
        place.symlink_to(aside if kind == "link" else tmp_path / "nowhere")
    before = tree(tmp_path)
    if kind == "empty folder":  # as a run leaves it that is killed in its first microseconds
        convert(llama_folder, tmp_path / "out", 2, calibrate=False, force=force)
        return
    with pytest.raises(InputError, match=r"in the way|cannot be made") as error:
        convert(llama_folder, tmp_path / "out", 2, calibrate=False, force=force)
    assert error.value.hint
    assert tree(tmp_path) == before


def test_a_folder_of_another_out_is_left_alone(llama_folder: Path, tmp_path: Path) -> None:
    stopped(llama_folder, tmp_path / "a")
    working_folder(tmp_path / "a").rename(working_folder(tmp_path / "b"))
    before = tree(tmp_path)
    each: list[dict[str, Any]] = [{"force": True}, {"resume": True}, {}]
    for options in each:
        with pytest.raises(InputError, match="a working folder for a, not for b"):
            convert(llama_folder, tmp_path / "b", 2, calibrate=False, **options)
    assert tree(tmp_path) == before


NAMES = ["a", "b", "a.old", "a.partial", "a.folded", ".a.kvfold-partial", "b.old"]


BELOW = ["", "out", "old", "x", "..", "../a", "../b"]


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(
    source=st.tuples(st.sampled_from(NAMES), st.sampled_from(BELOW)),
    out=st.tuples(st.sampled_from(NAMES), st.sampled_from(BELOW)),
    link=st.sampled_from([None, "source", "folder", "weights"]),
    force=st.booleans(),
    resume=st.booleans(),
    left=st.booleans(),
)
def test_whatever_the_names_nothing_but_out_changes(
    llama_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
    source: tuple[str, str],
    out: tuple[str, str],
    link: str | None,
    force: bool,
    resume: bool,
    left: bool,
) -> None:
    """Same, nested, through links and ``..``, with what an interrupted run left beside them."""
    root = tmp_path_factory.mktemp("names")
    there = root / source[0] / source[1]
    real = Path(os.path.normpath(there))
    if real == root or root not in real.parents:
        return
    shutil.copytree(llama_folder, real)
    (real.parent / source[0]).mkdir(exist_ok=True) if not there.exists() else None
    if left and not working_folder(root / "a").exists():
        stopped(llama_folder, root / "a", force=True) if not (root / "a").exists() else None
    given_source = there if there.exists() else real
    if link == "source":
        given_source = root / "link"
        given_source.symlink_to(real)
    elif link == "folder":
        (root / "parent").symlink_to(real.parent)
        given_source = root / "parent" / real.name
    elif link == "weights":
        weights = real / "model.safetensors"
        shutil.move(weights, real.parent / "weights")
        weights.symlink_to(real.parent / "weights")
    target = root / out[0] / out[1]
    place = Path(os.path.normpath(target))
    before = tree(root)
    code = 0
    try:
        convert(given_source, target, 2, calibrate=False, force=force, resume=resume)
    except (InputError, RunError) as error:
        code = error.exit_code
    after = tree(root)
    own = [str(path.relative_to(root)) for path in (place, working_folder(place))
           if root in path.parents]  # fmt: skip
    foreign = [
        name for name in before.keys() | after.keys()
        if before.get(name) != after.get(name)
        and not any(name == mine or name.startswith(f"{mine}/") for mine in own)
        and not any(mine.startswith(f"{name}/") for mine in own)
    ]  # fmt: skip
    assert not foreign
    inside_source = [name for name in before if name.startswith(f"{real.relative_to(root)}/")]
    assert all(after.get(name) == before[name] for name in inside_source)
    if code and root in place.parents and str(place.relative_to(root)) not in before:
        assert not place.exists()


def test_texts_and_linked_weights_are_sources_too(
    llama_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    convert(llama_folder, out, 3, calibrate=False)
    shutil.copy(text_file, out / "text.txt")
    linked = tmp_path / "linked"
    shutil.copytree(llama_folder, linked)
    (linked / "model.safetensors").unlink()
    (linked / "model.safetensors").symlink_to(out / "model.safetensors")
    before = tree(tmp_path)
    with pytest.raises(InputError, match="inside OUT"):
        convert(llama_folder, out, 2, calibration=[out / "text.txt"], force=True)
    with pytest.raises(InputError, match=r"links to .* inside OUT"):
        check_out(out, [linked], force=True)
    assert tree(tmp_path) == before


def test_links_and_files_are_not_replaced(llama_folder: Path, tmp_path: Path) -> None:
    convert(llama_folder, tmp_path / "older", 3, calibrate=False)
    (tmp_path / "link").symlink_to(tmp_path / "older")
    (tmp_path / "file").write_text("x")
    before = tree(tmp_path)
    for name in ("link", "file", "file/below"):
        with pytest.raises(InputError):
            convert(llama_folder, tmp_path / name, 2, calibrate=False, force=True)
    assert tree(tmp_path) == before
