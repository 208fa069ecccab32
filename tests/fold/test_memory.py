"""Where a device's memory ends: less is run at once, to the same end; and what is told before."""

from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

from kvfold.arch.target import Grouped, Latent, Target
from kvfold.checkpoint.source import open_checkpoint
from kvfold.errors import RunError
from kvfold.fold import choose
from kvfold.fold.hidden import Room
from kvfold.fold.model import fold_model
from kvfold.fold.stream import LiveLayer
from kvfold.quality.device import free_memory, is_out_of_memory
from tests.conftest import Kvfold
from tests.toolbox import tiny

CPU = torch.device("cpu")
WINDOWS, TOKENS = 12, 32


class Device:
    """Runs out of memory in a layer's MLP, behind its attention, above so many tokens at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tokens: int | None) -> None:
        self.most = 0
        plain = LiveLayer.__call__

        def limited(live: LiveLayer, hidden: torch.Tensor) -> torch.Tensor:
            out = plain(live, hidden)
            count = hidden.shape[0] * hidden.shape[1]
            if tokens is not None and count > tokens:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB.")
            self.most = max(self.most, count)
            return out

        monkeypatch.setattr(LiveLayer, "__call__", limited)


def windows() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, tiny.VOCABULARY, (WINDOWS, TOKENS), generator=generator)


def folded(target: Target, monkeypatch: pytest.MonkeyPatch, tokens: int | None) -> Any:
    with monkeypatch.context() as patched:
        device = Device(patched, tokens)
        if isinstance(target, Latent):
            made = fold_model(
                tiny.make("llama"), latent=target.words, layout="youtu", windows=windows()
            )
        else:
            made = fold_model(tiny.make("llama"), 1, windows=windows())
    return made.model, device.most


@pytest.mark.parametrize("target", [Grouped(1), Latent(20, 4)], ids=["heads", "latent"])
def test_halves_until_it_fits(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics, fit, refit and what is run on: the same but for the order of sums."""
    plain, most = folded(target, monkeypatch, None)
    assert most == WINDOWS * TOKENS
    limited, most = folded(target, monkeypatch, 2 * TOKENS)
    assert most == 2 * TOKENS
    # Signs of a latent's numbers and steps of Adam where there is no gradient are rounding's: what
    # counts is what the models make of a text, beside what folding has changed of it.
    with torch.no_grad():
        models = (tiny.make("llama"), plain, limited)
        source, wanted, found = (model(windows()).logits for model in models)
    assert (found - wanted).norm() < 0.01 * (wanted - source).norm()


def test_comparing_what_to_fold_to(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tiny.checkpoint_of(tiny.make("llama"))
    targets: list[Target] = [Grouped(1), Latent(20, 4, layout="youtu")]
    asked: dict[str, Any] = {"method": "auto", "fit": "none", "seed": 0}
    plain = choose.compare(checkpoint, targets, windows(), **asked)
    Device(monkeypatch, 4 * TOKENS)
    for wanted, found in zip(
        plain, choose.compare(checkpoint, targets, windows(), **asked), strict=True
    ):
        assert found.errors == pytest.approx(wanted.errors, rel=1e-3)
        assert found.kl == pytest.approx(wanted.kl, rel=1e-3)


def test_too_little_for_one_window(monkeypatch: pytest.MonkeyPatch) -> None:
    Device(monkeypatch, TOKENS - 1)
    with pytest.raises(RunError, match="cpu is out of memory with one window of 32 tokens") as told:
        fold_model(tiny.make("llama"), 1, windows=windows())
    assert "--context" in told.value.hint


def test_other_failures_are_not_taken_for_it() -> None:
    room = Room(CPU)
    before = room.tokens

    def fail(which: slice) -> None:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        room.each(4, 32, fail)
    assert room.tokens == before
    assert is_out_of_memory(
        RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory")
    )
    assert is_out_of_memory(MemoryError())


def test_done_once_each() -> None:
    """All windows, in order, however often memory ends."""
    done: list[int] = []
    room = Room(CPU)

    def do(which: slice) -> None:
        if which.stop - which.start > 3:
            raise torch.OutOfMemoryError
        done.extend(range(which.start, which.stop))

    room.each(25, 256, do)
    assert done == list(range(25))
    assert room.tokens <= 3 * 256


def test_what_a_conversion_takes_at_least(
    kvfold: Kvfold,
    llama_folder: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A dry run says it; where less is free nothing begins."""
    checkpoint = open_checkpoint(llama_folder)
    geometry, config = checkpoint.geometry, checkpoint.config
    names = checkpoint.layer_names(0)
    layer = sum(prod(checkpoint.store.shape(name)) for name in names)
    states = 4 * 1024 * geometry.hidden_size
    ends = 4 * config["vocab_size"] * geometry.hidden_size
    predicted = 4 * config["vocab_size"] * 5 * 64
    solved = 20 * config["intermediate_size"] ** 2
    arguments = [
        "convert", llama_folder, tmp_path / "out", "--kv-heads", 1, "--calibration", text_file,
        "--calibration-tokens", 1024, "--context", 64, "--device", "cpu",
    ]  # fmt: skip
    for fit, expected in (
        ("local", 4 * states + max(4 * layer + solved, ends + predicted)),
        ("none", 2 * states + max(4 * layer, ends)),
    ):
        told: Any = kvfold(*arguments, "--fit", fit, "--dry-run", "--json").json()
        assert told["memory_bytes_at_least"] == expected
    monkeypatch.setattr("kvfold.quality.device.free_memory", lambda device: 1 << 10)
    run = kvfold(*arguments)
    assert run.code == 2
    assert "GiB of memory" in run.err
    assert "--calibration-tokens" in run.err
    assert not (tmp_path / "out").exists()
    data_free = kvfold(*arguments[:5], "--fit", "none", "--method", "mean", "--no-calibration")
    assert data_free.code == 0, data_free.err


def test_free_memory() -> None:
    found = free_memory("cpu")
    assert found is None or 1 << 20 < found < 1 << 50
    assert free_memory("mps") is None
