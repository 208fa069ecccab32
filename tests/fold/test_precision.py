"""Layers that multiply in bfloat16: how far off they are, what stays float32, who decides."""

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from kvfold.fold.fit import FitTask, sums_of_products
from kvfold.fold.hidden import TEXT, HiddenStates, Windows
from kvfold.fold.model import fold_model
from kvfold.fold.passes import Calibration, FoldedPass, SourcePass, loader
from kvfold.fold.statistics import LayerStatistics, StatisticsCollector
from kvfold.fold.stored_layer import StoredLayer
from kvfold.fold.stream import AttentionCall, LayerStream
from kvfold.kernels.torch.trained import trained
from kvfold.quality.device import has_bf16, pick_dtype
from tests.conftest import Kvfold
from tests.toolbox import tiny

CPU = torch.device("cpu")
EPSILON = torch.finfo(torch.bfloat16).eps  # 2^-7; rounding errs by half of it at most


@pytest.mark.parametrize("case", ["llama", "qwen3", "gemma2", "phi3", "phi"])
def test_a_layer_errs_by_what_bfloat16_rounds(case: str) -> None:
    """Six rounded products and their inputs, at random: an error of 6 half epsilons at the most
    likely, relative to what the layer adds; float32 would pass a thousandth of it."""
    model = tiny.make(case)
    checkpoint = tiny.checkpoint_of(model)
    layer, family = StoredLayer(checkpoint, 0), checkpoint.family
    added = {}
    for dtype in (torch.float32, torch.bfloat16):
        states = HiddenStates([(4, 32)], checkpoint.geometry.hidden_size, CPU)
        stream = LayerStream(checkpoint.config, family, CPU, dtype)
        stream.start([tiny.tokens(4, 32, seed=5)], loader(checkpoint), states)
        inputs = states[Windows(TEXT, slice(None))]
        with torch.no_grad(), stream.layer(0, layer.below()) as live:
            found = live(inputs)
            assert found.dtype == torch.float32
            assert live.attention_of(inputs).dtype == torch.float32
        added[dtype] = found - inputs
    exact = added[torch.float32]
    error = (added[torch.bfloat16] - exact).norm() / exact.norm()
    assert 1e-3 * EPSILON < error < 3 * EPSILON


def test_statistics_hear_float32() -> None:
    """And compute in it: nothing of theirs is rounded."""
    checkpoint = tiny.checkpoint_of(tiny.make("llama"))
    seen: list[AttentionCall] = []
    calibration = Calibration(tiny.tokens(4, 32, seed=5), dtype=torch.bfloat16)
    source = SourcePass(checkpoint, calibration, loader(checkpoint))
    layer = StoredLayer(checkpoint, 0)

    class Listening(StatisticsCollector):
        def call(self, call: AttentionCall) -> None:
            seen.append(call)
            assert not torch.is_autocast_enabled("cpu")
            super().call(call)

    collector = Listening(checkpoint.geometry.hidden_size, layer.pairs, CPU, None)
    source.run(layer, None, collector)
    result: LayerStatistics = collector.result()
    assert seen
    assert {part.dtype for call in seen for part in (call.query, call.key, call.value)} == {
        torch.float32
    }
    assert result.moment.dtype == torch.float64


@pytest.mark.parametrize("fit", ["refit", "local"])
def test_what_is_fitted_in_it_is_as_good(fit: str) -> None:
    """Layers' errors are those of a fit in float32 but for some percent, weights stay float32."""
    model, windows = tiny.make("llama"), tiny.tokens(16, 32, seed=5)
    ends = {}
    for dtype in ("float32", "bfloat16"):
        folded = fold_model(model, 1, "pca", fit, windows, dtype=dtype)
        ends[dtype] = [layer["stages"][-1]["error_after"] for layer in folded.record]
        assert next(folded.model.parameters()).dtype == torch.float32
    assert ends["bfloat16"] == pytest.approx(ends["float32"], rel=0.05)
    assert ends["bfloat16"] != ends["float32"]


