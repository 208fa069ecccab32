"""Mutated files of an interrupted run: it is taken up, or one line says why not."""

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from kvfold import convert, heal
from kvfold.checkpoint.places import working_folder
from kvfold.checkpoint.workspace import Workspace
from kvfold.cli.main import main
from tests.conftest import Kvfold
from tests.toolbox import tiny
from tests.toolbox.damage import answered, damage, damaged
from tests.toolbox.runs import Stop

HEALING: dict[str, Any] = {
    "stages": ["kl"], "tokens": 1024, "batch_tokens": 256, "context": 64, "held_out_tokens": 128,
    "lr": 1e-2, "save_tokens": 256, "eval_tokens": 512, "eval_texts": [], "keep": 1,
}  # fmt: skip
How = tuple[str, Any, Any]
fixtures = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
unshrunk = [Phase.explicit, Phase.reuse, Phase.generate]  # each example is a run
slow: dict[str, Any] = {"deadline": None, "suppress_health_check": fixtures, "phases": unshrunk}
few = settings(max_examples=10, **slow)
fewer = settings(max_examples=5, **slow)


def stop_while_writing(label: str, done: int, total: int) -> None:
    if label == "writing":
        raise Stop


def stop_at_step_3(row: dict[str, Any]) -> None:
    if row["step"] == 3:
        raise Stop


class Interrupted:
    """A run that was killed, whose files can be damaged again and again.

    Attributes:
        folder: where it lies, with ``source``, ``text.txt`` and whatever else is nobody's.
        working: the working folder of ``out``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.out, self.working = folder / "out", working_folder(folder / "out")
        self._kept = folder / "kept"

    def keep(self) -> "Interrupted":
        shutil.copytree(self.working, self._kept)
        self.others = self._digests()
        return self

    def damaged(self, name: str, how: How) -> None:
        """The run as it was when it was killed, but for one file."""
        for made in (self.working, self.out):
            shutil.rmtree(made, ignore_errors=True)
        shutil.copytree(self._kept, self.working)
        path = self.working / name
        path.write_bytes(damaged(path.read_bytes(), how))

    def check(self, kvfold: Kvfold, *command: Any) -> None:
        """Resume it: OUT is made, or what there is stays for another try."""
        before = _tree(self.working)
        run = answered(kvfold, command)
        assert self.out.exists() == (run.code == 0), run.err
        if run.code == 2:
            assert _tree(self.working) >= before - {"out/README.md"}, run.err
        assert self._digests() == self.others

    def _digests(self) -> dict[str, str]:
        """Of everything that is not the run's."""
        mine = {self.working.name, self.out.name}
        return {
            str(path): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(self.folder.rglob("*"))
            if path.is_file() and path.relative_to(self.folder).parts[0] not in mine
        }


