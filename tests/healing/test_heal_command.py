"""``kvfold heal`` and ``kvfold convert --heal``: what they print, write and refuse."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from kvfold import heal
from kvfold.checkpoint.workspace import Workspace
from kvfold.errors import KVFoldError
from kvfold.healing.request import HealRequest
from tests.conftest import Kvfold
from tests.toolbox import tiny
from tests.toolbox.commands import complaint


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
    complaint(kvfold("heal", *arguments), message)
    assert not list(tmp_path.iterdir())


def test_bad_pairs(kvfold: Kvfold, source: Path, folded: Path, text: Path, tmp_path: Path) -> None:
    for name, teacher, reason in (
        ("words", tiny.make("llama", vocab_size=100), "vocabularies differ"),
        ("family", tiny.make("qwen2"), "different families"),
        ("deep", tiny.make("llama", num_hidden_layers=3), "num_layers differs"),
    ):
        folder = tiny.save_with_tokenizer(teacher, tmp_path / name)
        out = tmp_path / "out"
        complaint(kvfold("heal", folded, out, "--teacher", folder, "--text", text), reason)


def test_short_text_and_existing_out(
    kvfold: Kvfold, source: Path, folded: Path, text: Path, tmp_path: Path
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("w3 w4 w5")
    arguments = ["--teacher", source, "--text", short, "--stages", "kl"]
    complaint(kvfold("heal", folded, tmp_path / "out", *arguments), "too short")
    arguments = ["--teacher", source, "--text", text]
    (tmp_path / "out").mkdir()
    complaint(kvfold("heal", folded, tmp_path / "out", *arguments), "exists already")
    complaint(kvfold("heal", folded, folded / "out", *arguments), "inside SRC")


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


def test_what_can_be_checked_is_checked_once(
    kvfold: Kvfold, source: Path, folded: Path, text: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """By the command line as by the function: it opens both models and every text."""
    from kvfold.healing import request, run

    seen: list[object] = []
    check = request.check_heal

    def counting(*arguments: Any, **options: Any) -> None:
        seen.append(arguments)
        check(*arguments, **options)

    for module in (request, run):
        monkeypatch.setattr(module, "check_heal", counting)
    options: dict[str, Any] = {"context": 64, "stages": ["local"], "local_tokens": 1024}
    heal(folded, tmp_path / "a", source, [text], held_out_tokens=256, **options)
    assert len(seen) == 1
    command = ("heal", folded, tmp_path / "b", "--teacher", source, "--text", text)
    small = ("--context", 64, "--stages", "local", "--local-tokens", 1024)
    assert kvfold(*command, *small, "--held-out-tokens", 256).code == 0
    assert len(seen) == 2


def test_what_is_given_is_not_worked_out(folded: Path, source: Path, tmp_path: Path) -> None:
    """A damaged record matters only where the default stages are read from it."""
    damaged = Path(shutil.copytree(folded, tmp_path / "damaged"))
    (damaged / "kvfold.json").write_text("{")
    asked: dict[str, Any] = {"folded": damaged, "teacher": source, "texts": ["text"]}
    assert HealRequest.asked(**asked, stages=["kl"]).stages == ("kl",)
    with pytest.raises(KVFoldError, match=r"kvfold\.json"):
        HealRequest.asked(**asked)
