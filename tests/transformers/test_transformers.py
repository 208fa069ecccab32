"""The drop-in against transformers' own eager attention, on tiny random models."""

from typing import Any

import pytest
import torch
from transformers import StaticCache

import kvfold.transformers as drop_in
from kvfold.errors import InputError
from tests.toolbox.attention_cases import prompts_by
from tests.toolbox.tiny import CASES, build, make

NEW_TOKENS = 24
GPT_OSS: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "sliding_window": 16,
    "initializer_range": 0.15,
}


def prompt(rows: int = 2, length: int = 21) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(3, 96, (rows, length), generator=generator)


def generate(model: Any, ids: torch.Tensor, implementation: str, **options: Any) -> torch.Tensor:
    model.set_attn_implementation(implementation)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None} | options
    options.setdefault("attention_mask", torch.ones_like(ids))
    return model.generate(ids, **options)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("cached", [False, True], ids=["their cache", "our cache"])
def test_greedy_tokens_are_those_of_eager(case: str, cached: bool) -> None:
    model = make(case)
    ids = prompt()
    expected = generate(model, ids, "eager")
    cache = {"past_key_values": drop_in.KVCache(model.config)} if cached else {}
    assert torch.equal(generate(model, ids, "kvfold", **cache), expected)


def test_gpt_oss_sinks() -> None:
    model = build("gpt_oss", GPT_OSS)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks, generator=torch.Generator().manual_seed(5))
    expected = generate(model, prompt(), "eager")
    for cache in ({}, {"past_key_values": drop_in.KVCache(model.config)}):
        assert torch.equal(generate(model, prompt(), "kvfold", **cache), expected)


