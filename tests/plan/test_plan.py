"""The planner: sizes against published models and real ones, bounds against arithmetic by hand."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvfold.arch.families import family_of
from kvfold.arch.target import Latent
from kvfold.cache.kv import KVCache
from kvfold.errors import InputError
from kvfold.ops.select import Select
from kvfold.plan import evidence
from kvfold.plan.hardware import TABLE, hardware_of
from kvfold.plan.model import Model, read_model
from kvfold.plan.plan import make_plan
from kvfold.plan.roofline import (
    KV_BITS,
    Load,
    decode_step,
    kv_bytes_per_token,
    kv_cache_bytes,
    largest,
    memory,
    prefill,
)
from kvfold.plan.source import open_model
from tests.conftest import Kvfold
from tests.toolbox import tiny
from tests.toolbox.cache_cases import PLAIN
from tests.toolbox.published import (
    DEEPSEEK_V3,
    GEMMA2_9B,
    LLAMA2_7B,
    LLAMA3_8B,
    MAVERICK,
    MIXTRAL,
    NEOX_20B,
    SCOUT,
)

ROOT = Path(__file__).parents[2]
H100 = hardware_of("h100")


@pytest.mark.parametrize(
    ("config", "billions", "active"),
    [
        (LLAMA2_7B, 6.74, 6.74),
        (LLAMA3_8B, 8.03, 8.03),
        (MIXTRAL, 46.7, 12.9),
        (DEEPSEEK_V3, 671, 37),
        (NEOX_20B, 20.6, 20.6),
        (GEMMA2_9B, 9.24, 9.24),
        (SCOUT, 107.8, 17.2),  # 109 with the vision part, which is not counted
        (MAVERICK, 400.7, 17.2),
    ],
    ids=lambda value: value.get("model_type", "llama4") if isinstance(value, dict) else None,
)
def test_parameters_are_those_that_the_makers_state(
    config: dict[str, Any], billions: float, active: float
) -> None:
    model = read_model(config, "x")
    assert model.parameters / 1e9 == pytest.approx(billions, rel=0.01)
    assert model.active_parameters / 1e9 == pytest.approx(active, rel=0.02)
    assert model.estimated


@pytest.mark.parametrize(
    ("config", "numbers"),
    [
        (LLAMA2_7B, 32 * 2 * 32 * 128),
        (LLAMA3_8B, 32 * 2 * 8 * 128),
        (DEEPSEEK_V3, 61 * (512 + 64)),
        (NEOX_20B, 44 * 2 * 64 * 96),
        ({**NEOX_20B, "multi_query": True}, 44 * 2 * 96),
    ],
    ids=["mha", "gqa", "mla", "no-field", "mqa-flag"],
)
def test_cache_per_token(config: dict[str, Any], numbers: int) -> None:
    model = read_model(config, "x")
    assert kv_bytes_per_token(model, "bf16") == 2 * numbers
    assert kv_bytes_per_token(model, "int4") == 4.5 / 8 * numbers


def test_sliding_layers_keep_their_window() -> None:
    model = read_model(GEMMA2_9B, "x")
    assert model.kinds == {"sliding": 21, "full": 21}
    per_layer = 2 * 8 * 256 * 2
    assert kv_cache_bytes(model, Load(32_768, 2)) == 2 * 21 * per_layer * (32_768 + 4096)
    assert kv_cache_bytes(model, Load(1000, 1)) == 42 * per_layer * 1000
    assert read_model(SCOUT, "x").kinds == {"sliding": 36, "full": 12}
    listed = {**SCOUT["text_config"], "no_rope_layers": [1, 0] * 24}
    assert read_model(listed, "x").kinds == {"sliding": 24, "full": 24}


@pytest.mark.parametrize("case", ["llama", "gemma2", "qwen3", "phi3", "mistral", "gemma3_text"])
def test_every_readable_family_is_counted_right(case: str, tmp_path: Path) -> None:
    """Parameters from the headers; cache against what transformers' own cache allocates."""
    net = tiny.make(case)
    model = open_model(tiny.save_with_tokenizer(net, tmp_path / case))
    stored = {id(p): p.numel() for p in net.parameters()}
    assert not model.estimated
    assert model.parameters == sum(stored.values())
    cache = net(tiny.tokens(1, 10), use_cache=True).past_key_values
    held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert kv_cache_bytes(model, Load(10, 1, "fp32")) == 4 * held


