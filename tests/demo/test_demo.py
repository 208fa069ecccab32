"""The demo: same seed, same model; honest splits; a plot and a table that match."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

from kvfold.cli.main import main
from kvfold.demo import run as demo
from kvfold.demo.plots import finding, plot_demo
from kvfold.demo.result import DemoRow
from kvfold.demo.run import check_out
from kvfold.demo.text import Splits, split_topics
from kvfold.demo.training import CONTEXT, rate, train_demo_model
from kvfold.errors import InputError
from kvfold.quality.scores import Quality
from kvfold.quality.text import python_topics

STEPS = 2


@pytest.fixture(scope="module")
def splits() -> Splits:
    return split_topics(python_topics())


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trained_weights(seed: int) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = train_demo_model(seed, steps=STEPS)[0].state_dict()
    return weights


def quality(perplexity: float, kv_bytes: int) -> Quality:
    lost = math.log(perplexity / 10)
    return Quality(
        name="any",
        text="any",
        tokens=1000,
        nll=math.log(perplexity),
        perplexity=perplexity,
        perplexity_error=0.1,
        nats_lost=lost,
        nats_lost_error=0.01,
        ratio=perplexity / 10,
        ratio_error=0.01,
        kl=0.0,
        kl_error=0.0,
        kl_p95=0.0,
        kl_p99=0.0,
        top1=0.9,
        kv_bytes_per_token=kv_bytes,
    )


def rows(worst: float) -> list[DemoRow]:
    folds = [
        DemoRow(heads, label, quality(10 + spread / heads, 256 * heads))
        for heads in (4, 2, 1)
        for label, spread in (("mean", worst), ("auto", 1.0))
    ]
    latents = [
        DemoRow(8, "latent", quality(10 + 40 / numbers, 8 * numbers), f"{numbers - 8}+8")
        for numbers in (64, 48, 32)
    ]
    return [DemoRow(8, "source", quality(10, 2048)), *folds, *latents]


def test_seed_decides_the_weights(threads: None) -> None:
    first, again, other = trained_weights(0), trained_weights(0), trained_weights(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_training_leaves_the_global_generator_alone(threads: None) -> None:
    before = torch.get_rng_state()
    trained_weights(3)
    assert torch.equal(torch.get_rng_state(), before)


def test_splits_share_no_paragraph(splits: Splits) -> None:
    assert not set(splits.training) & set(splits.held_out)
    trained = {part for text in splits.training.values() for part in text.split("\n\n")}
    held_out = {part for text in splits.held_out.values() for part in text.split("\n\n")}
    assert not trained & held_out


def test_calibration_is_training_text(splits: Splits) -> None:
    assert splits.calibration
    assert set(splits.calibration.items()) < set(splits.training.items())


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    rates = [rate(step, 300) for step in range(300)]
    peak = rates.index(max(rates))
    assert max(rates) == 1
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] < 1e-3


@pytest.mark.parametrize("worst", [1.0, 5.0, 500.0])
def test_plot_is_written_and_not_empty(tmp_path: Path, worst: float) -> None:
    plot_demo(rows(worst), tmp_path / "plot.png")
    pixels = imread(tmp_path / "plot.png")
    assert pixels.shape[1] > 1000
    assert (pixels[..., :3].min(-1) < 0.9).mean() > 0.01
    assert "</svg>" in (tmp_path / "plot.svg").read_text()


def test_title_names_best_and_worst_method() -> None:
    title = finding(rows(50.0))
    assert title.startswith("An 8× ")
    assert title.index("auto") < title.index("mean")


def test_existing_folder_is_refused_without_force(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match="exists already"):
        check_out(tmp_path, force=False)
    with pytest.raises(InputError, match="earlier demo"):
        check_out(tmp_path, force=True)
    (tmp_path / "demo.json").touch()
    check_out(tmp_path, force=True)
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "--force" in capsys.readouterr().err


def test_demo_in_small(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    threads: None,
) -> None:
    monkeypatch.setattr(demo, "STEPS", STEPS)
    monkeypatch.setattr(demo, "FOLDED_KV_HEADS", (4, 1))
    monkeypatch.setattr(demo, "FOLDS", (("mean", "mean", "none"), ("auto", "auto", "refit")))
    monkeypatch.setattr(demo, "LATENTS", ("24+8",))
    monkeypatch.setattr(demo, "_CALIBRATION_TOKENS", 2 * CONTEXT)
    monkeypatch.setattr(demo, "_HELD_OUT_TOKENS", 4 * CONTEXT)
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--json"]) == 0
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    heads = [(row["kv_heads"], row["method"]) for row in document["rows"] if not row["latent"]]
    assert heads == [(8, "source"), (4, "mean"), (4, "auto"), (1, "mean"), (1, "auto")]
    sizes = [row["quality"]["kv_bytes_per_token"] for row in document["rows"]]
    assert sizes == [*(256 * count for count, _ in heads), 256]
    assert document["rows"][-1]["latent"] == "24+8"
    assert json.loads((out / "demo.json").read_text()) == document
    assert (out / "source" / "tokenizer.json").is_file()
    assert "kvfold inspect" in printed.err
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_interrupted_demo_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kvfold.demo.training._train", interrupted)
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 130
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_demo_shows_what_folding_costs(tmp_path: Path) -> None:
    result = demo.run_demo(tmp_path / "demo")
    lost = {(row.latent or row.kv_heads, row.method): row.quality.nats_lost for row in result.rows}
    assert result.rows[0].quality.perplexity < 50
    assert lost[1, "mean"] > lost[2, "mean"] > lost[4, "mean"] > 0
    assert all(lost[heads, "auto"] < lost[heads, "mean"] for heads in (4, 2, 1))
    assert lost["24+8", "latent"] < lost[1, "mean"]