@pytest.mark.parametrize("tokens", [3, 40], ids=["kernel", "sdpa"])
def test_gpt_oss_is_as_exact_as_eager_and_trains_its_sinks(tokens: int) -> None:
    """Logits and the gradients of the sinks; sums of a few dozen float32 numbers of size one."""
    model = build("gpt_oss", GPT_OSS)
    ids, found = prompt(2, tokens), {}
    for name in ("eager", "kvfold"):
        model.set_attn_implementation(name)
        with torch.no_grad():
            logits = model(ids).logits
        model.zero_grad()
        model(ids).logits.square().mean().backward()
        grads = [layer.self_attn.sinks.grad.clone() for layer in model.model.layers]
        found[name] = [logits, *grads]
    for ours, theirs in zip(found["kvfold"], found["eager"], strict=True):
        assert float(theirs.abs().max()) > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["llama", "gemma2", "qwen3"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_our_cache_serves_other_implementations(case: str, implementation: str) -> None:
    if (case, implementation) == ("gemma2", "sdpa"):
        pytest.skip("transformers' sdpa has no softcap")
    model = make(case)
    expected = generate(model, prompt(), implementation)
    cache = drop_in.KVCache(model.config)
    assert torch.equal(generate(model, prompt(), implementation, past_key_values=cache), expected)


@pytest.fixture(params=[False, True], ids=["prompts by PyTorch", "prompts by kernels"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts as short as these go to PyTorch, long ones to the kernels: try both on these."""
    prompts_by(monkeypatch, kernels=bool(request.param))


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("case", ["llama", "gemma2", "gemma3_text", "mistral"])
@pytest.mark.parametrize("cached", [False, True])
def test_left_padding(case: str, cached: bool) -> None:
    """A padded prompt gives what it gives alone."""
    model = make(case)
    long, short = prompt(1, 21), prompt(1, 21)[:, 6:]
    ids = torch.cat([long, torch.cat([torch.zeros(1, 6, dtype=torch.long), short], 1)])
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    cache = {"past_key_values": drop_in.KVCache(model.config)} if cached else {}
    both = generate(model, ids, "kvfold", attention_mask=mask, **cache)
    assert torch.equal(both, generate(model, ids, "eager", attention_mask=mask))
    assert torch.equal(both[1, 21:], generate(model, short, "eager")[0, 15:])


@pytest.mark.parametrize("case", ["llama", "gemma3_text"])
def test_beam_search(case: str) -> None:
    model = make(case)
    expected = generate(model, prompt(), "eager", num_beams=3)
    for cache in ({}, {"past_key_values": drop_in.KVCache(model.config)}):
        assert torch.equal(generate(model, prompt(), "kvfold", num_beams=3, **cache), expected)


def test_static_cache() -> None:
    model = make("llama")
    expected = generate(model, prompt(), "eager")
    cache = StaticCache(model.config, max_cache_len=64)
    found = generate(model, prompt(), "kvfold", past_key_values=cache, disable_compile=True)
    assert torch.equal(found, expected)


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("case", ["llama", "gemma3_text"])
@pytest.mark.parametrize("turn", [3, 20], ids=["short turn", "long turn"])
def test_continued_chat(case: str, turn: int) -> None:
    """A second prompt on a filled cache gives what the whole conversation gives."""
    model = make(case)
    cache = drop_in.KVCache(model.config)
    first = generate(model, prompt(1), "kvfold", past_key_values=cache)
    whole = torch.cat([first, prompt(1, 40)[:, :turn]], 1)
    second = generate(model, whole, "kvfold", past_key_values=cache)
    assert torch.equal(second, generate(model, whole, "eager"))


@pytest.mark.parametrize("case", ["llama", "qwen3"])
def test_assisted_decoding(case: str) -> None:
    """Speculation throws tokens away again; the result is the model's own."""
    model, assistant = make(case), make(case, seed=1)
    expected = generate(model, prompt(1), "eager")
    cache = drop_in.KVCache(model.config)
    found = generate(model, prompt(1), "kvfold", past_key_values=cache, assistant_model=assistant)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", ["bf16", "int8", "fp8", "int4", ("int8", "int4")])
def test_quantized_caches_stay_close(dtype: Any) -> None:
    """Logits of a long continuation differ by no more than the format's rounding explains."""
    model = make("llama", max_position_embeddings=512)
    ids = prompt(1, 200)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(ids).logits
    model.set_attn_implementation("kvfold")
    cache = drop_in.KVCache(model.config, dtype=dtype)
    found = []
    with torch.no_grad():
        for piece in ids.split(10, 1):
            found.append(model(piece, past_key_values=cache).logits)
    error = (torch.cat(found, 1) - expected).norm() / expected.norm()
    # Relative rounding of a number: 2^-9 (bf16), 1/254 (int8), 2^-4 (fp8), 1/16 (int4, rotated).
    # Two layers of values and scores, errors averaged by attention: no more than four such.
    rounding = {"bf16": 2**-9, "int8": 1 / 254, "fp8": 2**-4}.get(str(dtype), 1 / 16)
    assert error < 4 * rounding


def test_memory_is_that_of_the_format() -> None:
    model = make("llama-wide-tied", max_position_embeddings=1024)
    model.set_attn_implementation("kvfold")
    for dtype, bits in (("fp32", 32), ("bf16", 16), ("int8", 8 + 16 / 16)):  # a scale per head
        cache = drop_in.KVCache(model.config, dtype=dtype)
        with torch.no_grad():
            model(prompt(1, 512), past_key_values=cache)
        expected = 2 * 2 * 2 * 16 * 512 * bits / 8  # layers, k and v, heads, head_dim, tokens
        assert cache.nbytes == pytest.approx(expected, rel=0.01)


def test_reset_and_lengths() -> None:
    model = make("llama")
    cache = drop_in.KVCache(model.config)
    generate(model, prompt(), "kvfold", past_key_values=cache)
    assert cache.get_seq_length() == 21 + NEW_TOKENS - 1
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.nbytes == 0


def test_importing_patches_nothing() -> None:
    assert make("llama").config._attn_implementation == "sdpa"


def test_other_implementations_are_named() -> None:
    with pytest.raises(InputError, match="sdpa"):
        drop_in.check_implementation(make("llama"))