@pytest.mark.parametrize("dtype", KV_BITS)
def test_bits_of_a_format_are_what_the_cache_takes(dtype: str) -> None:
    """Within 1% of memory that is really allocated."""
    cache = KVCache(2, 128, dtype=dtype, max_length=4096, exact_first=0, exact_recent=0)
    predicted = 4096 * 2 * (128 + 128) * KV_BITS[dtype] / 8
    assert cache.nbytes == pytest.approx(predicted, rel=0.01)


@pytest.mark.parametrize("dtype", sorted(KV_BITS))
def test_selection_is_counted_as_a_cache_counts_it(dtype: str) -> None:
    """A step's bytes and the memory, of heads of 128 in pages of 64 tokens, far from the ends."""
    model = read_model(LLAMA3_8B, "x")
    layers, context = len(model.layers), 1 << 16
    whole, read = (Load(context, 1, dtype, select=share) for share in (None, 0.25))
    select = Select(budget=0.25, sinks=0, recent=0)
    cache = KVCache(8, 128, dtype=dtype, kind="paged", select=select, **PLAIN)
    k = torch.zeros(1, 8, 4096, 128)
    cache.append(k, k)
    told = cache._storage.main.summary_bytes / 64 * context * layers
    assert kv_cache_bytes(model, read) - kv_cache_bytes(model, whole) == pytest.approx(
        told, rel=0.02
    )  # scales
    machine = replace(H100, flops=None)
    weights = decode_step(model, replace(whole, context=0), machine).seconds
    step = (decode_step(model, read, machine).seconds - weights) * machine.bandwidth
    assert step == pytest.approx(cache.bytes_per_step * layers * context / 4096, rel=0.01)


def test_eviction_is_counted_as_a_cache_counts_it() -> None:
    """Kept and read; while a prompt goes through it, one layer is there as a whole."""
    model = read_model(LLAMA3_8B, "x")
    whole, kept, both = (
        Load(4096, 1, "int8", evict=evict, select=select)
        for evict, select in ((None, None), (0.25, None), (0.25, 0.5))
    )
    cache = KVCache(8, 128, dtype="int8", kind="paged")
    k = torch.randn(1, 8, 4096, 128)
    cache.append(k, k)
    cache.evict(0.25)
    layers = len(model.layers)
    assert kv_cache_bytes(model, kept) == pytest.approx(cache.nbytes * layers, rel=0.01)
    assert kv_cache_bytes(model, kept) == kv_cache_bytes(model, whole) / 4
    beside = memory(model, kept).activations - memory(model, whole).activations
    assert beside == pytest.approx(0.75 * kv_cache_bytes(model, whole) / layers)
    machine = replace(H100, flops=None)
    weights = decode_step(model, replace(whole, context=0), machine).seconds
    read = (decode_step(model, kept, machine).seconds - weights) * machine.bandwidth
    assert read == pytest.approx(kv_cache_bytes(model, kept))
    assert decode_step(model, both, machine).seconds < decode_step(model, kept, machine).seconds
    assert prefill(model, kept, machine) == prefill(model, whole, machine)


def test_what_eviction_costs_is_told() -> None:
    chosen = plan(LLAMA3_8B, context=32_768, batch=16, evict=0.5).recommendation.reasons
    assert any(reason.startswith("quality, eviction: measured is") for reason in chosen)


def test_what_selection_costs_is_told() -> None:
    chosen = plan(LLAMA3_8B, context=32_768, batch=16, select=0.25).recommendation.reasons
    assert any(reason.startswith("quality, selection: measured is") for reason in chosen)
    dense = plan(LLAMA3_8B, context=64, batch=1).recommendation.reasons
    assert not any("selection" in reason for reason in dense)


