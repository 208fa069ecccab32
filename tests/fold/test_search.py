"""The fewest heads that keep a limit: which are tried, what is kept, and that a run goes on."""

import json
from math import exp
from pathlib import Path
from typing import Any

import pytest

import kvfold as package
from kvfold.arch.target import Grouped, Target
from kvfold.checkpoint.places import working_folder
from kvfold.checkpoint.records import HeldOut
from kvfold.errors import ThresholdError
from kvfold.fold.search import TRIED_NAME, Limit, Search
from tests.conftest import Kvfold
from tests.toolbox import tiny
from tests.toolbox.runs import Stop, digests, stop_at

HEADS = (1, 2, 4, 8, 16)
SMALL: dict[str, Any] = {"calibration_tokens": 1024, "context": 32}


def lost(nats: float) -> HeldOut:
    names = ("source_nll", "nats_lost", "nats_lost_error", "kl", "kl_error", "top1")
    return {**dict.fromkeys(names, nats), "tokens": 100}  # type: ignore[typeddict-item]


class Scripted:
    """Attempts that lose 1 / heads in closed form, and so many times less when they are fitted."""

    def __init__(self, gain: float) -> None:
        self.gain = gain
        self.made: list[tuple[int, str]] = []
        self.began: list[bool] = []

    def __call__(self, target: Target, fit: str, folder: Path) -> HeldOut:
        assert isinstance(target, Grouped)
        self.made.append((target.num_kv_heads, fit))
        self.began.append(folder.exists())
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "0.json").write_text(f"{target.num_kv_heads} {fit}")
        return lost(1 / target.num_kv_heads / (1 if fit == "none" else self.gain))


def search(folder: Path, fit: str, limit: float, attempt: Scripted) -> Search:
    return Search(folder, [Grouped(n) for n in HEADS], fit, Limit(max_kl=limit), attempt)


@pytest.mark.parametrize("fit", ["none", "local"])
@pytest.mark.parametrize("limit", [0.01, 0.07, 0.1, 0.2, 0.3, 0.6, 2.0])
def test_the_fewest_that_hold_are_found(fit: str, limit: float, tmp_path: Path) -> None:
    attempt = Scripted(gain=3.0)
    share = 1.0 if fit == "none" else 3.0
    wanted = next((n for n in HEADS if 1 / n / share <= limit), None)
    run = search(tmp_path, fit, limit, attempt)
    assert len(attempt.made) == len(set(attempt.made))
    if wanted is None:
        with pytest.raises(ThresholdError, match="no number of KV heads holds --max-kl"):
            run.run()
        assert list(tmp_path.iterdir()) == []
        return
    assert run.run() == Grouped(wanted)
    assert (tmp_path / "layers/0.json").read_text() == f"{wanted} {fit}"
    assert {path.name for path in tmp_path.iterdir()} == {"layers", TRIED_NAME}
    closed = [n for n, how in attempt.made if how == "none"]
    assert len(closed) <= 3, "five are halved at most three times"
    held = [n for n in closed if 1 / n <= limit]
    fitted = [n for n, how in attempt.made if how == "local"]
    assert not held or all(n <= min(held) for n in fitted), "what is settled is not fitted"


def test_the_layers_of_one_result_are_kept_at_a_time(tmp_path: Path) -> None:
    most = 0

    class Watching(Scripted):
        def __call__(self, target: Target, fit: str, folder: Path) -> HeldOut:
            nonlocal most
            found = super().__call__(target, fit, folder)
            most = max(most, sum(1 for _ in folder.parent.iterdir()))
            return found

    search(tmp_path, "local", 0.05, Watching(gain=3.0)).run()
    assert most == 2


@pytest.mark.parametrize(("fit", "limit"), [("local", 0.1), ("none", 0.6), ("local", 0.05)])
@pytest.mark.parametrize("stopped", range(6))
def test_what_was_tried_is_not_tried_again(
    stopped: int, fit: str, limit: float, tmp_path: Path
) -> None:
    """Nor are the layers lost that the try in the middle of which it stopped had made."""

    class Stopping(Scripted):
        def __call__(self, target: Target, fit: str, folder: Path) -> HeldOut:
            if len(self.made) == stopped:
                folder.mkdir(parents=True)
                raise Stop
            return super().__call__(target, fit, folder)

    whole, first, second = Scripted(3.0), Stopping(3.0), Scripted(3.0)
    wanted = search(tmp_path / "whole", fit, limit, whole)
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    target = wanted.run()
    if stopped < len(whole.made):
        with pytest.raises(Stop):
            search(tmp_path / "cut", fit, limit, first).run()
    again = search(tmp_path / "cut", fit, limit, second)
    assert again.run() == target
    assert first.made + second.made == whole.made
    assert again.rows == wanted.rows
    if stopped < len(whole.made):
        assert second.began == [True] + [False] * (len(second.made) - 1)
    assert (tmp_path / "cut/layers/0.json").read_text() == f"{target.num_kv_heads} {fit}"  # type: ignore[attr-defined]


