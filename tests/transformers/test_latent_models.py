"""Models with latent attention (MLA) through the drop-in, against transformers' own."""

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

import kvfold.transformers as drop_in
from kvfold.errors import InputError, UnsupportedError
from kvfold.ops.formats import format_of
from kvfold.transformers.latent import Heads

SIZES: dict[str, Any] = {
    "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 24,
    "q_lora_rank": 20, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10,
    "num_hidden_layers": 2, "intermediate_size": 32, "moe_intermediate_size": 16,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "vocab_size": 96, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.7,
    "original_max_position_embeddings": 32,
}  # fmt: skip
LONGCAT = {
    "num_layers": 1, "head_dim": 8, "ffn_hidden_size": 32, "expert_ffn_hidden_size": 16,
    "zero_expert_num": 2, "moe_topk": 2,
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v2": ("DeepseekV2", {"q_lora_rank": None, "attention_bias": True}),
    "deepseek_v3": ("DeepseekV3", {"rope_parameters": YARN}),
    "deepseek_v3, halves": ("DeepseekV3", {"q_lora_rank": None, "rope_interleave": False}),
    "youtu": ("Youtu", {}),
    "axk1": ("AXK1", {}),
    "glm4_moe_lite": ("Glm4MoeLite", {}),
    "longcat_flash": ("LongcatFlash", LONGCAT),
    "minicpm3": ("MiniCPM3", {}),
    "mistral4": ("Mistral4", {}),
}
# float32 sums of some dozen products in another order, twice in each of two layers
CLOSE = 2e-5
CHUNKS = (21, 1, 1, 3, 1, 40)  # the last is cheaper expanded


