"""Healing with two processes: the losses of one, and a run that outlives the death of a rank."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kvfold import convert
from kvfold.checkpoint.places import working_folder
from kvfold.healing import saves
from kvfold.healing.watch import read_metrics
from tests.toolbox import tiny
from tests.toolbox.runs import rank_of

TIMEOUT = 240


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """source, folded and text.txt in one folder."""
    root = tmp_path_factory.mktemp("parallel")
    tiny.save_with_tokenizer(tiny.make("llama", num_key_value_heads=6), root / "source")
    convert(root / "source", root / "folded", 1, calibrate=False)
    text = "\n\n".join(tiny.words(300, seed) for seed in range(40))
    (root / "text.txt").write_text(text)
    return root


def start(folders: Path, out: str, processes: int, *options: str) -> "subprocess.Popen[str]":
    """``kvfold heal`` alone or under torchrun."""
    torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
    launcher = [sys.executable, *(torchrun if processes > 1 else [])]
    arguments = ["heal", "folded", out, "--teacher", "source", "--text", "text.txt"]
    arguments += ["--stages", "kl", "--tokens", "1024", "--batch-tokens", "256", "--context", "64"]
    arguments += ["--held-out-tokens", "128", "--lr", "1e-2", "--save-tokens", "256"]
    arguments += ["--eval-text", "text.txt", "--device", "cpu", "--dtype", "float32", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*launcher, "-m", "kvfold", *arguments],
        cwd=folders, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process: "subprocess.Popen[str]") -> None:
    _, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, errors[-3000:]


def rows(path: Path) -> list[dict[str, Any]]:
    return [row for row in read_metrics(path) if "loss" in row]


@pytest.fixture(scope="module")
def alone(folders: Path) -> list[dict[str, Any]]:
    finish(start(folders, "alone", 1))
    return rows(folders / "alone" / "healing.jsonl")


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_have_the_losses_of_one(
    kind: str, folders: Path, alone: list[dict[str, Any]]
) -> None:
    finish(start(folders, kind, 2, "--parallel", kind))
    both = rows(folders / kind / "healing.jsonl")
    for name in ("loss", "kl", "gradient_norm"):
        # The first step differs by the order of a sum; Adam magnifies that in later ones.
        assert both[0][name] == pytest.approx(alone[0][name], rel=1e-5)
        wanted = [row[name] for row in alone]
        assert [row[name] for row in both] == pytest.approx(wanted, rel=2e-3)
    record = json.loads((folders / kind / "kvfold.json").read_text())
    assert record["heal"]["run"]["processes"] == 2


def test_what_is_kept_of_sharded_weights_is_what_was_measured(folders: Path) -> None:
    """All weights are trained, far too fast, those outside of layers as well."""
    finish(start(folders, "sharded", 2, "--parallel", "fsdp", "--train", "all",
                 "--lr", "1", "--lr-rest", "1"))  # fmt: skip
    heal = json.loads((folders / "sharded" / "kvfold.json").read_text())["heal"]
    assert heal["kept"]["share"] < 1
    last = read_metrics(folders / "sharded" / "healing.jsonl")[-1]
    assert last["share"] == heal["kept"]["share"]
    written = {row["text"]: row["kl"] for row in heal["quality"] if row["name"] == "healed"}
    assert last["kl held-out"] == pytest.approx(written["held-out"], rel=1e-3)


def test_a_killed_rank_ends_the_run_and_the_rest_is_resumed(folders: Path) -> None:
    """Rank 1 dies after a checkpoint; --resume goes on from it to the end."""
    process = start(folders, "killed", 2, "--tokens", "16Ki")
    kept = working_folder(folders / "killed") / "checkpoints"
    deadline = time.monotonic() + TIMEOUT
    while not saves.saved(kept) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    os.kill(rank_of(process.pid, 1), 9)
    process.communicate(timeout=TIMEOUT)
    assert process.returncode != 0
    assert not (folders / "killed").exists()
    assert saves.saved(kept)
    finish(start(folders, "killed", 2, "--tokens", "16Ki", "--resume"))
    found = rows(folders / "killed" / "healing.jsonl")
    assert [row["step"] for row in found] == list(range(1, 65))
    assert found[-1]["kl"] < found[0]["kl"]
