"""Working folders: whose they are, who holds them, what is replaced, what is taken up again."""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvfold import convert, heal
from kvfold.checkpoint.places import MARK, check_out, working_folder
from kvfold.checkpoint.workspace import NEW, OLD, REQUEST, opened
from kvfold.errors import InputError, RunError
from tests.conftest import Kvfold
from tests.fold.test_convert import digests
from tests.toolbox import tiny


def tree(folder: Path) -> dict[str, str]:
    """Everything below a folder: what it is, and its content."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        elif path.is_dir():
            found[name] = "folder"
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


class Stop(BaseException):
    """Stands for a kill."""


def stop_at(moment: str, number: int = 1) -> Callable[[str, int, int], None]:
    def progress(label: str, done: int, total: int) -> None:
        if (label, done) == (moment, number):
            raise Stop

    return progress


def stopped(source: Path, out: Path, moment: str = "writing", **options: Any) -> None:
    """A conversion that was killed."""
    with pytest.raises(Stop):
        convert(source, out, 2, calibrate=False, progress=stop_at(moment), **options)


# -- whose folder it is ----------------------------------------------------------------------


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


# -- who holds it ----------------------------------------------------------------------------

HOLDER = """
import sys
from pathlib import Path
from kvfold.checkpoint.workspace import opened
with opened(Path(sys.argv[1])) as work:
    work.start({})
    work.begin({})
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def held(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """Another process that is writing ``out``."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "out")],
        text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize("options", [[], ["--force"], ["--resume"], ["--force", "--resume"]])
@pytest.mark.parametrize("command", ["convert", "heal", "convert --heal", "demo"])
def test_a_second_run_to_the_same_out_is_told_at_once(
    command: str,
    options: list[str],
    held: "subprocess.Popen[str]",
    kvfold: Kvfold,
    llama_folder: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever its options, one line and a hint, before any work; the first goes on unharmed."""
    before = tree(tmp_path)
    monkeypatch.setattr("kvfold.fold.convert.take_prints", None)  # calling it would fail
    out: list[object] = [tmp_path / "out"]
    arguments: list[object] = {
        "convert": ["convert", llama_folder, *out, "--kv-heads", 2],
        "heal": ["heal", llama_folder, *out, "--teacher", llama_folder, "--text", text_file,
                 "--context", 64, "--tokens", 512],
        "convert --heal": ["convert", llama_folder, *out, "--kv-heads", 2, "--context", 64,
                           "--calibration", text_file, "--heal", 512],
        "demo": ["demo", "--out", *out],
    }[command]  # fmt: skip
    if command == "demo" and "--resume" in options:
        pytest.skip("demo has nothing to resume")
    run = kvfold(*arguments, *options)
    assert run.code == 2, run.err
    assert run.err.splitlines()[0] == f"error: another run of kvfold is writing {out[0]}"
    assert run.err.splitlines()[1].startswith("hint: ")
    assert len(run.err.splitlines()) == 2
    assert tree(tmp_path) == before


def test_the_lock_ends_with_its_run_however_that_ends(
    held: "subprocess.Popen[str]", llama_folder: Path, tmp_path: Path
) -> None:
    held.kill()
    held.wait()
    convert(llama_folder, tmp_path / "out", 2, calibrate=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_lock_that_was_just_removed_does_not_count(tmp_path: Path) -> None:
    """The mark may vanish between its opening and its locking: then it locks nothing."""
    real = fcntl.flock
    seen: list[int] = []

    def meanwhile(file: int, how: int) -> None:
        if not seen:
            seen.append(1)
            shutil.rmtree(working_folder(tmp_path / "out"))
        real(file, how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcntl, "flock", meanwhile)
        with opened(tmp_path / "out") as work:
            assert (work.folder / MARK).is_file()
            with pytest.raises(InputError, match="another run"):
                opened(tmp_path / "out").__enter__()
    assert not list(tmp_path.iterdir())


def test_two_runs_never_mix(llama_folder: Path, tmp_path: Path) -> None:
    """Started together, with different requests: OUT is one of them, byte by byte."""
    for heads in (1, 2):
        convert(llama_folder, tmp_path / f"{heads}", heads, calibrate=False)
    command = [sys.executable, "-m", "kvfold", "convert", str(llama_folder), str(tmp_path / "out")]
    command += ["--no-calibration", "--force", "--kv-heads"]
    runs = [
        subprocess.Popen([*command, str(heads)], stderr=subprocess.PIPE, text=True)
        for heads in (1, 2, 1, 2)
    ]
    errors = [run.communicate(timeout=120)[1] for run in runs]
    codes = [run.returncode for run in runs]
    assert 0 in codes
    for code, error in zip(codes, errors, strict=True):
        assert code in (0, 2), error
        assert code == 0 or "another run of kvfold is writing" in error
    assert digests(tmp_path / "out") in [digests(tmp_path / f"{heads}") for heads in (1, 2)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "out"]


# -- what is replaced ------------------------------------------------------------------------


def made(out: Path, text: str) -> Path:
    """An older OUT."""
    out.mkdir()
    (out / "config.json").write_text(text)
    return out


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_an_exchange_killed_between_two_renames_is_recovered(
    renames: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OUT is the older or the newer one, whole; at worst --resume puts it back."""
    out = made(tmp_path / "out", "older")
    counted: list[Path] = []
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        counted.append(self)
        if len(counted) > renames:
            raise Stop
        return real(self, target)

    def run(**options: Any) -> None:
        with opened(out) as work:
            if not work.start({"a": 1}, force=True, **options):
                work.begin({"a": 1})
                (work.new / "config.json").write_text("newer")
            if not work.finished:
                work.publish()

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        patch.setattr("kvfold.checkpoint.workspace.Workspace.remove", stop_at("", 0))
        with pytest.raises((Stop, TypeError)):
            run()
    assert out.exists() == (renames != 1)
    run(resume=True)
    assert (out / "config.json").read_text() == "newer"
    assert list(tmp_path.iterdir()) == [out]


def test_another_run_puts_back_what_a_killed_one_moved_aside(tmp_path: Path) -> None:
    out = made(tmp_path / "out", "older")
    with opened(out) as work:
        work.start({}, force=True)
        work.begin({})
        (work.new / "config.json").write_text("newer")
        out.rename(work.folder / OLD)  # and here it is killed
    with opened(out) as work, pytest.raises(InputError, match="left from an interrupted run"):
        work.start({"other": 1})
    assert (out / "config.json").read_text() == "older"
    assert not (working_folder(out) / OLD).exists()


def test_what_appears_at_out_meanwhile_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def run(**options: Any) -> None:
        with opened(out) as work:
            if not work.start({}, **options):
                work.begin({})
                (work.new / "config.json").write_text("ours")
            made(out, "theirs") if not options else None
            work.publish()

    with pytest.raises(RunError, match="made by something else meanwhile"):
        run()
    assert (out / "config.json").read_text() == "theirs"
    shutil.rmtree(out)
    run(resume=True)
    assert (out / "config.json").read_text() == "ours"


def test_a_run_killed_in_its_last_clean_up_has_nothing_left_to_do(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    convert(llama_folder, out, 3, calibrate=False)

    def killed(self: Any) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr("kvfold.checkpoint.workspace.Workspace.remove", killed)
        patch.setattr(
            "kvfold.checkpoint.workspace.Workspace.close", lambda self: os.close(self._lock)
        )
        with pytest.raises(Stop):
            convert(llama_folder, out, 2, calibrate=False, force=True)
    before = digests(out)
    assert working_folder(out).exists()
    each: list[dict[str, Any]] = [{"resume": True}, {"resume": True, "force": True}]
    for options in each:
        left = tmp_path / "left"
        shutil.copytree(working_folder(out), left)
        record = convert(llama_folder, out, 2, calibrate=False, **options)
        assert record["geometry"]["num_kv_heads"]["folded"] == 2
        assert digests(out) == before
        assert not working_folder(out).exists()
        left.rename(working_folder(out))
    with pytest.raises(InputError, match="exists already"):
        convert(llama_folder, out, 2, calibrate=False)


# -- what is taken up ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", "\0", "[" * 5000, '{"inputs": 3, "folder": 1}',
     '{"inputs": {"the source": 3}, "folder": 1}',
     '{"inputs": {"the source": {"a": {"size": "1"}}}, "folder": 1}'],
)  # fmt: skip
def test_a_damaged_request_is_told(content: str, llama_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stopped(llama_folder, out)
    (working_folder(out) / REQUEST).write_text(content)
    with pytest.raises(InputError, match="is damaged") as error:
        convert(llama_folder, out, 2, calibrate=False, resume=True)
    assert "--force" in error.value.hint
    with pytest.raises(InputError, match="interrupted run"):
        convert(llama_folder, out, 2, calibrate=False)
    convert(llama_folder, out, 2, calibrate=False, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_resume_is_promised_only_when_there_is_something_to_resume(
    kvfold: Kvfold, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["convert", llama_folder, tmp_path / "out", "--kv-heads", 2, "--no-calibration"]

    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    for name, promised in (("open_checkpoint", False), ("_verify", False), ("plan_shards", True)):
        with monkeypatch.context() as patch:
            patch.setattr(f"kvfold.fold.convert.{name}", interrupt)
            run = kvfold(*command)
        assert run.code == 130
        assert ("--resume" in run.err) == promised, name
        assert working_folder(tmp_path / "out").exists() == promised
    assert kvfold(*command, "--resume").code == 0


def rewrite(path: Path) -> None:
    """Other content of the same size and times."""
    found = path.stat()
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def copied(path: Path) -> None:
    """The same content in another file, made at another time."""
    copy = path.with_name(path.name + ".copy")
    shutil.copyfile(path, copy)
    copy.replace(path)


@pytest.mark.parametrize("what", ["model.safetensors", "tokenizer.json", "text.txt"])
@pytest.mark.parametrize("how", [rewrite, copied, Path.touch, Path.unlink])
def test_changed_inputs_are_not_mixed_with_old_work(
    what: str,
    how: Callable[[Path], None],
    llama_folder: Path,
    text_file: Path,
    tmp_path: Path,
) -> None:
    source, out, text = tmp_path / "source", tmp_path / "out", tmp_path / "text.txt"
    shutil.copytree(llama_folder, source)
    shutil.copy(text_file, text)
    options: dict[str, Any] = {
        "fit": "none", "calibration": [text], "calibration_tokens": 1024, "context": 64
    }  # fmt: skip
    with pytest.raises(Stop):
        convert(source, out, 2, progress=stop_at("folding layers"), **options)
    how(text if what == "text.txt" else source / what)
    if how in (rewrite, Path.unlink):
        with pytest.raises(InputError) as error:
            convert(source, out, 2, resume=True, **options)
        assert what.split(".")[0] in error.value.message
        assert not out.exists()
        return
    convert(source, out, 2, resume=True, **options)
    convert(source, tmp_path / "whole", 2, **options)
    assert digests(out) == digests(tmp_path / "whole")


@pytest.mark.parametrize("what", ["folded", "teacher", "text.txt", "eval.txt"])
def test_healing_is_not_resumed_on_other_inputs(
    what: str, llama_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(llama_folder, tmp_path / "teacher")
    convert(tmp_path / "teacher", tmp_path / "folded", 1, calibrate=False)
    for name in ("text.txt", "eval.txt"):
        (tmp_path / name).write_text("\n\n".join(tiny.words(300, seed) for seed in range(20)))
    options: dict[str, Any] = {
        "stages": ["kl"], "tokens": 1024, "batch_tokens": 256, "context": 64, "save_tokens": 256,
        "held_out_tokens": 128, "eval_texts": [tmp_path / "eval.txt"],
    }  # fmt: skip

    def run(**more: Any) -> None:
        folded, out, teacher = (tmp_path / name for name in ("folded", "out", "teacher"))
        heal(folded, out, teacher, [tmp_path / "text.txt"], **options, **more)

    def stop(row: dict[str, Any]) -> None:
        if row["step"] == 2:
            raise Stop

    with pytest.raises(Stop):
        run(watch=stop)
    path = tmp_path / what
    rewrite(path if path.is_file() else path / "model.safetensors")
    with pytest.raises(InputError, match=r"cannot resume: .* has other content now"):
        run(resume=True)
    rewrite(path if path.is_file() else path / "model.safetensors")
    run(resume=True)


def test_what_changes_while_it_is_read_is_not_published(llama_folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(llama_folder, source)

    def progress(label: str, done: int, total: int) -> None:
        if label == "writing":
            rewrite(source / "model.safetensors")

    with pytest.raises(RunError, match="changed while it was read"):
        convert(source, tmp_path / "out", 2, calibrate=False, progress=progress)
    assert not (tmp_path / "out").exists()


def test_the_request_is_whole(llama_folder: Path, tmp_path: Path) -> None:
    stopped(llama_folder, tmp_path / "out")
    request = json.loads((working_folder(tmp_path / "out") / REQUEST).read_text())
    prints = request["inputs"]["the source"]
    weights = hashlib.sha256((llama_folder / "model.safetensors").read_bytes()).hexdigest()
    assert prints["model.safetensors"]["sha256"] == weights
    assert {"config.json", "tokenizer.json"} < prints.keys()
    assert (working_folder(tmp_path / "out") / NEW).is_dir()
