"""Healing end to end: it heals, resumes bit for bit, and stops safely."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from kvfold import convert, heal
from kvfold.checkpoint.places import working_folder
from kvfold.checkpoint.workspace import Workspace
from kvfold.errors import InputError, RunError
from kvfold.files import write_json
from kvfold.healing import saves
from kvfold.healing.loop import Distillation, rate_factor
from kvfold.healing.watch import Guard, read_metrics
from tests.conftest import Kvfold
from tests.toolbox import tiny

OPTIONS: dict[str, Any] = {
    "stages": ["kl"],
    "tokens": 2048,
    "batch_tokens": 256,
    "context": 64,
    "held_out_tokens": 128,
    "lr": 1e-2,
    "save_tokens": 512,
    "eval_tokens": 1024,
    "eval_texts": [],
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny.make("llama", num_key_value_heads=6)
    return tiny.save_with_tokenizer(model, tmp_path_factory.mktemp("heal") / "source")


@pytest.fixture(scope="module")
def folded(source: Path) -> Path:
    convert(source, source.parent / "folded", 1, calibrate=False)
    return source.parent / "folded"


@pytest.fixture(scope="module")
def text(source: Path) -> Path:
    path = source.parent / "text.txt"
    path.write_text("\n\n".join(tiny.words(300, seed) for seed in range(40)))
    return path


@pytest.fixture(scope="module")
def healed(source: Path, folded: Path, text: Path) -> Path:
    """An uninterrupted run."""
    heal(folded, source.parent / "healed", source, [text], **OPTIONS)
    return source.parent / "healed"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(a: Path, b: Path) -> bool:
    left, right = weights(a), weights(b)
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def test_healing_brings_the_folded_model_nearer_to_its_source(healed: Path) -> None:
    record = json.loads((healed / "kvfold.json").read_text())
    quality = {row["name"]: row for row in record["heal"]["quality"]}
    before, after = quality["folded"], quality["healed"]
    assert after["kl"] < 0.9 * before["kl"]
    rows = read_metrics(healed / "healing.jsonl")
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 9))
    assert [row["tokens"] for row in steps] == [256 * n for n in range(1, 9)]
    assert all(0 <= row["overhead"] < 1 and row["tokens_per_second"] > 0 for row in steps)
    # What is reported on the way is what is measured at the end.
    assert rows[-1]["kl held-out"] == pytest.approx(after["kl"], rel=1e-3)


def test_the_result_is_an_ordinary_checkpoint(healed: Path, folded: Path) -> None:
    assert (healed / "config.json").read_bytes() == (folded / "config.json").read_bytes()
    assert not working_folder(healed).exists()
    names = {path.name for path in folded.iterdir()} | {"healing.jsonl"}
    assert {path.name for path in healed.iterdir()} == names
    model = AutoModelForCausalLM.from_pretrained(healed)
    assert model.config.num_key_value_heads == 1
    assert "healed" in (healed / "README.md").read_text()


def test_only_attention_is_trained_unless_asked(
    healed: Path, folded: Path, source: Path, text: Path, tmp_path: Path
) -> None:
    def changed(folder: Path) -> set[str]:
        before, after = weights(folded), weights(folder)
        return {name for name in before if not torch.equal(before[name], after[name])}

    assert all("self_attn" in name for name in changed(healed))
    heal(folded, tmp_path / "all", source, [text], **{**OPTIONS, "train": "all"})
    assert changed(tmp_path / "all") == set(weights(folded))


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


def untimed(folder: Path) -> list[dict[str, Any]]:
    """The metrics, without what two runs may differ in."""
    timing = {"tokens_per_second", "overhead"}
    rows = read_metrics(folder / "healing.jsonl")
    return [{name: row[name] for name in row if name not in timing} for row in rows]


def test_micro_batches_add_up(source: Path, folded: Path, text: Path, tmp_path: Path) -> None:
    losses = []
    for size in (1, 4):
        out = tmp_path / str(size)
        heal(folded, out, source, [text], **{**OPTIONS, "micro_batch": size})
        losses.append([r["loss"] for r in read_metrics(out / "healing.jsonl") if "loss" in r])
    # The same sums in another order; Adam's first steps magnify rounding to parts in 1e4.
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-5)


def test_the_local_stage_fits_layers_and_is_taken_up(
    source: Path, folded: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**OPTIONS, "stages": ["local", "kl"], "local_tokens": 1024}

    class Stopped(Exception):
        pass

    def stop(row: dict[str, Any]) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        heal(folded, tmp_path / "out", source, [text], watch=stop, **options)
    monkeypatch.setattr("kvfold.healing.local.CalibratedFolder", None)  # calling it would fail
    record = heal(folded, tmp_path / "out", source, [text], resume=True, **options)
    stages = record["heal"]["local"]["summary"]
    assert stages["fit_attention"]["error_after"] < stages["fit_attention"]["error_before"]
    assert [layer["layer"] for layer in record["heal"]["local"]["layers"]] == [0, 1]


def test_the_local_stage_alone_keeps_what_it_fitted(
    source: Path, folded: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = {**OPTIONS, "stages": ["local"], "local_tokens": 1024}
    record = heal(folded, out, source, [text], **options)
    before, after = (r for r in record["heal"]["quality"] if r["name"] != "source")
    assert after["kl"] < before["kl"]
    assert not (out / "healing.jsonl").exists()


def test_stages_by_default_follow_the_folds_record(
    source: Path, folded: Path, text: Path, tmp_path: Path
) -> None:
    from kvfold.healing.request import make_heal_request

    assert make_heal_request(folded, source, [text]).stages == ("local", "kl")
    fitted = tmp_path / "fitted"
    shutil.copytree(folded, fitted)
    (fitted / "kvfold.json").write_text('{"fit": "local"}')
    assert make_heal_request(fitted, source, [text]).stages == ("kl",)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden": 0.1},
        {"temperature": 2.0, "cross_entropy": 0.3},
        {"gradient_checkpointing": True},
        {"dtype": "bfloat16"},
        {"clip": 0.0, "warm_up": 0.0},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_setting_heals(
    changes: dict[str, Any], source: Path, folded: Path, text: Path, tmp_path: Path
) -> None:
    record = heal(folded, tmp_path / "out", source, [text], **{**OPTIONS, **changes})
    before, after = (r for r in record["heal"]["quality"] if r["name"] != "source")
    assert after["kl"] < before["kl"]


def test_gradient_checkpointing_changes_no_bit(
    healed: Path, source: Path, folded: Path, text: Path, tmp_path: Path
) -> None:
    heal(folded, tmp_path / "out", source, [text], **OPTIONS, gradient_checkpointing=True)
    assert same(tmp_path / "out", healed)


def test_lora_is_merged(source: Path, folded: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    options = {**OPTIONS, "lora_rank": 4}
    record = heal(folded, tmp_path / "out", source, [text], **options)
    before, after = (r for r in record["heal"]["quality"] if r["name"] != "source")
    assert after["kl"] < before["kl"]
    old, new = weights(folded), weights(tmp_path / "out")
    assert old.keys() == new.keys()
    # Apart from balancing, what was added to q has the rank of LoRA.
    name = "model.layers.0.self_attn.q_proj.weight"
    rows = old[name].shape[0]
    scale = (new[name] * old[name]).sum() / old[name].square().sum()
    power = 2.0 ** torch.log2(scale).round()
    assert torch.linalg.matrix_rank(new[name] - power * old[name], rtol=1e-4) <= 4 < rows


# -- stopping -------------------------------------------------------------------------------


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


def test_the_rate_rises_then_falls_to_nothing() -> None:
    rates = [rate_factor(step, 100, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert all(a > b for a, b in pairwise(rates[9:]))
    assert 0 < rates[-1] < 1e-3


# -- bad input ------------------------------------------------------------------------------


def complaint(kvfold: Kvfold, *arguments: object) -> str:
    """The one line and the hint of a refused command."""
    run = kvfold("heal", *arguments)
    assert run.code == 2, run.err
    assert run.out == ""
    lines = run.err.strip().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("error: ")
    assert lines[1].startswith("hint: ")
    return run.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stages", "kl,sleep"], "known: local, kl"),
        (["--context", 8], "--context 8: expected a whole number, at least 16"),
        (["--context", 4096], "longer than the model's 128 positions"),
        (["--tokens", "many"], "expected a whole number"),
        (["--lr", -1], "--lr -1: expected a number, at least 0, at most 1"),
        (["--temperature", 0], "--temperature 0: expected"),
        (["--lora-rank", 4, "--train", "all"], "attention only"),
        (["--text", "nowhere.txt"], "no such text: nowhere.txt"),
        (["--text", "TEXT=0"], "weight above 0"),
        (["--resume"], "nothing to resume"),
    ],
)
def test_bad_options(
    options: list[object],
    message: str,
    kvfold: Kvfold,
    source: Path,
    folded: Path,
    text: Path,
    tmp_path: Path,
) -> None:
    arguments = [folded, tmp_path / "out", "--teacher", source, "--text", text, *options]
    assert message in complaint(kvfold, *arguments)
    assert not list(tmp_path.iterdir())


def test_bad_pairs(kvfold: Kvfold, source: Path, folded: Path, text: Path, tmp_path: Path) -> None:
    def refused(teacher: Any, name: str) -> str:
        folder = tiny.save_with_tokenizer(teacher, tmp_path / name)
        out = tmp_path / "out"
        return complaint(kvfold, folded, out, "--teacher", folder, "--text", text)

    assert "vocabularies differ" in refused(tiny.make("llama", vocab_size=100), "words")
    assert "different families" in refused(tiny.make("qwen2"), "family")
    assert "num_layers differs" in refused(tiny.make("llama", num_hidden_layers=3), "deep")


def test_short_text_and_existing_out(
    kvfold: Kvfold, source: Path, folded: Path, text: Path, tmp_path: Path
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("w3 w4 w5")
    arguments = ["--teacher", source, "--text", short, "--stages", "kl"]
    assert "too short" in complaint(kvfold, folded, tmp_path / "out", *arguments)
    arguments = ["--teacher", source, "--text", text]
    (tmp_path / "out").mkdir()
    assert "exists already" in complaint(kvfold, folded, tmp_path / "out", *arguments)
    assert "inside SRC" in complaint(kvfold, folded, folded / "out", *arguments)


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


# -- command line ---------------------------------------------------------------------------


def test_the_command_prints_a_table_and_lines_of_progress(
    kvfold: Kvfold, source: Path, folded: Path, text: Path, tmp_path: Path
) -> None:
    arguments = [folded, tmp_path / "out", "--teacher", source, "--text", f"{text}=2"]
    arguments += ["--tokens", 1024, "--batch-tokens", 256, "--context", 64, "--stages", "kl"]
    run = kvfold("heal", *arguments, "--held-out-tokens", 128, "--eval-text", text)
    assert run.code == 0, run.err
    assert "healed" in run.out
    assert "nats lost" in run.out
    assert "tokens  KL: held-out" in run.err


def test_convert_can_heal_in_one_go(
    kvfold: Kvfold, source: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = [source, out, "--kv-heads", 2, "--fit", "none", "--context", 64, "--json"]
    run = kvfold("convert", *arguments, "--heal", 1024, "--calibration", text)
    assert run.code == 0, run.err
    record: Any = run.json()
    assert record["geometry"]["num_kv_heads"]["folded"] == 2
    assert record["heal"]["steps"] >= 1
    assert (tmp_path / "out.folded" / "config.json").is_file()
    arguments = [source, out, "--kv-heads", 3, "--heal", 1024, "--calibration", text]
    dry = kvfold("convert", source, tmp_path / "dry", *arguments[2:], "--dry-run")
    assert dry.code == 0, dry.err
    assert not list(tmp_path.glob("dry*"))
    other = kvfold("convert", *arguments, "--resume", "--force")
    assert other.code == 2
    assert "was made by another command" in other.err
    refused = kvfold("convert", source, tmp_path / "no", "--kv-heads", 2, "--heal", "1k")
    assert refused.code == 2
    assert "needs text" in refused.err


@pytest.mark.parametrize("what", ["weights", "text", "nothing"])
def test_what_is_healed_was_folded_from_what_is_there_now(
    what: str, kvfold: Kvfold, source: Path, text: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Killed between its two steps, ``convert --heal --resume`` took any OUT.folded."""
    shutil.copytree(source, tmp_path / "source")
    shutil.copy(text, tmp_path / "text.txt")
    arguments = ["convert", tmp_path / "source", tmp_path / "out", "--kv-heads", 2]
    arguments += ["--fit", "none", "--context", 64, "--heal", 1024]
    arguments += ["--calibration", tmp_path / "text.txt"]
    with monkeypatch.context() as patch:
        patch.setattr("kvfold.healing.run.run_heal", None)  # calling it fails
        assert kvfold(*arguments).code == 1
    name = {"weights": "source/model.safetensors", "text": "text.txt"}.get(what)
    if name is not None:
        data = bytearray((tmp_path / name).read_bytes())
        data[-2] ^= 1
        (tmp_path / name).write_bytes(data)
    run = kvfold(*arguments, "--resume")
    assert run.code == (0 if what == "nothing" else 2), run.err
    assert what == "nothing" or "from other weights or text" in run.err


