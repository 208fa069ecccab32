"""Requests that give a size only: the calibration text chooses what is folded to."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import kvfold as package
from kvfold.arch.families import BY_TYPE
from kvfold.arch.target import Grouped, Latent, Target
from kvfold.checkpoint.source import open_checkpoint
from kvfold.errors import InputError, RunError
from kvfold.fold import choose
from kvfold.fold.candidates import latents_of
from kvfold.fold.choose import KEPT, Compared
from kvfold.fold.fit import FitTask, fit_attention
from kvfold.fold.hidden import TEXT
from kvfold.fold.layer import FoldedLayer, fold_layer
from kvfold.fold.passes import Calibration
from kvfold.fold.stored_layer import StoredLayer
from kvfold.progress import Progress
from tests.conftest import Kvfold
from tests.toolbox import tiny
from tests.toolbox.runs import CALIBRATION, Stop, digests, stop_at

RANK, ROTARY = 20, 4


def test_what_a_share_of_the_cache_is_spent_on(
    kvfold: Kvfold, text_file: Path, tmp_path: Path
) -> None:
    """A latent in disguise is found to be one; repeated heads are found to be heads."""
    cases = {"latent": tiny.hidden_mla("llama", RANK), "heads": tiny.hidden_mha(tiny.make("llama"))}
    with torch.no_grad():
        for model in cases.values():
            model.model.embed_tokens.weight[:, 0] = 30.0
    for kind, model in cases.items():
        source = tiny.save_with_tokenizer(model, tmp_path / kind)
        run = kvfold(
            "convert", source, tmp_path / f"{kind}-out", "--kv-bytes", "34%", "--fit", "none",
            "--calibration", text_file, "--calibration-tokens", 1024, "--context", 64, "--json",
        )  # fmt: skip
        assert run.code == 0, run.err
        record: Any = run.json()
        errors = [max(each["attention_error"].values()) for each in record["compared"]]
        assert min(errors) < 1e-4, record["compared"]
        assert ("latent" in record["geometry"]) == (kind == "latent"), record["compared"]
        assert "--kv-bytes 34%" in record["command"]


def test_the_text_chooses_between_latents_of_one_size(
    kvfold: Kvfold, text_file: Path, tmp_path: Path
) -> None:
    """A latent in disguise is found at its own split; a dry run says what will be compared."""
    source = tiny.save_with_tokenizer(tiny.hidden_mla("llama", RANK), tmp_path / "source")
    arguments = [
        "convert", source, tmp_path / "out", "--latent", RANK + 1 + ROTARY, "--layout", "youtu",
        "--fit", "none", "--calibration", text_file, "--calibration-tokens", 1024, "--context", 64,
        "--json",
    ]  # fmt: skip
    dry = kvfold(*arguments, "--dry-run")
    assert dry.code == 0, dry.err
    preview: Any = dry.json()
    sizes = ("23+2", "21+4", "19+6", "17+8", "21+4/2")
    assert preview["targets"] == [f"a latent of {words} numbers" for words in sizes]
    run = kvfold(*arguments)
    assert run.code == 0, run.err
    record: Any = run.json()
    found = {row["target"]: row["attention_error"] for row in record["compared"]}
    assert list(found) == preview["targets"]
    longest = tiny.CASES["llama"][1]["max_position_embeddings"]
    assert set(found["a latent of 21+4 numbers"]) == {"64", str(longest // 64 * 64)}
    assert record["geometry"]["latent"] == {"rank": 21, "rotary": 4, "layout": "youtu"}
    assert max(found["a latent of 21+4 numbers"].values()) < 1e-6
    assert f"--latent {RANK + 1 + ROTARY} " in record["command"]


def test_a_run_that_goes_on_compares_no_more(
    llama_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    arguments: dict[str, Any] = {"latent": "48", "calibration": [text_file], **CALIBRATION}
    whole, out = tmp_path / "whole", tmp_path / "out"
    package.convert(llama_folder, whole, **arguments)
    with pytest.raises(Stop):
        package.convert(llama_folder, out, **arguments, progress=stop_at("folding layers", 1))
    kept = tmp_path / f".out.kvfold-partial/{KEPT}"
    rows = kept.read_text()
    for wrong in ("[]", rows.replace("+4 ", "+2 "), rows[:-3], '[{"target": "a"}]'):
        kept.write_text(wrong)
        with pytest.raises((InputError, RunError), match=f"{KEPT}.*"):
            package.convert(llama_folder, out, **arguments, resume=True)
    kept.write_text(rows)
    labels = []
    package.convert(
        llama_folder, out, **arguments, resume=True,
        progress=lambda label, done, total: labels.append(label),
    )  # fmt: skip
    assert "comparing what to fold to" not in labels
    assert "folding layers" in labels
    assert digests(out) == digests(whole)


@pytest.mark.parametrize(("fit", "layers_of"), [("none", "LAYERS"), ("local", "FITTED_LAYERS")])
def test_of_deep_models_layers_spread_over_the_depth_are_compared(
    fit: str,
    layers_of: str,
    llama_folder: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One part has its middle; the source runs on to its end, where predictions are compared."""
    layers = tiny.make("llama").config.num_hidden_layers
    folded, compared = [], []

    def spy(layer: StoredLayer, *others: Any) -> FoldedLayer:
        folded.append(layer.index)
        return fold_layer(layer, *others)

    monkeypatch.setattr(choose, "fold_layer", spy)
    monkeypatch.setattr(choose, layers_of, 1)
    monkeypatch.setattr(choose, "STEPS", 1)
    package.convert(
        llama_folder, tmp_path / "out", latent="48", calibration=[text_file],
        **CALIBRATION | {"fit": fit},
        progress=lambda label, done, total: compared.append((label, done, total)),
    )  # fmt: skip
    assert set(folded) == {layers // 2}
    last = [row for row in compared if row[0] == "comparing what to fold to"][-1]
    assert last[1:] == (layers, layers)


def test_predictions_decide_and_attention_where_they_are_alike(tmp_path: Path) -> None:
    targets: list[Target] = [Grouped(1), Latent(20, 4), Latent(16, 8)]
    for kls, errors, best in (
        (((0.1, 0.4), (0.2, 0.2), (0.1, 0.6)), (0.1, 0.9, 0.1), 1),
        (((1e-6, 0), (0, 0), (0.1, 0.1)), (0.1, 0.2, 0), 0),
    ):
        kept = tmp_path / f"{best}.json"
        rows = [
            Compared(target, {64: error, 128: error}, {64: short, 128: long})
            for target, error, (short, long) in zip(targets, errors, kls, strict=True)
        ]
        assert choose.choose(kept, targets, partial(list, rows))[0] == targets[best]


@torch.no_grad()
def test_what_predictions_lose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The divergence is that of the source with the same folded layers in it."""
    model = tiny.make("llama")
    checkpoint = open_checkpoint(tiny.save_with_tokenizer(model, tmp_path / "source"))
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(1, tiny.VOCABULARY, (4, 32), generator=generator)
    monkeypatch.setattr(choose, "PREDICTED", 24)  # which does not divide windows
    (found,) = choose.compare(checkpoint, [Grouped(1)], windows, method="first", fit="none", seed=0)
    folded = package.fold_model(model, 1, "first", "none").model
    for length, kl in found.kl.items():
        ids = windows.reshape(-1, length)
        wanted, got = (m(ids).logits.double().log_softmax(-1) for m in (model, folded))
        expected = (wanted.exp() * (wanted - got)).sum(-1).mean()
        # Predictions are float32 of logits of order one, behind a few layers.
        assert abs(kl - float(expected)) < 1e-5
        assert kl > 1e-3


def test_where_layers_are_fitted_they_are_compared_fitted_on_other_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(tiny.save_with_tokenizer(tiny.make("llama"), tmp_path / "source"))
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(1, tiny.VOCABULARY, (33, 64), generator=generator)
    fitted, read = [], []

    def fit(task: FitTask, progress: Progress) -> None:
        before = task.linear(task.output_name).weight.clone()
        fit_attention(task, progress)
        moved = not torch.equal(before, task.linear(task.output_name).weight)
        fitted.append((task.folded_inputs.shapes[TEXT], task.steps, moved))

    def text(checkpoint: Any, calibration: Calibration, load: Any) -> Any:
        read.append(calibration.windows)
        return made(checkpoint, calibration, load)

    made = choose._Text
    monkeypatch.setattr(choose, "fit_attention", fit)
    monkeypatch.setattr(choose, "_Text", text)
    targets: list[Target] = [Latent(20, 4, layout="youtu"), Grouped(1)]
    found = choose.compare(checkpoint, targets, windows, method="auto", fit="local", seed=0)
    assert fitted == [((16, 64), choose.STEPS, True)] * 2 * checkpoint.geometry.num_layers
    seen, short, long = read
    assert torch.equal(seen, windows[:16])
    assert torch.equal(short, windows[17:])
    assert torch.equal(long.flatten(), short.flatten())
    assert [set(each.errors) for each in found] == [{64, long.shape[1]}] * 2


def test_which_latents_are_compared() -> None:
    """Of 32 frequencies: those whose lowest hardly turn over long contexts, and fewer."""
    sizes = {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}
    config = {"model_type": "llama", "rms_norm_eps": 1e-5, **tiny.COMMON, **sizes}
    found = latents_of(BY_TYPE["llama"], config, 192, "youtu")
    labels = [latent.label for latent in found]
    words = ("176+16", "160+32", "152+40", "144+48", "136+56", "128+64", "160+32/2")
    assert labels == [f"a latent of {each} numbers" for each in words]
    with pytest.raises(InputError, match="--latent 24: expected 32 to 384 numbers"):
        latents_of(BY_TYPE["llama"], config, 24, "youtu")


def test_latents_that_a_layout_cannot_say_are_left_out() -> None:
    """Of Llama 3's frequencies only the highest are unscaled; where none is left, it is told."""
    scaling = {"rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0,
               "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 256}  # fmt: skip
    config = {"model_type": "llama", "rms_norm_eps": 1e-5, **tiny.COMMON, **tiny.WIDE}
    config["rope_parameters"] = scaling
    family = BY_TYPE["llama"]
    every = latents_of(family, config, 48, "youtu")
    some = latents_of(family, config, 48, "deepseek_v3")
    assert 0 < len(some) < len(every)
    assert {each.words for each in some} < {each.words for each in every}
    with pytest.raises(InputError, match="scaled"):
        latents_of(
            family, config | {"rope_parameters": scaling | {"rope_type": "yarn"}}, 48, "youtu"
        )