def test_a_step_reads_weights_and_cache_once() -> None:
    model = read_model(LLAMA3_8B, "x")
    load = Load(8192, 4)
    cache = 4 * 8192 * 32 * 2 * 8 * 128 * 2
    step = decode_step(model, load, H100)
    assert step.binds == "memory"
    assert step.seconds == pytest.approx((model.weight_bytes + cache) / 3.35e12)
    everything = memory(model, load)
    assert everything.kv_cache == cache
    assert everything.weights == model.weight_bytes == 2 * model.parameters


def test_prompts_are_bound_by_arithmetic() -> None:
    model = read_model(LLAMA3_8B, "x")
    found = prefill(model, Load(8192, 1), H100)
    attention = 32 * 2 * 32 * 8192 * 8192 * 256 / 2
    assert found.binds == "arithmetic"
    assert found.seconds == pytest.approx((2 * model.parameters * 8192 + attention) / 989e12)


def test_a_machine_without_published_flops_is_bound_by_memory() -> None:
    model = read_model(LLAMA3_8B, "x")
    assert prefill(model, Load(8192, 1), hardware_of("m2-ultra")).binds == "memory"


def test_experts_that_nobody_chose_are_not_read() -> None:
    model = read_model(MIXTRAL, "x")
    one, many = (decode_step(model, Load(1, batch), H100).seconds for batch in (1, 64))
    assert one == pytest.approx(2 * model.active_parameters / 3.35e12, rel=0.01)
    assert many == pytest.approx(2 * model.parameters / 3.35e12, rel=0.02)


@given(st.sampled_from([1, 2, 4, 8, 16]), st.integers(1, 100_000), st.integers(1, 64))
def test_fewer_heads_and_bits_never_cost_more(heads: int, context: int, batch: int) -> None:
    model = read_model(LLAMA2_7B, "x")
    folded = model.with_kv_heads(heads)
    load = Load(context, batch)
    assert memory(folded, load).total < memory(model, load).total
    assert decode_step(folded, load, H100).seconds <= decode_step(model, load, H100).seconds
    smaller = Load(context, batch, "int4")
    assert memory(model, smaller).total < memory(model, load).total


def test_gpus_share_heads_until_there_is_one_each() -> None:
    model = read_model(LLAMA3_8B, "x")  # 8 KV heads
    alone = kv_bytes_per_token(model, "bf16")
    assert [alone / kv_bytes_per_token(model, "bf16", n) for n in (1, 2, 4, 8, 16)] == [
        1,
        2,
        4,
        8,
        8,
    ]
    latent = read_model(DEEPSEEK_V3, "x")
    assert kv_bytes_per_token(latent, "bf16", 8) == kv_bytes_per_token(latent, "bf16")


@given(st.integers(0, 10**6))
def test_the_largest_that_fits(limit: int) -> None:
    assert largest(lambda n: n <= limit) == limit


def plan(config: dict[str, Any], machine: str = "h100", **load: Any) -> Any:
    return make_plan(read_model(config, "x"), Load(**load), hardware_of(machine))


def test_what_fits_really_fits_and_one_more_does_not() -> None:
    found = plan(LLAMA2_7B, "rtx4090", context=4096, batch=4)
    model = read_model(LLAMA2_7B, "x")
    for option in found.options:
        folded = model.with_kv_heads(option.kv_heads)
        room = 0.9 * hardware_of("rtx4090").memory
        at, beyond = (
            memory(folded, Load(4096, option.largest_batch + more, option.kv_dtype)).total
            for more in (0, 1)
        )
        assert at <= room < beyond