def test_out_appears_with_everything_in_it(
    kvfold: Kvfold, source: Path, folded: Path, text: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The curve was drawn into OUT after it had appeared."""
    names: list[set[str]] = []
    honest = Workspace.publish

    def publish(self: Workspace, *arguments: Any) -> None:
        names.append({path.name for path in self.new.iterdir()})
        honest(self, *arguments)

    monkeypatch.setattr(Workspace, "publish", publish)
    out = tmp_path / "out"
    arguments = [folded, out, "--teacher", source, "--text", text, "--stages", "kl"]
    arguments += ["--tokens", 512, "--batch-tokens", 256, "--context", 64, "--eval-text", text]
    assert kvfold("heal", *arguments).code == 0
    assert "healing.png" in names[0]
    assert {path.name for path in out.iterdir()} == names[0]


def test_metrics_go_to_tensorboard_and_the_curve_is_drawn(
    kvfold: Kvfold, source: Path, folded: Path, text: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    out = tmp_path / "out"
    arguments = [folded, out, "--teacher", source, "--text", text, "--stages", "kl"]
    arguments += ["--tokens", 512, "--batch-tokens", 256, "--context", 64, "--eval-text", text]
    run = kvfold("heal", *arguments, "--held-out-tokens", 0, "--tensorboard", tmp_path / "board")
    assert run.code == 0, run.err
    assert list((tmp_path / "board").glob("events.*"))
    assert (out / "healing.png").read_bytes().startswith(b"\x89PNG")
