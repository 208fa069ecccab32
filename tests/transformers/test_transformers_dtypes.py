"""The drop-in under automatic mixed precision, and where gradients are needed."""

from typing import Any

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from transformers import DynamicCache

import kvfold.transformers as drop_in
from kvfold.cache.kv import KVCache
from kvfold.errors import InputError
from kvfold.kernels.dispatch import attention
from tests.toolbox.attention_cases import noise
from tests.toolbox.encoder_decoder_cases import decoder_prompt, make_encoder_decoder, source_of
from tests.toolbox.tiny import make, tokens

EPSILON = 2**-8  # between neighbouring bfloat16 numbers


def logits(model: Any, implementation: str, pieces: tuple[torch.Tensor, ...], **given: Any) -> Any:
    model.set_attn_implementation(implementation)
    return torch.cat([model(piece, **given).logits for piece in pieces], 1).float()


@pytest.mark.parametrize("case", ["llama", "qwen3", "gemma2", "gemma3_text", "phi", "stablelm"])
@pytest.mark.parametrize("cache", ["none", "theirs", "ours", "ours in int8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(case: str, cache: str, dtype: torch.dtype) -> None:
    """A prompt, and with a cache single tokens and a draft of five after it.

    No further from float32 than transformers' own attention under autocast, but for a factor of
    two, and the rounding of an int8 cache.
    """
    model, ids = make(case), tokens(2, 30)
    theirs = "eager" if case == "gemma2" else "sdpa"  # transformers' sdpa has no softcap
    pieces = (ids,) if cache == "none" else ids.split([23, 1, 1, 5], 1)

    def caches(kind: str) -> dict[str, Any]:
        if kind == "none":
            return {}
        ours = drop_in.KVCache(model.config, dtype="int8" if "int8" in kind else None)
        given = DynamicCache(config=model.config) if kind == "theirs" else ours
        return {"past_key_values": given}

    with torch.no_grad():
        exact = logits(model, "eager", (ids,))
        with torch.autocast("cpu", dtype):
            stock = logits(model, theirs, pieces, **caches("none" if cache == "none" else "theirs"))
            found = logits(model, "kvfold", pieces, **caches(cache))
    allowed = 2 * (stock - exact).norm()
    if cache == "ours in int8":  # 1/254 of the largest number, in keys and values of two layers
        allowed += 4 / 254 * exact.norm()
    assert (found - exact).norm() < allowed


@pytest.mark.parametrize("case", ["bart", "t5", "whisper"])
def test_autocast_of_encoder_decoders(case: str) -> None:
    model = make_encoder_decoder(case)
    given = source_of(model) | {"decoder_input_ids": decoder_prompt(2, 5)}

    def run(implementation: str) -> torch.Tensor:
        model.set_attn_implementation(implementation)
        return model(**given).logits.float()

    with torch.no_grad():
        exact = run("eager")
        with torch.autocast("cpu", torch.bfloat16):
            stock, found = run("sdpa"), run("kvfold")
    assert (found - exact).norm() < 2 * (stock - exact).norm()


def test_mixed_dtypes_without_autocast_take_the_widest() -> None:
    q, k, v = noise(1, 4, 3, 16), noise(1, 2, 9, 16), noise(1, 2, 9, 16, dtype=torch.bfloat16)
    module: Any = torch.nn.Identity()
    module.is_causal = False
    found, _ = drop_in.attend(module, q, k, v, None)
    expected, _ = drop_in.attend(module, q, k, v.float(), None)
    assert found.dtype is torch.float32
    assert torch.equal(found, expected)


def gradients(model: Any, implementation: str, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.base_model.set_attn_implementation(implementation)
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("tokens_", [4, 30])
def test_prefix_tuning(tokens_: int) -> None:
    """Gradients of learned keys and values are those of transformers' attention."""
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model: Any = get_peft_model(make("llama"), config)
    ids = tokens(2, tokens_)
    found, expected = (gradients(model, name, ids) for name in ("kvfold", "eager"))
    assert found
    for name in expected:
        assert expected[name].norm() > 0
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("count", [1, 9, 16, 17, 40])
@pytest.mark.parametrize("trained", ["keys", "values", "model"])
def test_our_cache_refuses_gradients(count: int, trained: str) -> None:
    """It would lose them: no size and no side passes in silence."""
    model = make("llama").requires_grad_(trained == "model")
    model.set_attn_implementation("kvfold")
    cache = drop_in.KVCache(model.config)
    k, v = (torch.zeros(1, 2, count, 8, requires_grad=trained == s) for s in ("keys", "values"))
    calls: dict[str, Any] = {"model": lambda: model(tokens(1, count), past_key_values=cache)}
    with pytest.raises(InputError, match="gradients") as error:
        calls.get(trained, lambda: cache.update(k, v, 0))()
    assert "no_grad" in error.value.hint
    assert cache.get_seq_length() == 0
    with torch.no_grad():
        model(tokens(1, count), past_key_values=cache)
    assert cache.get_seq_length() == count


@pytest.mark.parametrize("wanted", ["q", "mask", "alibi_slopes"])
@pytest.mark.parametrize("count", [1, 3, 20])
def test_gradients_through_a_filled_cache(wanted: str, count: int) -> None:
    """Of queries, masks and slopes they are those of attention over the same numbers."""
    cache = KVCache(2, 16, dtype="int8")
    cache.append(noise(1, 2, 40, 16), noise(1, 2, 40, 16, seed=1))
    k, v = cache.tensors(torch.float32)
    given: dict[str, Any] = {"q": noise(1, 4, count, 16), "mask": noise(1, 1, count, 40)}
    if wanted == "alibi_slopes":
        given |= {wanted: torch.rand(4)}
    given[wanted].requires_grad_()
    found = {}
    calls: list[tuple[str, Any]] = [("cache", cache.attend), ("attention", _over(k, v))]
    for name, call in calls:
        given[wanted].grad = None
        call(**given).square().sum().backward()
        found[name] = given[wanted].grad.clone()
    assert found["cache"].norm() > 0
    assert torch.equal(found["cache"], found["attention"])


def _over(k: torch.Tensor, v: torch.Tensor) -> Any:
    return lambda q, **options: attention(q, k, v, **options)
