"""What is replaced: OUT is the older or the newer one, whole, wherever a run is killed."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from kvfold import convert
from kvfold.checkpoint.places import working_folder
from kvfold.checkpoint.workspace import OLD, opened
from kvfold.errors import InputError, RunError
from tests.toolbox.runs import Stop, digests, stop_at


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
