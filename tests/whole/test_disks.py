"""Disks that fill up at any moment: one line, exit code 1, and nothing lost."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint.api import CheckpointException

from kvfold import convert, heal
from kvfold.checkpoint.places import working_folder
from kvfold.errors import RunError
from kvfold.files import WriteError, of_full_disk, reserve
from kvfold.healing import saves
from tests.toolbox import tiny
from tests.toolbox.in_the_way import largest_file
from tests.toolbox.runs import CALIBRATION, digests

MEGABYTES = 64


class Disk:
    """A file system of its own, which can be filled up."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ballast = folder / "ballast"

    def fill(self, left: int = 0) -> None:
        """Leave so many bytes free."""
        free = os.statvfs(self.folder)
        reserve(self._ballast, max(1, free.f_bavail * free.f_frsize - left))

    def empty(self) -> None:
        self._ballast.unlink(missing_ok=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={MEGABYTES}m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, check=False)
    except OSError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip("file systems cannot be mounted here")
    yield Disk(folder)
    subprocess.run(["umount", "-l", str(folder)], check=True)


def filling(disk: Disk, moment: str, left: int) -> Callable[[str, int, int], None]:
    """Fills the disk up when a run says that it is there."""

    def progress(label: str, done: int, total: int) -> None:
        if label == moment and done == 1:
            disk.fill(left)

    return progress


@pytest.mark.parametrize("left", [0, 8192, 40_000])
@pytest.mark.parametrize("moment", ["checking the source", "folding layers", "writing"])
def test_a_conversion_outlives_a_full_disk(
    moment: str, left: int, disk: Disk, sharded_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    arguments: dict[str, Any] = {
        "fit": "none", "calibration": [text_file], "max_shard_bytes": 50_000, **CALIBRATION
    }  # fmt: skip
    out = disk.folder / "out"
    with pytest.raises(RunError, match="the disk is full") as error:
        convert(sharded_folder, out, 2, progress=filling(disk, moment, left), **arguments)
    assert not out.exists()
    kept = working_folder(out).exists()
    assert ("--resume" in error.value.hint) == kept
    assert kept or [path.name for path in disk.folder.iterdir()] == ["ballast"]
    disk.empty()
    convert(sharded_folder, out, 2, resume=kept, **arguments)
    convert(sharded_folder, tmp_path / "whole", 2, **arguments)
    assert digests(out) == digests(tmp_path / "whole")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """source, folded and text.txt in one folder."""
    root = tmp_path_factory.mktemp("disks")
    tiny.save_with_tokenizer(tiny.make("llama", num_key_value_heads=6), root / "source")
    convert(root / "source", root / "folded", 1, calibrate=False)
    (root / "text.txt").write_text("\n\n".join(tiny.words(300, seed) for seed in range(40)))
    return root


@pytest.mark.parametrize("left", [0, 20_000, 100_000])
@pytest.mark.parametrize("step", [1, 3])
def test_healing_outlives_a_full_disk(
    step: int, left: int, disk: Disk, models: Path, tmp_path: Path
) -> None:
    """In a checkpoint's first bytes, in its tensors, or in what lies beside them."""
    options: dict[str, Any] = {
        "stages": ["kl"], "tokens": 1024, "batch_tokens": 256, "context": 64, "save_tokens": 256,
        "held_out_tokens": 128, "eval_texts": [], "lr": 1e-2,
    }  # fmt: skip

    def run(out: Path, **more: Any) -> None:
        heal(models / "folded", out, models / "source", [models / "text.txt"], **options, **more)

    def watch(row: dict[str, Any]) -> None:
        if row["step"] == step:
            disk.fill(left)

    out = disk.folder / "out"
    with pytest.raises(RunError, match="the disk is full") as error:
        run(out, watch=watch)
    assert not out.exists()
    assert "--resume" in error.value.hint
    assert saves.saved(working_folder(out) / "checkpoints")
    disk.empty()
    run(out, resume=True)
    run(tmp_path / "whole")
    own, whole = ((f / "model.safetensors").read_bytes() for f in (out, tmp_path / "whole"))
    assert own == whole


@pytest.mark.parametrize("size", [0, 100, 5_000, 100_000])
def test_a_checkpoint_that_cannot_be_written_is_an_error_of_ours(size: int, tmp_path: Path) -> None:
    """PyTorch's own is no ``Exception`` and prints the tracebacks of all processes."""
    import torch

    from kvfold.quality.world import World

    model = torch.nn.Linear(100, 100)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 100)).sum().backward()
    optimizer.step()
    world = World(0, 1, torch.device("cpu"), None)
    saves.save(tmp_path, model, optimizer, {"step": 1}, world, keep=2)
    with largest_file(size), pytest.raises(WriteError, match="disk is full"):
        saves.save(tmp_path, model, optimizer, {"step": 2}, world, keep=2)
    assert [path.name for path in saves.saved(tmp_path)] == ["step-00000001"]
    saves.save(tmp_path, model, optimizer, {"step": 2}, world, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_full_disks_are_found_in_whatever_wraps_them() -> None:
    def wrapped() -> None:
        try:
            raise OSError(28, "No space left on device")
        except OSError:
            raise RuntimeError("unexpected pos 704 vs 598") from None

    with pytest.raises(RuntimeError) as error:
        wrapped()
    assert of_full_disk(error.value)
    assert of_full_disk(ValueError("Error while serializing: I/O error (os error 28)"))
    assert not of_full_disk(ValueError("no such file (os error 2)"))
    found = CheckpointException("x", {0: (error.value, None)})  # type: ignore[dict-item]
    assert "disk is full" in str(saves._in_words(Path("x"), found))


def test_hidden_states_have_their_place_before_they_are_written(tmp_path: Path) -> None:
    """A mapped file without it would end the process when the disk is full."""
    with largest_file(1000), pytest.raises(WriteError, match="disk is full"):
        reserve(tmp_path / "states", 4000)
    reserve(tmp_path / "states", 4000)
    found = (tmp_path / "states").stat()
    assert found.st_size == 4000
    assert found.st_blocks * 512 >= 4000
