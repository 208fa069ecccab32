"""Converting with several processes: the weights of one, and a run that outlives a rank's death."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kvfold.checkpoint.places import working_folder
from kvfold.checkpoint.pretrained import load_model
from kvfold.fold.hidden import BATCH_TOKENS, FIRST, HELD, TEXT, HiddenStates, Windows, dealt
from kvfold.quality.world import World
from tests.toolbox import tiny
from tests.toolbox.runs import rank_of

TIMEOUT = 240
FITTED = ("--kv-heads", "1", "--fit-steps", "60")
CPU = torch.device("cpu")
USUAL = ("--calibration", "text.txt", "--calibration-tokens", "20000", "--context", "128",
         "--dtype", "float32", "--device", "cpu")  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Source and text.txt in one folder."""
    root = tmp_path_factory.mktemp("processes")
    tiny.save_with_tokenizer(tiny.make("llama", num_hidden_layers=3), root / "source")
    text = "\n\n".join(tiny.words(600, seed) for seed in range(60))
    (root / "text.txt").write_text(text)
    return root


def start(
    folder: Path, out: str, processes: int, *options: str, code: str = ""
) -> "subprocess.Popen[str]":
    """``kvfold convert`` alone or under torchrun.

    Args:
        code: runs instead of kvfold's main program, with ``main`` at hand.
    """
    torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
    launcher = [sys.executable, *(torchrun if processes > 1 else [])]
    program = ["-m", "kvfold"]
    if code:
        script = folder / "program.py"
        lines = ("import os, sys", "from kvfold.cli.main import main", code, "sys.exit(main())")
        script.write_text("\n".join(lines))
        program = [str(script)]
    return subprocess.Popen(
        [*launcher, *program, "convert", "source", out, *USUAL, *options],
        cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process: "subprocess.Popen[str]") -> str:
    output, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, errors[-3000:]
    return output


def record_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "kvfold.json").read_text())
    return found


def both(folder: Path, name: str, *options: str) -> tuple[Path, Path]:
    """The same by one process and by two, which say once what they did."""
    outputs = []
    for count in (1, 2):
        output = finish(start(folder, f"{name}-{count}", count, *options))
        assert output.count("Folded to") == 1
        outputs.append(folder / f"{name}-{count}")
    assert record_of(outputs[1])["run"]["processes"] == 2
    return outputs[0], outputs[1]


def test_two_processes_fold_as_one(folder: Path) -> None:
    """Sums are added up in another order, and 60 steps of Adam magnify what that rounds."""
    one, two = both(folder, "heads", *FITTED)
    alone, shared = (load_file(each / "model.safetensors") for each in (one, two))
    assert alone.keys() == shared.keys()
    for name, tensor in alone.items():
        assert (shared[name] - tensor).abs().max() <= 1e-3 * tensor.abs().max()
    assert record_of(two)["held_out"] == pytest.approx(record_of(one)["held_out"], rel=1e-3)


def test_two_processes_make_the_latent_of_one(folder: Path) -> None:
    """In whatever coordinates: eigenvectors of nearly the same size turn with any rounding."""
    folders = both(folder, "latent", "--latent", "12+4", "--fit", "none")
    one, two = (tiny.logits(load_model(each, torch.float32), tiny.tokens()) for each in folders)
    torch.testing.assert_close(one, two, atol=1e-4, rtol=0)


def test_a_killed_rank_ends_the_run_and_the_rest_is_resumed(folder: Path) -> None:
    process = start(folder, "killed", 2, *FITTED)
    first_layer = working_folder(folder / "killed") / "layers" / "0.json"
    deadline = time.monotonic() + TIMEOUT
    while not first_layer.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    os.kill(rank_of(process.pid, 1), 9)
    process.communicate(timeout=TIMEOUT)
    assert process.returncode != 0
    assert not (folder / "killed").exists()
    finish(start(folder, "killed", 2, *FITTED, "--resume"))
    finish(start(folder, "whole", 2, *FITTED))
    assert record_of(folder / "killed")["run"]["resumed"]
    again, whole = (load_file(folder / n / "model.safetensors") for n in ("killed", "whole"))
    for name, tensor in whole.items():
        assert torch.equal(again[name], tensor)


def test_processes_that_were_asked_for_different_things(folder: Path) -> None:
    code = "sys.argv += ['--seed', os.environ['RANK']]"
    process = start(folder, "different", 2, "--kv-heads", "1", code=code)
    _, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode != 0
    assert "seed is 0 in process 0 and 1 in process 1" in errors
    assert not (folder / "different").exists()


def test_more_processes_than_batches(folder: Path) -> None:
    process = start(folder, "many", 2, "--kv-heads", "1", "--calibration-tokens", "4000")
    _, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode != 0
    assert "expected at most 1" in errors


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("text", [TEXT, FIRST, HELD])
def test_every_window_is_somebodys(size: int, text: int) -> None:
    tokens = 1 if text == FIRST else 512
    shares = [dealt(text, 41, tokens, World(rank, size, CPU)) for rank in range(size)]
    assert torch.equal(torch.cat(shares).sort().values, torch.arange(41))
    if text == TEXT:  # whole batches: what one hears of them does not depend on how many there are
        for share in shares:
            batches = share.split(BATCH_TOKENS // tokens)
            assert all(int(batch[0]) % (BATCH_TOKENS // tokens) == 0 for batch in batches)


def test_places_of_windows_here() -> None:
    world = World(1, 2, CPU)
    states = HiddenStates([(20, 512), (0, 1), (3, 512)], 4, CPU, world=world)
    assert states.shapes == ((8, 512), (0, 1), (1, 512))
    assert states.here(Windows(TEXT, torch.tensor([7, 8, 15, 16]))).tolist() == [-1, 0, 7, -1]