def test_a_light_cache_is_left_alone_and_a_heavy_one_is_not() -> None:
    light = plan(LLAMA3_8B, context=2048, batch=1).recommendation.option
    assert (light.kv_heads, light.kv_dtype) == (8, "bf16")
    heavy = plan(LLAMA2_7B, context=32_768, batch=16).recommendation
    assert heavy.option.fits
    assert heavy.option.kv_dtype != "bf16" or heavy.option.kv_heads < 32
    assert any("SmolLM2" in reason for reason in heavy.reasons)
    nothing = plan(DEEPSEEK_V3, "rtx4090", context=1024, batch=1).recommendation
    assert "nothing fits" in nothing.reasons[0]


def test_evidence_is_what_the_benchmarks_say() -> None:
    """No number without a measurement."""
    pages = (ROOT / "benchmarks" / name for name in ("README.md", "LOG.md"))
    text = "".join(page.read_text() for page in pages)
    for row in evidence.FOLDED:
        assert f"{row.similar:.2f}" in text
        assert f"{row.other:.2f}" in text
    lines = (ROOT / "benchmarks" / "cache_quality.jsonl").read_text().splitlines()
    rows: list[Any] = [json.loads(line) for line in lines]
    latest = {(row["text"], row["cache"]): row for row in rows}
    for name, words in evidence.CACHES.items():
        worst = max(
            (row for (_, cache), row in latest.items() if cache == f"kvfold {name}"),
            key=lambda row: row["kl"],
        )
        assert f"{worst['kl']:.4f}" in words or f"{worst['perplexity_ratio']:.3f}" in words, name


def test_every_machine_says_where_its_numbers_are_from() -> None:
    for machine in TABLE.values():
        assert machine.source
        assert machine.memory >= 24e9
        assert 50e9 < machine.bandwidth < 10e12
        assert machine.flops is None or 50e12 < machine.flops < 5e15


# -- latents --------------------------------------------------------------------------------


def test_a_latent_has_the_weights_that_its_own_config_says() -> None:
    target, config = Latent(512, 64), LLAMA2_7B | {"rms_norm_eps": 1e-5}
    planned = read_model(config, "x").with_latent(target, config)
    stored = read_model(target.config(family_of(config), config), "x")
    assert stored.layers == planned.layers
    assert stored.parameters == planned.parameters
    assert kv_bytes_per_token(planned, "bf16") == 2 * 32 * (512 + 64)


def test_a_step_over_latents_is_bound_by_arithmetic_that_all_heads_do() -> None:
    model = read_model(LLAMA2_7B, "x").with_latent(Latent(512, 64), LLAMA2_7B)
    load = Load(context=32_768, batch=64)
    products = 2 * 32 * 32 * (512 + 64 + 512)  # layers, heads, q k and weights times v
    slow = replace(H100, flops=1e14)
    assert decode_step(model, load, slow).binds == "arithmetic"
    flops = 64 * (2 * model.active_parameters + products * 32_768)
    assert decode_step(model, load, slow).seconds == pytest.approx(flops / 1e14)
    layer = model.layers[0]  # whose keys and values prompts expand it to
    assert layer.head_dim + layer.v_head_dim < 512 + 64 + 512
    pairs = 32 * 32 * (layer.head_dim + layer.v_head_dim) * 64 * 32_768**2
    flops = 2 * model.active_parameters * 64 * 32_768 + pairs
    assert prefill(model, load, slow).seconds == pytest.approx(flops / 1e14)


def test_latents_stand_beside_heads(kvfold: Kvfold, config_folder: Path) -> None:
    asked = ["plan", config_folder, "--gpu", "h100", "--latent", "512+64,960+64", "--kv-heads"]
    run = kvfold(*asked, "32,8")
    assert run.code == 0, run.err
    assert "960+64" in run.out
    everything: Any = kvfold(*asked, "32,8", "--json").json()
    found = everything["options"]
    assert [(o["kv_heads"], o["latent"]) for o in found[::3]] == [
        (32, None), (8, None), (1, "512+64"), (1, "960+64"),
    ]  # fmt: skip
    assert [o["kv_numbers"] for o in found[::3]] == [32 * n for n in (8192, 2048, 576, 1024)]
    only: Any = kvfold(*asked, 1, "--json").json()
    chosen = only["recommendation"]
    assert chosen["latent"] == "960+64"  # milder than a head of 256 numbers, and it fits
    assert any("--latent 960+64" in reason for reason in chosen["reasons"])
    assert any("quality, latent" in reason for reason in chosen["reasons"])


