"""Healing resumes bit for bit, and stops safely."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kvfold import heal
from kvfold.checkpoint.places import working_folder
from kvfold.errors import InputError, RunError
from kvfold.files import write_json
from kvfold.healing import saves
from kvfold.healing.loop import Distillation
from kvfold.healing.watch import Guard
from tests.toolbox.healing_cases import OPTIONS, same, untimed


@pytest.mark.parametrize("kind", ["interrupted", "killed"])
def test_a_resumed_run_equals_one_without_interruption(
    kind: str, healed: Path, source: Path, folded: Path, text: Path, tmp_path: Path
) -> None:
    """Bit by bit, metrics too: whether it could save at the end or not."""
    out = tmp_path / "out"

    class Killed(BaseException):
        pass

    def stop(row: dict[str, Any]) -> None:
        if row["step"] == 5:
            if kind == "killed":
                raise Killed
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Killed if kind == "killed" else KeyboardInterrupt):
        heal(folded, out, source, [text], watch=stop, **OPTIONS)
    assert not out.exists()
    kept = saves.saved(working_folder(tmp_path / "out") / "checkpoints")
    assert kept[-1].name == ("step-00000004" if kind == "killed" else "step-00000006")
    assert len(kept) == 2
    heal(folded, out, source, [text], resume=True, **OPTIONS)
    assert same(out, healed)
    assert untimed(out) == untimed(healed)


@pytest.mark.parametrize("moment", ["after the checkpoint", "after the scores", "by Ctrl-C"])
@pytest.mark.parametrize("step", [2, 4, 8])
def test_no_step_is_missing_from_the_metrics(
    moment: str, step: int, healed: Path, source: Path, folded: Path, text: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Wherever a step's checkpoint, its evaluation and its line are torn apart."""
    out = tmp_path / "out"

    class Killed(BaseException):
        pass

    def ended(name: str) -> Callable[..., Any]:
        honest = getattr(Distillation, name)

        def once(self: Distillation, *arguments: Any) -> Any:
            result = honest(self, *arguments)
            if self.step == step:
                raise Killed
            return result

        return once

    def stop(row: dict[str, Any]) -> None:
        if row["step"] == step - 1 and moment == "by Ctrl-C":
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        if moment != "by Ctrl-C":
            name = "save" if moment == "after the checkpoint" or step == 2 else "evaluate"
            patch.setattr(Distillation, name, ended(name))
        with pytest.raises((Killed, KeyboardInterrupt)):
            heal(folded, out, source, [text], watch=stop, **OPTIONS)
    heal(folded, out, source, [text], resume=True, **OPTIONS)
    assert untimed(out) == untimed(healed)
    assert same(out, healed)


def test_a_loss_that_is_no_number_stops_with_the_last_checkpoint(
    source: Path, folded: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Distillation.backward

    def poisoned(self: Distillation, batch: Any) -> tuple[float, float]:
        loss, kl = honest(self, batch)
        return (float("nan") if self.step == 5 else loss), kl

    with monkeypatch.context() as patch:
        patch.setattr(Distillation, "backward", poisoned)
        with pytest.raises(RunError, match="diverged at step 6: loss nan") as error:
            heal(folded, tmp_path / "out", source, [text], **OPTIONS)
    assert "step-00000004" in error.value.hint
    # The hint is right: the run goes on from there, at a lower rate.
    record = heal(folded, tmp_path / "out", source, [text], resume=True, **{**OPTIONS, "lr": 1e-3})
    assert record["heal"]["request"]["lr"] == 1e-3


def test_the_guard_tells_divergence_from_noise() -> None:
    guard = Guard()
    for step in range(200):  # a hard batch now and then is no divergence
        guard.check(step, 1.0 if step % 5 else 8.0, 1.0, "")
    for step in range(200, 207):
        guard.check(step, 4.0, 1.0, "")
    with pytest.raises(RunError, match="above 3 times its median 1"):
        guard.check(207, 4.0, 1.0, "")
    with pytest.raises(RunError, match="gradient norm inf"):
        Guard().check(1, 1.0, float("inf"), "")


def test_a_damaged_checkpoint_is_never_taken_for_a_whole_one(
    source: Path, folded: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save that fails midway leaves the one before."""
    saved: list[Path] = []

    def fail(path: Path, value: Any) -> None:
        saved.append(path)
        if len(saved) == 2:
            raise OSError(28, "No space left on device")
        write_json(path, value)

    with monkeypatch.context() as patch:
        patch.setattr("kvfold.healing.saves.write_json", fail)
        with pytest.raises(RunError, match="disk is full"):
            heal(folded, tmp_path / "out", source, [text], **OPTIONS)
    kept = saves.saved(working_folder(tmp_path / "out") / "checkpoints")
    assert [path.name for path in kept] == ["step-00000002"]
    heal(folded, tmp_path / "out", source, [text], resume=True, **OPTIONS)


def test_a_run_of_other_processes_or_another_request_is_not_resumed(
    source: Path, folded: Path, text: Path, tmp_path: Path
) -> None:
    class Stopped(Exception):
        pass

    def stop(row: dict[str, Any]) -> None:
        if row["step"] == 3:
            raise Stopped

    out = tmp_path / "out"
    with pytest.raises(Stopped):
        heal(folded, out, source, [text], watch=stop, **OPTIONS)
    with pytest.raises(InputError, match="is left from an interrupted run"):
        heal(folded, out, source, [text], **OPTIONS)
    with pytest.raises(InputError, match=r"cannot resume it \(seed: 0 then, 1 now\)"):
        heal(folded, out, source, [text], resume=True, seed=1, **OPTIONS)
    (kept,) = saves.saved(working_folder(tmp_path / "out") / "checkpoints")
    state = json.loads((kept / "state.json").read_text())
    (kept / "state.json").write_text(json.dumps({**state, "processes": 2}))
    with pytest.raises(InputError, match="saved by 2 processes; there are 1 now"):
        heal(folded, out, source, [text], resume=True, **OPTIONS)


def test_out_of_memory_says_what_to_lower(
    source: Path, folded: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def starve(self: Distillation, batch: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Distillation, "backward", starve)
    with pytest.raises(RunError, match="out of memory") as error:
        heal(folded, tmp_path / "out", source, [text], **OPTIONS)
    assert "--micro-batch" in error.value.hint
