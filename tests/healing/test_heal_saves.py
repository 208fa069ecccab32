"""Training checkpoints are read without trusting them."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from kvfold.errors import CheckpointError, InputError
from kvfold.healing import saves
from kvfold.healing.manifest import read_index
from kvfold.healing.parallel import world

STATE: dict[str, Any] = {
    "step": 3,
    "stream": {"sequence": 2, "streams": [{"epoch": 1, "document": 4, "left": [5, 6]}]},
    "row": {"step": 3, "loss": 1.5},
    "history": [1.5, 1.25],
}


class Touch:
    """A pickle of this makes a file when it is read: what an attacker would do worse."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def trained(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2).requires_grad_(False))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    return model, optimizer


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    with world(None, "cpu", 1) as alone:
        return saves.save(tmp_path / "checkpoints", *trained(), STATE, alone, keep=2)


def load(path: Path) -> dict[str, Any]:
    with world(None, "cpu", 1) as alone:
        return saves.load(path, *trained(seed=1), alone)


def test_what_is_saved_comes_back_bit_by_bit(saved: Path) -> None:
    model, optimizer = trained(seed=1)
    with world(None, "cpu", 1) as alone:
        state = saves.load(saved, model, optimizer, alone)
    assert state == {**STATE, "processes": 1}
    other_model, other = trained()
    for mine, theirs in zip(model[0].parameters(), other_model[0].parameters(), strict=True):  # type: ignore[index]
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_only_tensors_are_kept(saved: Path) -> None:
    """Everything else would be pickled, and unpickled without a check."""
    assert read_index(saved).state_dict_metadata.keys() == {
        f"{kind}.0.{name}{moment}"
        for name in ("weight", "bias")
        for kind, moment in [("model", "")]
        + [("optimizer", f".{each}") for each in ("step", "exp_avg", "exp_avg_sq")]
    }


@pytest.mark.parametrize("where", ["instead", "inside"])
def test_code_in_an_index_does_not_run(saved: Path, tmp_path: Path, where: str) -> None:
    marker = tmp_path / "ran"
    planted: Any = Touch(marker)
    if where == "inside":
        index = read_index(saved)
        index.planner_data, planted = planted, index
    (saved / ".metadata").write_bytes(pickle.dumps(planted))
    with pytest.raises(CheckpointError, match=r"\.metadata is damaged"):
        load(saved)
    assert not marker.exists()


def test_code_in_an_entry_does_not_run(saved: Path, tmp_path: Path) -> None:
    """PyTorch unpickles entries that are no tensors freely: an index that names one is refused."""
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    index = read_index(saved)
    index.state_dict_metadata["model.0.weight"] = BytesStorageMetadata()
    (saved / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(CheckpointError, match=r"\.metadata"):
        load(saved)
    marker = tmp_path / "ran"
    for path in saved.glob("*.distcp"):
        torch.save(Touch(marker), path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "name", ["../elsewhere.distcp", "/etc/passwd", "__0_0.distcp/../x", "link"]
)
def test_an_index_names_only_files_beside_it(saved: Path, tmp_path: Path, name: str) -> None:
    index = read_index(saved)
    data = next(saved.glob("*.distcp"))
    if name == "link":
        data.rename(tmp_path / "elsewhere.distcp")
        data.symlink_to(tmp_path / "elsewhere.distcp")
    else:
        for place in index.storage_data.values():
            place.relative_path = name
        (saved / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(CheckpointError, match="not the index"):
        load(saved)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(st.integers(0, 10_000), st.binary(max_size=4), st.integers(0, 4))
def test_a_damaged_index_is_read_or_refused(
    saved: Path, at: int, inserted: bytes, cut: int
) -> None:
    path, kept = saved / ".metadata", saved / "kept"
    if not kept.exists():
        kept.write_bytes(path.read_bytes())
    whole = kept.read_bytes()
    at %= len(whole)
    path.write_bytes(whole[:at] + inserted + whole[at + cut :])
    try:
        load(saved)
    except CheckpointError:
        pass
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"step": "3"}, "step is '3'"),
        ({"processes": 0}, "processes is 0"),
        ({"history": [float("nan")]}, r"history\[0\] is nan"),
        ({"stream": {}}, r"stream\.sequence is missing"),
    ],
)
def test_a_wrong_state_names_the_key(saved: Path, change: dict[str, Any], words: str) -> None:
    path = saved / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=words):
        load(saved)