@pytest.mark.parametrize(
    ("config", "latent", "message"),
    [
        (LLAMA2_7B | {"num_key_value_heads": 1}, "512+64", "225% of the source's 256"),
        (LLAMA2_7B, "512", "expected RANK+ROTARY"),
        (LLAMA2_7B, "512+130", "rotary size"),
        (DEEPSEEK_V3, "256+64", "latent vectors (MLA) already"),
    ],
)
def test_latents_that_cannot_be(
    kvfold: Kvfold, tmp_path: Path, config: dict[str, Any], latent: str, message: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    run = kvfold("plan", tmp_path, "--gpu", "h100", "--latent", latent)
    assert run.code == 2
    assert message in run.err
    assert "hint: " in run.err


# -- command --------------------------------------------------------------------------------


@pytest.fixture
def config_folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA2_7B))
    return tmp_path


def test_the_command_needs_no_weights(kvfold: Kvfold, config_folder: Path) -> None:
    arguments = ["plan", config_folder, "--gpu", "h100", "--context", "32Ki", "--batch", 8]
    run = kvfold(*arguments)
    assert run.code == 0, run.err
    for word in ("estimated", "int4", "> ", "bound", "memory", "SmolLM2"):
        assert word in run.out
    as_json: Any = kvfold(*arguments, "--json", "--kv-heads", "32,8").json()
    assert {o["kv_heads"] for o in as_json["options"]} == {32, 8}
    assert as_json["recommendation"]["reasons"]
    assert "context" in kvfold(*arguments, "--fit").out
    assert "data sheet" in kvfold("plan", "--gpu", "list").out
    here = kvfold("plan", config_folder, "--gpu", "here")
    assert here.code == 0
    assert "measured just now" in here.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "which machine?"),
        (["--gpu", "h10"], "did you mean h100?"),
        (["--memory", 10], "which machine?"),
        (["--gpu", "h100", "--kv-heads", 5], "does not divide"),
        (["--gpu", "h100", "--kv-dtype", "int3"], "--kv-dtype int3: no such choice"),
        (["--gpu", "h100", "--context", "long"], "expected a whole number"),
        (["--gpu", "h100", "--select", 0], "--select 0: expected a number, above 0"),
        (["--gpu", "here", "--probe", "--select", 0.5], "--probe times caches that are read as"),
        (["--gpu", "h100", "--gpus", 0], "--gpus 0: expected a whole number, at least 1"),
    ],
)
def test_bad_input(
    options: list[object], message: str, kvfold: Kvfold, config_folder: Path
) -> None:
    run = kvfold("plan", config_folder, *options)
    assert run.code == 2
    assert message in run.err
    assert "hint: " in run.err


def test_configs_without_heads_are_refused(kvfold: Kvfold, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "resnet"}')
    run = kvfold("plan", tmp_path, "--gpu", "h100")
    assert run.code == 2
    assert "no num_attention_heads" in run.err
    with pytest.raises(InputError, match="latent vectors"):
        make_plan(read_model(DEEPSEEK_V3, "x"), Load(1, 1), H100, kv_heads=[8])


def test_planning_imports_no_torch(config_folder: Path) -> None:
    code = (
        "import sys; from kvfold.cli.main import main; "
        f"main(['plan', {str(config_folder)!r}, '--gpu', 'h100']); "
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_a_model_of_another_dtype_is_weighed_as_stored(tmp_path: Path) -> None:
    net = tiny.make("llama").to(torch.bfloat16)
    model: Model = open_model(tiny.save_with_tokenizer(net, tmp_path / "half"))
    assert model.weight_bytes == 2 * model.parameters