def test_both_limits_hold() -> None:
    found: Any = {"nats_lost": 0.1, "kl": 0.2}
    assert Limit(max_kl=0.2).holds(found)
    assert not Limit(max_kl=0.19).holds(found)
    assert Limit(max_ppl_ratio=exp(0.1) + 1e-9).holds(found)
    assert not Limit(max_ppl_ratio=exp(0.1) + 1e-9, max_kl=0.1).holds(found)
    assert not Limit(max_ppl_ratio=1.05, max_kl=1.0).holds(found)


@pytest.fixture(scope="module")
def disguised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of six KV heads that are two."""
    model = tiny.hidden_mha(tiny.make("llama", num_key_value_heads=2))
    return tiny.save_with_tokenizer(model, tmp_path_factory.mktemp("search") / "source")


@pytest.mark.parametrize("fit", ["none", "refit"])
def test_repeated_heads_are_found(
    fit: str, disguised: Path, text_file: Path, kvfold: Kvfold, tmp_path: Path
) -> None:
    """Two heads lose nothing, one loses much; the result is what asking for two gives."""
    arguments = ["--calibration", text_file, "--calibration-tokens", 1024, "--context", 32,
                 "--fit", fit]  # fmt: skip
    out, asked = tmp_path / "out", tmp_path / "asked"
    run = kvfold("convert", disguised, out, "--max-kl", "1e-6", *arguments, "--json")
    assert run.code == 0, run.err
    record: Any = run.json()
    assert record["geometry"]["num_kv_heads"] == {"source": 6, "folded": 2}
    tried = [(row["target"], row["fit"]) for row in record["tried"]]
    assert ("2 KV heads", "none") in tried
    assert ("1 KV head", "none") in tried
    assert (("1 KV head", "refit") in tried) == (fit == "refit")
    assert "--max-kl 1e-06" in record["command"]
    assert kvfold("convert", disguised, asked, "--kv-heads", 2, *arguments).code == 0
    ours, theirs = (digests(folder) for folder in (out, asked))
    assert ours["model.safetensors"] == theirs["model.safetensors"]
    shown = kvfold("convert", disguised, tmp_path / "shown", "--max-kl", "1e-6", *arguments)
    assert "tried 2 KV heads" in shown.out


def test_a_dry_run_names_what_may_be_tried(
    disguised: Path, text_file: Path, kvfold: Kvfold, tmp_path: Path
) -> None:
    run = kvfold("convert", disguised, tmp_path / "out", "--max-kl", "0.1", "--calibration",
                 text_file, "--dry-run", "--json")  # fmt: skip
    preview: Any = run.json()
    assert preview["targets"] == ["1 KV head", "2 KV heads", "3 KV heads"]


def test_a_search_goes_on(disguised: Path, text_file: Path, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {
        "max_kl": 1e-3, "fit": "refit", "calibration": [text_file], **SMALL
    }  # fmt: skip
    whole, out = tmp_path / "whole", tmp_path / "out"
    package.convert(disguised, whole, **arguments)
    with pytest.raises(Stop):
        package.convert(
            disguised, out, **arguments, progress=stop_at("trying 1 KV head, fitted", 1)
        )
    assert json.loads((working_folder(out) / TRIED_NAME).read_text())
    package.convert(disguised, out, **arguments, resume=True)
    assert digests(out) == digests(whole)


def test_where_none_holds_nothing_is_written(
    llama_folder: Path, text_file: Path, kvfold: Kvfold, tmp_path: Path
) -> None:
    run = kvfold("convert", llama_folder, tmp_path / "out", "--max-kl", "1e-6",
                 "--calibration", text_file, "--calibration-tokens", 1024, "--context", 32,
                 "--fit", "none")  # fmt: skip
    assert run.code == 3
    assert "no number of KV heads holds --max-kl 1e-06: 3 KV heads" in run.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--kv-heads", 1), "--kv-heads and --max-ppl-ratio exclude each other"),
        (("--latent", "16+4"), "--latent and --max-ppl-ratio exclude each other"),
        (("--no-calibration",), "--max-ppl-ratio is measured on calibration text"),
        (("--context", 128), "has 1024 tokens, none to hold out; expected at least 2048"),
    ],
)
def test_bad_input(
    options: tuple[object, ...],
    said: str,
    llama_folder: Path,
    kvfold: Kvfold,
    tmp_path: Path,
) -> None:
    short = tmp_path.parent / "short.txt"
    short.write_text(tiny.words(1030))
    text = () if "--no-calibration" in options else ("--calibration", short)
    run = kvfold("convert", llama_folder, tmp_path / "out", "--max-ppl-ratio", "1.1", *text,
                 *options)  # fmt: skip
    assert run.code == 2
    assert said in run.err
    assert list(tmp_path.iterdir()) == []


def test_one_head_cannot_be_fewer(text_file: Path, kvfold: Kvfold, tmp_path: Path) -> None:
    source = tiny.save_with_tokenizer(tiny.make("llama", num_key_value_heads=1), tmp_path / "mqa")
    run = kvfold("convert", source, tmp_path / "out", "--max-kl", "1", "--calibration", text_file)
    assert run.code == 2
    assert "there is none to save" in run.err
