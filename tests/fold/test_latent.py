"""Folding to latent attention: exact where the source is one in disguise."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import kvfold as package
from kvfold.arch.families import family_of
from kvfold.arch.latent import LatentWeights
from kvfold.arch.target import Latent
from kvfold.checkpoint.source import open_checkpoint
from kvfold.errors import InputError, UnsupportedError
from kvfold.fold.constant import CONSTANT, constant_direction, with_constant
from kvfold.fold.latent import _in_two_steps
from kvfold.fold.latents import SharedLatent
from kvfold.fold.methods import methods_for
from kvfold.fold.model import fold_model
from kvfold.report.maps import look
from tests.conftest import Kvfold
from tests.toolbox import tiny
from tests.toolbox.runs import CALIBRATION, Stop, digests, stop_at

# Rounding costs 1e-6 of logits of order one in two layers of float32. The constant in the latent
# (fold.constant) adds |c|^2 / 2 s^2 of what attention puts out: rows of RMS 0.15 and inputs of
# length 7 make 20 numbers of a length of 5, so 2e-7 at s = 8,192. A hundred times the larger, as
# tests of heads allow.
TOLERANCE = 1e-4
RANK, ROTARY = 20, 4
# The published methods rotate both halves of pairs alike, and do not find heads that were turned.
METHODS = [method.name for method in methods_for("auto", Latent(RANK, ROTARY), "none")]
DISGUISED = ["llama", "llama-wide-tied", "llama-odd", "smollm3", "phi3", "granite"]
DISGUISED += ["ernie4_5", "glm", "helium"]  # interleaved pairs; of glm half of a head rotates


def exact(case: str, **changes: Any) -> Latent:
    """The target that a model in disguise folds to without loss."""
    rotary = 8 if case in ("llama-wide-tied", "ernie4_5") else ROTARY
    return replace(Latent(RANK + 1, rotary, layout="youtu"), **changes)


def apart(one: Any, other: Any) -> float:
    ids = tiny.tokens()
    return float((tiny.logits(one, ids) - tiny.logits(other, ids)).abs().max())


@pytest.mark.parametrize("case", DISGUISED)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("calibrated", [False, True], ids=["data-free", "calibrated"])
def test_a_latent_in_disguise_folds_back_to_its_logits(
    case: str, method: str, calibrated: bool
) -> None:
    source = tiny.hidden_mla(case, RANK)
    windows = tiny.tokens(8, 32, seed=5) if calibrated else None
    folded = fold_model(source, exact(case), method, "none", windows)
    assert apart(folded.model, source) < TOLERANCE
    for layer in folded.record:
        assert layer["captured_value"] > 1 - 1e-6
        assert layer["captured_key"] > 1 - 1e-6


def test_one_number_less_is_not_exact() -> None:
    source = tiny.hidden_mla("llama", RANK)
    folded = fold_model(source, exact("llama", rank=RANK), "latent", "none").model
    assert apart(folded, source) > 100 * TOLERANCE


def test_padding_changes_nothing() -> None:
    """Zeros behind the latent and behind the rotary key, whose frequencies stay."""
    source = tiny.make("llama", num_key_value_heads=6)
    plain = fold_model(source, Latent(40, 4, layout="youtu"), "latent", "none").model
    padded = Latent(40, 4, layout="youtu", padded=(64, 12))
    wide = fold_model(source, padded, "latent", "none").model
    assert wide.config.kv_lora_rank == 64
    assert wide.config.qk_rope_head_dim == 12
    # The same sums in another order, and powers of theta that are rounded otherwise.
    assert apart(plain, wide) < TOLERANCE


@pytest.mark.parametrize("fit", ["none", "refit", "local"])
@pytest.mark.parametrize("layout", ["youtu", "deepseek_v3", "portable"])
def test_fitting_does_not_spoil_an_exact_fold(fit: str, layout: str) -> None:
    """Without biases a direction of the input stands for 1, here to some parts in ten thousand.

    The bound for ``local``, which takes steps of one size wherever it starts, is that of heads.
    """
    source = tiny.hidden_mla("llama", RANK)
    with torch.no_grad():
        source.model.embed_tokens.weight[:, 0] = 30.0
    windows = tiny.tokens(16, 64, seed=5)
    folded = fold_model(source, exact("llama", layout=layout), "latent", fit, windows).model
    bound = TOLERANCE if layout == "youtu" else 10 * TOLERANCE
    assert apart(folded, source) < (0.1 if fit == "local" else bound)


# -- the constant -------------------------------------------------------------------------------


def random_latent(generator: torch.Generator) -> tuple[SharedLatent, torch.Tensor]:
    """A latent of 7 numbers, and inputs ``[T, X]`` with u . x = 1 for some u."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shared = SharedLatent(
        q_rope=random(3, 4, 13),
        k_rope=random(4, 13),
        q_nope=random(3, 5, 13),
        down=random(7, 13),
        up_k=random(3, 5, 8),
        up_v=random(3, 6, 8),
        o=random(3, 12, 6),
    )
    shared.q_rope[..., -1] = shared.q_nope[..., -1] = 0  # queries without biases
    inputs = random(500, 13)
    inputs[:, -1] = 1
    inputs[:, 3] = 2.0  # u is half of that direction
    return shared, inputs