def precision() -> str:
    """What float32 is multiplied in on CPUs."""
    torch.get_float32_matmul_precision()  # which fails where the setting contradicts itself
    setting = cast(Any, torch.backends.mkldnn).matmul
    found: str = setting.fp32_precision
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_products_are_those_of_float32(dtype: torch.dtype) -> None:
    """Of n products, each rounded once, and of sums, n - 1 times: n half epsilons of float32; y in
    two parts leaves out 2^-18."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 40, generator=generator).to(dtype)
    y = torch.randn(300, 24, generator=generator)
    before = precision()
    found = sums_of_products(x, y)
    assert precision() == before
    wide = x.double()
    for sums, other in zip(found, (wide, y.double()), strict=True):
        bound = (300 * 2.0**-24 + 2.0**-18) * (wide.abs().T @ other.abs())
        assert sums.dtype == torch.float32
        assert bool(((sums.double() - wide.T @ other).abs() <= bound).all())


def test_sums_of_products_leave_no_setting_behind() -> None:
    before = precision()
    with pytest.raises(RuntimeError):
        sums_of_products(torch.ones(3, 2, dtype=torch.bfloat16), torch.ones(4, 2))
    assert precision() == before


def test_a_task_is_given_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """But what a layer multiplies, which is as it is multiplied."""
    seen = []

    def stage(task: FitTask, progress: object) -> None:
        states = task.folded_inputs[Windows(TEXT, slice(0, 2))]
        linear = task.linear(task.output_name)
        multiplied = task.live.input_of(linear, states)
        seen.append((states.dtype, linear.weight.dtype, multiplied.dtype))

    monkeypatch.setitem(FoldedPass.fit.__globals__["FITS"], "refit", (stage,))
    fold_model(tiny.make("llama"), 1, "pca", "refit", tiny.tokens(8, 32, seed=5), dtype="bfloat16")
    assert seen == [(torch.float32, torch.float32, torch.bfloat16)] * 2


def test_gradients_in_it_are_made_of_products(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(*given: Any) -> torch.Tensor:
        seen.append({x.dtype for x in given[:3]})
        return trained(*given)

    monkeypatch.setattr("kvfold.fold.stream.trained", spy)
    model, windows = tiny.make("llama"), tiny.tokens(4, 32, seed=5)
    fold_model(model, 1, "pca", "local", windows, dtype="float32", fit_steps=2)
    assert not seen
    fold_model(model, 1, "pca", "local", windows, dtype="bfloat16", fit_steps=2)
    assert seen == [{torch.bfloat16}] * 2 * model.config.num_hidden_layers  # not of first tokens


@pytest.mark.parametrize(
    ("has", "wanted"),
    [
        ({}, False),
        ({"avx512_f": True, "avx512_bf16": False}, False),
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True}, True),
    ],
)
def test_it_is_the_default_where_hardware_has_it(
    has: dict[str, bool], wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    assert has_bf16(CPU) is wanted
    assert has_bf16(torch.device("meta")) is False
    monkeypatch.setattr("kvfold.quality.device.has_bf16", has_bf16)
    assert pick_dtype(None, CPU) == (torch.bfloat16 if wanted else torch.float32)
    assert pick_dtype("float32", CPU) == torch.float32
    assert pick_dtype("bfloat16", CPU) == torch.bfloat16


def test_the_command_takes_both(kvfold: Kvfold, llama_folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(tiny.words(3000, 0).split()))
    out = tmp_path / "out"
    ran = kvfold("convert", llama_folder, out, "--kv-heads", 1, "--calibration", text,
                 "--device", "cpu", "--dtype", "bfloat16", "--context", 64)  # fmt: skip
    assert ran.code == 0, ran.err
    record = json.loads((out / "kvfold.json").read_text())
    assert "--dtype bfloat16" in record["command"]
    assert record["computed"] == {"device": "cpu", "dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--device", "cuda:7"), "--device cuda:7 cannot be used"),
        (("--device", "meta"), "it holds no numbers"),
        (("--dtype", "float16"), "'--dtype': 'float16' is not one of"),
    ],
)
def test_bad_input(
    options: tuple[str, str], said: str, kvfold: Kvfold, llama_folder: Path, tmp_path: Path
) -> None:
    ran = kvfold("convert", llama_folder, tmp_path / "out", "--kv-heads", 1, *options)
    assert ran.code == 2
    assert said in ran.err
    assert len(ran.err.strip().splitlines()) <= 2
    assert list(tmp_path.iterdir()) == []