def make(case: str, implementation: str = "eager") -> Any:
    """A random model whose latents' norms are not 1."""
    name, options = CASES[case]
    if not hasattr(transformers, f"{name}Config"):
        pytest.skip("newer than this transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES | options)
    config._attn_implementation = implementation
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for key, weight in model.named_parameters():
        if key.endswith("layernorm.weight"):
            nn.init.uniform_(weight, 0.5, 1.5)
    return model


def prompt(length: int = 21) -> torch.Tensor:
    text = torch.randint(3, 96, (2, 80), generator=torch.Generator().manual_seed(3))
    return text[:, :length]


def logits(model: Any, implementation: str, cache: Any, chunks: tuple[int, ...]) -> torch.Tensor:
    """Of a text that is given in so many pieces."""
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        pieces = prompt(sum(chunks)).split(chunks, 1)
        return torch.cat([model(ids, past_key_values=cache).logits for ids in pieces], 1)


def check(found: torch.Tensor, expected: torch.Tensor, close: float = CLOSE) -> None:
    atol = close * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.fixture
def absorbed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of queries that were computed in the absorbed form."""
    seen: list[int] = []
    own = Heads.attend

    def attend(heads: Heads, q: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        seen.append(q.shape[2])
        return own(heads, q, options)

    monkeypatch.setattr(Heads, "attend", attend)
    return seen


@pytest.mark.parametrize("case", CASES)
def test_logits_of_prompts_steps_and_chunks(case: str, absorbed: list[int]) -> None:
    model = make(case)
    expected = logits(model, "eager", DynamicCache(config=model.config), CHUNKS)
    cache = drop_in.KVCache(model.config)
    check(logits(model, "kvfold", cache, CHUNKS), expected)
    assert absorbed == [n for n in CHUNKS[1:5] for _ in range(2)]
    latent = cache.layers[0].held
    assert latent.bytes_per_token == 4 * (24 + 8)
    assert cache.get_seq_length() == sum(CHUNKS)


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_with_padding_beams_and_guesses(case: str, absorbed: list[int]) -> None:
    model, ids = make(case), prompt()
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    ways: list[dict[str, Any]] = [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}]
    for way in ways:
        one = "prompt_lookup_num_tokens" in way  # transformers guesses for one sequence
        options = way | {
            "max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False,
            "attention_mask": mask[:1] if one else mask,
        }  # fmt: skip
        given = ids[:1] if one else ids
        model.set_attn_implementation("eager")
        expected = model.generate(given, **options)
        model.set_attn_implementation("kvfold")
        cache = drop_in.KVCache(model.config)
        assert torch.equal(model.generate(given, past_key_values=cache, **options), expected), way
    assert set(absorbed) >= {1, 4}


class Quantized(DynamicLayer):  # type: ignore[misc]
    """transformers' layer, whose latents are rounded as a format does it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any) -> Any:
        given, fmt = torch.cat([key_states, value_states], -1), format_of(self.name)
        sizes = [key_states.shape[-1], value_states.shape[-1]]
        rounded = fmt.decode(*fmt.encode(given), sum(sizes)).split(sizes, -1)
        first = not self.is_initialized
        found = super().update(*rounded)
        return (key_states, value_states) if first else found


@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16", "fp8", "int8"])
def test_every_format_is_that_of_rounded_latents(name: str) -> None:
    """A first prompt sees its latents as they are."""
    model = make("deepseek_v3")
    stock = Cache(layers=[Quantized(name) for _ in range(2)])
    expected = logits(model, "eager", stock, CHUNKS)
    found = logits(model, "kvfold", drop_in.KVCache(model.config, dtype=name), CHUNKS)
    # Integers: queries and weights of 16 bits. What a layer is off by moves codes of the next.
    check(found, expected, CLOSE if format_of(name).bits == 32 else 2e-2)


@pytest.mark.parametrize("case", ["deepseek_v2", "youtu"])
def test_bfloat16_models_are_as_good_as_eager(case: str) -> None:
    """At most twice the error of eager attention, both against float32."""
    model = make(case)
    truth = logits(model, "eager", DynamicCache(config=model.config), CHUNKS)
    model = model.to(torch.bfloat16)
    theirs = logits(model, "eager", DynamicCache(config=model.config), CHUNKS)
    ours = logits(model, "kvfold", drop_in.KVCache(model.config), CHUNKS)
    error = [float((x.float() - truth).square().mean().sqrt()) for x in (ours, theirs)]
    assert error[0] <= 2 * error[1]


def test_nothing_of_the_model_changes() -> None:
    model = make("deepseek_v3")
    before = [dict(vars(module)) for module in model.modules()]
    expand = type(model.model.layers[0].self_attn).expand_kv
    logits(model, "kvfold", drop_in.KVCache(model.config), CHUNKS)
    assert before == [dict(vars(module)) for module in model.modules()]
    assert type(model.model.layers[0].self_attn).expand_kv is expand


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_our_cache_serves_other_implementations(implementation: str, absorbed: list[int]) -> None:
    model = make("deepseek_v3")
    expected = logits(model, implementation, DynamicCache(config=model.config), CHUNKS)
    check(logits(model, implementation, drop_in.KVCache(model.config), CHUNKS), expected)
    assert not absorbed


class Adapted(nn.Module):
    """A linear layer and what was learned on top of it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.base(x) + self.up(self.down(x))
        return out


@pytest.mark.parametrize("how", ["adapted", "biased", "prepacked"])
def test_more_than_a_weight_is_expanded(how: str, absorbed: list[int]) -> None:
    model = make("youtu")
    for layer in model.model.layers:
        own = layer.self_attn.kv_b_proj
        if how == "adapted":
            layer.self_attn.kv_b_proj = Adapted(own)
        elif how == "biased":
            own.bias = nn.Parameter(torch.randn(len(own.weight)))
    expected = logits(model, "eager", DynamicCache(config=model.config), CHUNKS)
    if how == "prepacked":
        left = drop_in.prepack(model).left["model.layers.0.self_attn.kv_b_proj"]
        assert left == "attention over latents reads its weight as it is"
    check(logits(model, "kvfold", drop_in.KVCache(model.config), CHUNKS), expected)
    assert bool(absorbed) == (how == "prepacked")


def test_a_cache_is_cropped_copied_and_reset() -> None:
    model = make("deepseek_v2")
    expected = logits(model, "kvfold", drop_in.KVCache(model.config), (21, 1, 1))
    cache = drop_in.KVCache(model.config)
    logits(model, "kvfold", cache, (30,))
    cache.crop(-9)
    twin = copy.deepcopy(cache)
    last = prompt(23)[:, 21:]
    for filled in (cache, twin):
        with torch.no_grad():
            found = [model(ids, past_key_values=filled).logits for ids in last.split(1, 1)]
        check(torch.cat(found, 1), expected[:, 21:])
    cache.reset()
    assert cache.get_seq_length() == 0
    check(logits(model, "kvfold", cache, (21, 1, 1)), expected)


def test_autocast_takes_its_dtype() -> None:
    model = make("deepseek_v3")
    found = {}
    for name, cache in (("eager", DynamicCache(config=model.config)), ("kvfold", None)):
        cache = drop_in.KVCache(model.config) if cache is None else cache
        with torch.autocast("cpu", torch.bfloat16):
            found[name] = logits(model, name, cache, (21, 1, 1)).float()
    gap = float((found["kvfold"] - found["eager"]).square().mean().sqrt())
    assert gap < 2**-5 * float(found["eager"].square().mean().sqrt())


@pytest.mark.parametrize("used", [True, False], ids=["our cache", "no cache"])
def test_gradients_are_refused_with_the_cache_and_untouched_without(used: bool) -> None:
    model = make("deepseek_v3", "kvfold")
    if used:
        with pytest.raises(InputError, match="gradient"):
            model(prompt(), past_key_values=drop_in.KVCache(model.config))
        return
    found = []
    for name in ("eager", "kvfold"):
        model.set_attn_implementation(name)
        model.zero_grad()
        loss: torch.Tensor = model(prompt(), use_cache=False).logits.square().mean()
        loss.backward()
        found.append(model.model.layers[0].self_attn.kv_b_proj.weight.grad.clone())
    check(found[1], found[0])


def test_compiled_models_read_the_cache_between_graphs(absorbed: list[int]) -> None:
    model = make("youtu", "kvfold")
    expected = logits(model, "kvfold", drop_in.KVCache(model.config), (21, 1, 1))
    step: Any = torch.compile(model.forward, backend="eager")
    cache, absorbed[:] = drop_in.KVCache(model.config), []
    with torch.no_grad():
        pieces = prompt(23).split((21, 1, 1), 1)
        found = [step(ids, past_key_values=cache).logits for ids in pieces]
    check(torch.cat(found, 1), expected)
    assert absorbed == [1] * 4


REFUSED = ["DeepseekV32", "GlmMoeDsa", "AXK2", "KimiLinear", "BailingHybrid"]


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_keep_more_than_latents_are_refused(name: str) -> None:
    if not hasattr(transformers, f"{name}Config"):
        pytest.skip("newer than this transformers")
    with pytest.raises(UnsupportedError, match="something else than keys and values"):
        drop_in.KVCache(getattr(transformers, f"{name}Config")())


def test_what_latents_cannot_be_is_refused_before_they_come() -> None:
    config = make("youtu").config
    for dtype in ("int4", "nl4", ("int8", "int4")):
        with pytest.raises(InputError, match="dtype"):
            drop_in.KVCache(config, dtype=dtype)
    with pytest.raises(UnsupportedError, match="a fixed cache keeps no latents"):
        drop_in.FixedKVCache(config, 64)
