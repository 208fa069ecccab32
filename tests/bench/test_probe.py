"""What a step is expected to take, from a few made-up layers."""

import json
from pathlib import Path
from typing import Any

import pytest

from kvfold.bench import probe
from kvfold.bench.probe import Counts, Prober
from kvfold.errors import InputError, UnsupportedError
from kvfold.plan.hardware import hardware_of
from kvfold.plan.model import read_model
from kvfold.plan.plan import USABLE, make_plan
from kvfold.plan.roofline import Load, memory
from tests.conftest import Kvfold
from tests.toolbox import tiny
from tests.toolbox.published import DEEPSEEK_V3


def prober(case: str, **changes: Any) -> Prober:
    config = tiny.make(case, **changes).config.to_dict()
    return Prober(config, read_model(config, case))


@pytest.mark.parametrize("layers", [1, 2, 3, 30, 80])
@pytest.mark.parametrize("layer_bytes", [1e3, 1e7, 1e12])
def test_what_grows_with_layers_is_found_exactly(layers: int, layer_bytes: float) -> None:
    """Two points of a line tell all of it; and no more layers are timed than need be."""
    counts = Counts.of(layers, layer_bytes)
    assert 1 <= counts.fewer < counts.few <= max(2, layers)
    assert counts.extrapolate(5 + 2 * counts.fewer, 5 + 2 * counts.few, layers) == 5 + 2 * layers


def test_layers_of_each_kind_count_for_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A base of 10, 3 for a full layer, 1 for a sliding one."""
    cost = {"full": 3.0, "sliding": 1.0}

    def times(
        self: Prober, kind: str, kv_heads: int, load: Load, counts: Counts
    ) -> tuple[float, float]:
        return 10 + cost[kind] * counts.fewer, 10 + cost[kind] * counts.few

    monkeypatch.setattr(Prober, "_times", times)
    kinds = ["sliding_attention"] * 5 + ["full_attention"] * 2
    found = prober("gemma3_text", num_hidden_layers=7, layer_types=kinds).step(2, Load(64, 1))
    assert found == pytest.approx(10 + 5 * 1 + 2 * 3)


@pytest.mark.parametrize("dtype", ["bf16", "int4"])
@pytest.mark.parametrize("case", ["llama", "mistral", "gemma3_text", "qwen3", "phi3", "gemma2"])
def test_families_are_timed(case: str, dtype: str) -> None:
    """The small models are what they should be, and run; a step takes some time."""
    found = prober(case)
    assert 0 < found.step(1, Load(40, 2, dtype)) < 5
    config = found._sized("full", 1, 3)
    assert (config.num_hidden_layers, config.num_key_value_heads) == (3, 1)


def test_what_cannot_be_timed_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="latent"):
        Prober(DEEPSEEK_V3, read_model(DEEPSEEK_V3, "deepseek"))
    unknown = tiny.COMMON | {"model_type": "nothing-like-it"}
    with pytest.raises(UnsupportedError, match="nothing-like-it"):
        Prober(unknown, read_model(unknown, "unknown"))
    gpt2 = tiny.build("gpt2", tiny.GPT2).config.to_dict()
    with pytest.raises(InputError, match="has 128 positions"):
        Prober(gpt2, read_model(gpt2, "gpt2")).step(6, Load(120, 1))
    assert Prober(gpt2, read_model(gpt2, "gpt2")).step(6, Load(113, 1)) > 0
    with pytest.raises(UnsupportedError, match="fewer KV heads"):
        Prober(gpt2, read_model(gpt2, "gpt2")).step(1, Load(40, 1))


def test_options_that_do_not_fit_are_not_timed() -> None:
    config = tiny.make("llama").config.to_dict()
    asked = []

    def expect(kv_heads: int, load: Load) -> float:
        asked.append((kv_heads, load.kv_dtype))
        return 0.5

    model, load = read_model(config, "tiny"), Load(9000, 1, "fp32")
    needed = [memory(model.with_kv_heads(heads), load).total for heads in (2, 1)]
    machine = hardware_of(None, memory=sum(needed) / 2 / USABLE / 1e9, bandwidth=1)
    plan = make_plan(model, load, machine, [2, 1], ["fp32"], expect)
    assert [option.fits for option in plan.options] == [False, True]
    assert asked == [(1, "fp32")]
    assert [option.expected for option in plan.options] == [None, 0.5]


def test_the_command(kvfold: Kvfold, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_ROUNDS", 2)
    config = tiny.make("llama").config.to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))
    arguments = ["plan", tmp_path, "--gpu", "here", "--probe", "--kv-dtype", "bf16,int8"]
    run = kvfold(*arguments)
    assert run.code == 0, run.err
    assert "here ms" in run.out
    found: Any = kvfold(*arguments, "--json").json()
    assert all(option["expected"] > 0 for option in found["options"])
    refused = kvfold("plan", tmp_path, "--gpu", "h100", "--probe")
    assert refused.code == 2
    assert "--gpu here" in refused.err
    assert "leave one" in kvfold("plan", tmp_path, "--gpu", "here", "--probe", "--fit").err
