"""What is taken up again: whole requests, on the same inputs."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvfold import convert, heal
from kvfold.checkpoint.places import working_folder
from kvfold.checkpoint.workspace import NEW, REQUEST
from kvfold.errors import InputError, RunError
from tests.conftest import Kvfold
from tests.toolbox import tiny
from tests.toolbox.runs import Stop, digests, rewrite, stop_at, stopped


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