def _tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Source, folded and a text."""
    root = tmp_path_factory.mktemp("resume")
    model = tiny.make("llama", num_key_value_heads=6, num_hidden_layers=2)
    tiny.save_with_tokenizer(model, root / "source")
    convert(root / "source", root / "folded", 2, calibrate=False)
    (root / "text.txt").write_text("\n\n".join(tiny.words(300, seed) for seed in range(20)))
    return root


@pytest.fixture(scope="module")
def conversion(root: Path) -> Interrupted:
    run = Interrupted(root / "conversion")
    shutil.copytree(root / "source", run.folder / "source")
    with pytest.raises(Stop):
        convert(
            run.folder / "source", run.out, 2, calibrate=False, progress=stop_while_writing
        )  # fmt: skip
    return run.keep()


@pytest.fixture(scope="module")
def healing(root: Path) -> Interrupted:
    run = Interrupted(root / "healing")
    for name in ("source", "folded"):
        shutil.copytree(root / name, run.folder / name)
    shutil.copy(root / "text.txt", run.folder)
    texts = [run.folder / "text.txt"]
    with pytest.raises(Stop):
        heal(
            run.folder / "folded", run.out, run.folder / "source", texts,
            watch=stop_at_step_3, **HEALING,
        )  # fmt: skip
    return run.keep()


def heal_command(folder: Path) -> list[Any]:
    words: list[Any] = ["heal", folder / "folded", folder / "out", "--teacher", folder / "source"]
    words += ["--text", folder / "text.txt", "--stages", "kl", "--lr", "1e-2", "--keep", 1]
    for name in ("tokens", "batch_tokens", "context", "held_out_tokens", "save_tokens"):
        words += [f"--{name.replace('_', '-')}", HEALING[name]]
    return [*words, "--eval-tokens", 512, "--device", "cpu"]


@few
@given(
    name=st.sampled_from(["request.json", ".kvfold-working-folder", "layers/0.json"]), how=damage
)
def test_conversions(kvfold: Kvfold, conversion: Interrupted, name: str, how: How) -> None:
    conversion.damaged(name, how)
    source = conversion.folder / "source"
    options = ("--kv-heads", 2, "--no-calibration", "--resume")
    conversion.check(kvfold, "convert", source, conversion.out, *options)


@pytest.fixture(scope="module", params=["convert", "heal"])
def done(request: pytest.FixtureRequest, root: Path) -> tuple[Path, list[Any]]:
    """A run that was killed after OUT was made, and the command to resume it."""
    folder = root / f"done-{request.param}"
    for name in ("source", "folded"):
        shutil.copytree(root / name, folder / name)
    shutil.copy(root / "text.txt", folder)
    command = heal_command(folder)
    if request.param == "convert":
        options = ("--kv-heads", 2, "--no-calibration")
        command = ["convert", folder / "source", folder / "out", *options]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Workspace, "remove", _stopped)
        with pytest.raises(Stop):
            main([str(word) for word in command])
    shutil.copytree(working_folder(folder / "out"), folder / "kept")
    shutil.copy(folder / "out" / "kvfold.json", folder / "kvfold.json")
    return folder, command


@few
@given(how=damage)
def test_records_of_runs_that_were_done(
    kvfold: Kvfold, done: tuple[Path, list[Any]], how: How
) -> None:
    """Killed after OUT was made: ``--resume`` says what its record says."""
    folder, command = done
    working = working_folder(folder / "out")
    shutil.rmtree(working, ignore_errors=True)
    shutil.copytree(folder / "kept", working)
    record = (folder / "kvfold.json").read_bytes()
    (folder / "out" / "kvfold.json").write_bytes(damaged(record, how))
    before = _tree(folder / "out")
    run = answered(kvfold, (*command, "--resume"))
    assert "is there already" not in run.err
    assert _tree(folder / "out") == before


def _stopped(work: Workspace) -> None:
    raise Stop


@fewer
@given(
    name=st.sampled_from(["request.json", "checkpoints/step-00000003/state.json", "healing.jsonl"]),
    how=damage,
)
def test_healings(kvfold: Kvfold, healing: Interrupted, name: str, how: How) -> None:
    if name.endswith("jsonl") and how[0] == "value":
        how = ("flip", 0.3, 2)  # it is no single document
    healing.damaged(name, how)
    healing.check(kvfold, *heal_command(healing.folder), "--resume")


@fewer
@given(how=damage)
def test_records_of_what_is_healed(kvfold: Kvfold, root: Path, tmp_path: Path, how: How) -> None:
    """A record that cannot be read is told before training, not after."""
    if not (tmp_path / "folded").exists():
        for name in ("source", "folded"):
            shutil.copytree(root / name, tmp_path / name)
        shutil.copy(root / "text.txt", tmp_path)
    path = tmp_path / "folded" / "kvfold.json"
    path.write_bytes(damaged((root / "folded" / "kvfold.json").read_bytes(), how))
    try:
        run = answered(kvfold, (*heal_command(tmp_path),))
        assert run.code == 0 or not working_folder(tmp_path / "out").exists(), run.err
    finally:
        for made in (tmp_path / "out", working_folder(tmp_path / "out")):
            shutil.rmtree(made, ignore_errors=True)