def read(weights: LatentWeights, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Queries, keys, values and outputs as a DeepSeek attention makes them of ``[T, C]``."""
    if weights.q_a is not None:
        assert weights.q_norm is not None
        first = x @ weights.q_a.mT
        x_q = first / first.square().mean(-1, keepdim=True).sqrt() * weights.q_norm
    else:
        x_q = x
    q = torch.einsum("hdx,tx->htd", weights.q, x_q)
    made = x @ weights.kv_a.mT
    if weights.kv_a_bias is not None:
        made = made + weights.kv_a_bias
    latent, k_rope = made[:, : len(weights.norm)], made[:, len(weights.norm) :]
    latent = latent / latent.square().mean(-1, keepdim=True).sqrt() * weights.norm
    return q, k_rope, torch.einsum("hdr,tr->htd", weights.kv_b, latent)


@pytest.mark.parametrize("bias", [False, True])
def test_the_norm_of_the_latent_is_undone(bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shared, inputs = random_latent(generator)
    moment = inputs.T @ inputs / len(inputs)
    direction = None if bias else constant_direction(moment, moment)
    weights = with_constant(shared, None, direction, moment)
    x = inputs[:, :-1]
    q, k_rope, kv = read(weights, x)
    latent = torch.cat([inputs @ shared.down.mT, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    up = torch.cat([shared.up_k, shared.up_v], 1)
    expected = torch.einsum("hdr,tr->htd", up, latent)
    # (|c|^2 - E|c|^2) / 2 s^2 is all that is left of the norm, and the ridge of u.
    bound = 50 * float((inputs @ shared.down.mT).square().sum(-1).max()) / CONSTANT**2 + 1e-5
    assert (kv - expected).norm() < bound * expected.norm()
    torch.testing.assert_close(
        q, torch.einsum("hdx,tx->htd", torch.cat([shared.q_nope, shared.q_rope], 1), inputs),
        rtol=1e-5, atol=1e-5,
    )  # fmt: skip
    torch.testing.assert_close(k_rope, inputs @ shared.k_rope.mT, rtol=1e-4, atol=1e-4)


def test_biases_go_through_the_constant() -> None:
    generator = torch.Generator().manual_seed(1)
    shared, inputs = random_latent(generator)
    moment = inputs.T @ inputs / len(inputs)
    o_bias = torch.randn(12, generator=generator, dtype=torch.float64)
    weights = with_constant(shared, o_bias, constant_direction(moment, moment), moment)
    assert weights.o_bias is None
    _, _, kv = read(weights, inputs[:, :-1])
    plain = with_constant(shared, None, constant_direction(moment, moment), moment)
    _, _, without = read(plain, inputs[:, :-1])
    added = torch.einsum("hcd,htd->tc", shared.o, (kv - without)[..., 5:])
    torch.testing.assert_close(added, o_bias.expand_as(added), rtol=1e-4, atol=1e-4)


def test_two_steps_change_no_query() -> None:
    generator = torch.Generator().manual_seed(2)
    shared, inputs = random_latent(generator)
    moment = inputs.T @ inputs / len(inputs)
    weights = with_constant(shared, None, None, moment)
    norm = torch.rand(12, generator=generator, dtype=torch.float64) + 0.1
    n = inputs[:, :-1] / inputs[:, :-1].square().mean(-1, keepdim=True).sqrt()
    one, two = read(weights, n * norm)[0], read(_in_two_steps(weights, norm), n * norm)[0]
    torch.testing.assert_close(two, one, rtol=1e-12, atol=1e-12)


# -- rotary frequencies -------------------------------------------------------------------------

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64, "rope_theta": 500.0,
}  # fmt: skip


def frequencies(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.model.rotary_emb.inv_freq
    return found


def test_yarn_that_scales_by_one_changes_no_frequency() -> None:
    source = tiny.make("llama-wide-tied", num_key_value_heads=6)
    config = source.config.to_dict()
    made = Latent(40, 8).config(family_of(config), config)
    assert made["rope_parameters"]["rope_type"] == "yarn"
    folded: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**made))
    torch.testing.assert_close(frequencies(folded), frequencies(source)[:4])
    assert folded.model.rotary_emb.attention_scaling == 1
    attention = folded.model.layers[0].self_attn
    assert attention.scaling == attention.qk_head_dim**-0.5


@pytest.mark.parametrize("scaling", [{"rope_type": "default", "rope_theta": 10_000.0}, LLAMA3])
@pytest.mark.parametrize(
    ("rotary", "stride", "padded"), [(4, 1, None), (8, 1, None), (4, 2, None), (4, 1, (48, 12))]
)
def test_the_rotary_key_turns_by_the_sources_frequencies(
    scaling: dict[str, Any], rotary: int, stride: int, padded: tuple[int, int] | None
) -> None:
    source = tiny.make("llama-wide-tied", num_key_value_heads=6, rope_parameters=scaling)
    target = Latent(40, rotary, stride, "youtu", padded)
    made = target.config(family_of(source.config.to_dict()), source.config.to_dict())
    folded = AutoModelForCausalLM.from_config(AutoConfig.for_model(**made))
    kept = list(target.frequencies(16))
    torch.testing.assert_close(frequencies(folded)[: len(kept)], frequencies(source)[kept])


def test_scaling_that_changes_no_kept_frequency_is_dropped() -> None:
    source = tiny.make("llama-wide-tied", num_key_value_heads=6, rope_parameters=LLAMA3)
    config = source.config.to_dict()
    family = family_of(config)
    made = Latent(40, 2).config(family, config)
    assert made["rope_parameters"]["factor"] == 1
    with pytest.raises(UnsupportedError, match="Llama 3's scaling") as error:
        Latent(40, 8).config(family, config)
    assert "youtu" in error.value.hint


# -- what cannot be -----------------------------------------------------------------------------


REFUSED = {
    "qwen3": "behind a norm cannot be absorbed",
    "gemma3_text": "behind a norm cannot be absorbed",
    "gemma": "norms add 1",
    "gemma2": "softcap",
    "mistral": "window",
    "phi": "layer norms",
    "starcoder2": "layer norms",
    "stablelm": "layer norms",
    "cohere": "layer norms",
    "olmo": "layer norms",
    "olmo2": "over all heads",
    "olmo3": "over all heads",
    "olmoe": "mixtures of experts",
    "flex_olmo": "mixtures of experts",
    "apertus": "behind a norm cannot be absorbed",
    "arcee": "no gates",
    "cohere2": "layer norms",
    "falcon": "layer norms",
    "exaone4": "behind a norm cannot be absorbed",
    "dots1": "mixtures of experts",
    "ernie4_5_moe": "mixtures of experts",
    "glm4_moe": "mixtures of experts",
    "glm4_moe-norm": "mixtures of experts",
    "glm4": "outputs are normalised",
    "gpt_oss": "sinks",
    "granitemoe": "mixtures of experts",
    "ministral3": "scaled by their position",
    "mixtral": "mixtures of experts",
    "nemotron": "layer norms",
    "phimoe": "mixtures of experts",
    "qwen2_moe": "mixtures of experts",
    "qwen3_moe": "mixtures of experts",
}


def test_learned_positions_are_refused() -> None:
    gpt2 = tiny.gpt2_of(tiny.make_bigcode())
    with pytest.raises(UnsupportedError, match="positions are learned"):
        fold_model(gpt2, Latent(12, 4), "latent", "none")


@pytest.mark.parametrize("case", list(tiny.EVERY))
def test_every_family_can_or_says_why_not(case: str) -> None:
    model = tiny.make(case)
    family, config = family_of(model.config.to_dict()), model.config.to_dict()
    if case in REFUSED:
        with pytest.raises(UnsupportedError, match=REFUSED[case]):
            Latent(12, 4).config(family, config)
    else:
        assert Latent(12, 4).config(family, config)["kv_lora_rank"] == 12


def test_biases_of_queries_need_the_layout_without_biases() -> None:
    model = tiny.make("qwen2", num_key_value_heads=6)
    with pytest.raises(UnsupportedError, match="queries have biases") as error:
        fold_model(model, Latent(12, 4, layout="youtu"), "latent", "none")
    assert "deepseek_v3" in error.value.hint
    with pytest.raises(InputError, match="needs calibration text"):
        fold_model(model, Latent(12, 4), "latent", "none")
    fold_model(model, Latent(12, 4), "latent", "none", tiny.tokens(8, 32))


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("576", "--latent 576: expected 4 to 96 numbers"),
        ("3", "--latent 3: expected 4 to 96 numbers"),
        ("70000", "70000"),
        ("a+b", "expected RANK"),
        ("12+4+4", "expected RANK"),
        ("", "expected RANK"),
        ("1+4", "rank of at least 2"),
        ("99999999+4", "expected RANK"),
        ("70000+4", "70000"),
        ("12+0", "even"),
        ("12+3", "even"),
        ("12+16", "at most 8"),
        ("12+8/2", "at most 4"),
        ("93+4", "97 numbers a token and layer is 101% of the source's 96"),
        ("512+8", "520 numbers a token and layer is 542% of the source's 96"),
    ],
)
def test_sizes_that_cannot_be(
    kvfold: Kvfold, words: str, complaint: str, llama_folder: Path, tmp_path: Path
) -> None:
    run = kvfold("convert", llama_folder, tmp_path / "out", "--latent", words)
    assert run.code == 2
    assert complaint in run.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options",
    [
        ["--latent", "12+4", "--kv-heads", "2"],
        [],
        ["--kv-heads", "2", "--pad", "64+64"],
        ["--latent", "12+4", "--pad", "10+4"],
        ["--latent", "12+4", "--pad", "64+5"],
        ["--latent", "12+4", "--pad", "64+64/2"],
        ["--latent", "12+4", "--method", "pca"],
        ["--kv-heads", "2", "--method", "latent"],
        ["--latent", "12+4", "--no-calibration"],
    ],
    ids=" ".join,
)
def test_requests_that_contradict_themselves(
    kvfold: Kvfold, options: list[str], llama_folder: Path, tmp_path: Path
) -> None:
    run = kvfold("convert", llama_folder, tmp_path / "out", *options)
    assert run.code == 2, run.err
    assert not list(tmp_path.iterdir())


def test_what_is_folded_is_not_folded_again() -> None:
    folded = fold_model(tiny.make("llama", num_key_value_heads=6), exact("llama"), "latent", "none")
    for target in (1, Latent(12, 4)):
        with pytest.raises(UnsupportedError, match="already caches one shared latent"):
            fold_model(folded.model, target, "auto", "none")


# -- on disk ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folded(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path, text_file: Path) -> Path:
    """A llama with a latent, as it is made by default."""
    out = tmp_path_factory.mktemp("latent") / "out"
    package.convert(llama_folder, out, latent="24+4", calibration=[text_file], **CALIBRATION)
    return out


def test_a_stock_architecture_is_written(folded: Path, llama_folder: Path) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(folded, output_loading_info=True)
    assert not any(info.values())
    assert type(model).__module__.startswith("transformers.")
    assert model.config.first_k_dense_replace == model.config.num_hidden_layers
    record = json.loads((folded / "kvfold.json").read_text())
    assert record["geometry"]["kv_bytes_per_token_16bit"] == {"source": 384, "folded": 112}
    assert record["geometry"]["latent"]["rank"] == 24
    assert any("vLLM takes" in warning for warning in record["warnings"])
    assert "latent of 24+4" in (folded / "README.md").read_text()
    assert open_checkpoint(folded).geometry.kv_bytes_per_token() == 112


def test_an_interrupted_run_ends_in_the_same_bytes(
    folded: Path, llama_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    arguments: dict[str, Any] = {"latent": "24+4", "calibration": [text_file], **CALIBRATION}
    with pytest.raises(Stop):
        package.convert(
            llama_folder, tmp_path / "out", **arguments, progress=stop_at("folding layers", 1)
        )
    changed = {**arguments, "latent": "24+2"}
    with pytest.raises(InputError, match="another run"):
        package.convert(llama_folder, tmp_path / "out", **changed, resume=True)
    package.convert(llama_folder, tmp_path / "out", **arguments, resume=True)
    assert digests(tmp_path / "out") == digests(folded)


def test_the_other_commands_take_it(
    kvfold: Kvfold, folded: Path, llama_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    run = kvfold("eval", llama_folder, folded, "--text", text_file, "--context", 64, "--json")
    assert run.code == 0, run.err
    run = kvfold("inspect", folded)
    assert run.code == 0, run.err
    assert "24+4 numbers" in run.out
    picture = ["--against", llama_folder, "--png", tmp_path / "a.png"]
    assert kvfold("look", folded, "w3 w4 w5", *picture).code == 0
    model = AutoModelForCausalLM.from_pretrained(folded)
    assert look(model, torch.arange(3, 9), [0])[0].latent
    assert kvfold("report", folded, "--out", tmp_path / "report.html").code == 0
    assert "latent of 24+4" in (tmp_path / "report.html").read_text()
    run = kvfold(
        "heal", folded, tmp_path / "healed", "--teacher", llama_folder, "--text", text_file,
        "--tokens", 512, "--batch-tokens", 256, "--context", 64, "--held-out-tokens", 128,
    )  # fmt: skip
    assert run.code == 0, run.err
    AutoModelForCausalLM.from_pretrained(tmp_path / "healed")


def test_a_norm_that_cannot_be_undone_is_told(
    kvfold: Kvfold, folded: Path, llama_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    """Random embeddings have nothing in common; biases need nothing."""
    for layout in ("deepseek_v3", "youtu"):
        run = kvfold(
            "convert", llama_folder, tmp_path / layout, "--latent", "24+4", "--layout", layout,
            "--fit", "none", "--calibration", text_file, "--calibration-tokens", 1024,
            "--context", 64,
        )  # fmt: skip
        assert run.code == 0, run.err
        assert ("--layout youtu" in run.err) == (layout == "deepseek_v3"), run.err


def test_in_memory_as_by_words() -> None:
    source = tiny.make("llama", num_key_value_heads=6)
    words = fold_model(source, latent="12+4", layout="youtu", fit="none").model
    assert apart(words, fold_model(source, Latent(12, 4, layout="youtu"), fit="none").model) == 0
    with pytest.raises(InputError, match="exclude each other"):
        fold_model(source, 2, fit="none", latent="12+4")
    with pytest.raises(InputError, match="num_kv_heads"):
        fold_model(source, fit="none")
