"""The drop-in in encoder-decoder models: attention that is not causal, and over two sequences."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache

import kvfold.transformers as drop_in
from tests.toolbox.encoder_decoder_cases import (
    ENCODER_DECODERS,
    decoder_prompt,
    make_encoder_decoder,
    source_of,
)

CASES = pytest.mark.parametrize("case", ENCODER_DECODERS)


def logits(model: Any, implementation: str, **inputs: Any) -> torch.Tensor:
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        found: torch.Tensor = model(**inputs).logits
    return found


def check_logits(model: Any, real: torch.Tensor | None = None, **inputs: Any) -> None:
    """As far from attention in float64 as transformers' own in float32 are: 4 times at most.

    Args:
        real: bool ``[B, T]``, which decoder tokens are not padding.
    """
    others = ["eager", "sdpa"] if model._supports_sdpa else ["eager"]
    found, *theirs = (logits(model, name, **inputs) for name in ("kvfold", *others))
    twice = {k: x.double() if x.is_floating_point() else x for k, x in inputs.items()}
    exact = logits(model.double(), "eager", **twice)
    model.float()
    real = torch.ones(found.shape[:2], dtype=torch.bool) if real is None else real
    error, *allowed = ((x.double() - exact)[real].norm() for x in (found, *theirs))
    assert error < 4 * max(allowed) + 2**-24 * exact[real].norm()


def padded(rows: int, length: int, missing: int, side: str) -> torch.Tensor:
    """A mask of real tokens; the second sequence lacks some at one side."""
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[1, slice(None, missing) if side == "left" else slice(length - missing, None)] = 0
    return mask


@CASES
@pytest.mark.parametrize("length", [1, 5, 13, 17])
def test_prompts_without_a_mask(case: str, length: int) -> None:
    """Shorter than, as long as and longer than the source."""
    model = make_encoder_decoder(case)
    prompt = decoder_prompt(2, length)
    check_logits(model, decoder_input_ids=prompt, **source_of(model))


@CASES
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("where", ["source", "prompt", "both"])
def test_padding(case: str, side: str, where: str) -> None:
    if case == "t5gemma" and side == "left" and where != "source":
        pytest.skip("eager attention in float64 is NaN itself")
    model = make_encoder_decoder(case)
    inputs: dict[str, Any] = source_of(model) | {"decoder_input_ids": decoder_prompt(2, 6)}
    real = None
    if where != "prompt" and case != "whisper":  # Whisper's encoder has no mask
        inputs["attention_mask"] = padded(2, 13, 4, side)
    if where != "source":
        inputs["decoder_attention_mask"] = padded(2, 6, 2, side)
        real = inputs["decoder_attention_mask"].bool()
    check_logits(model, real, **inputs)


def generate(model: Any, implementation: str, **options: Any) -> torch.Tensor:
    model.set_attn_implementation(implementation)
    given = source_of(model) | {"decoder_input_ids": decoder_prompt(2, 3)}
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None} | options
    found: torch.Tensor = model.generate(**given, **options)
    return found


def caches(model: Any, dtype: Any = None) -> dict[str, Any]:
    """Every way to put kvfold's cache in an encoder-decoder model; None: the model's own cache."""

    def ours() -> Any:
        return drop_in.KVCache(model.config, dtype=dtype)

    def theirs() -> Any:
        return DynamicCache(config=model.config)

    pairs = {"own": (ours(), theirs()), "cross": (theirs(), ours()), "both": (ours(), ours())}
    return {"none": None} | {name: EncoderDecoderCache(*pair) for name, pair in pairs.items()}


@CASES
@pytest.mark.parametrize("cache", ["none", "own", "cross", "both"])
def test_greedy_tokens_are_those_of_eager(case: str, cache: str) -> None:
    model = make_encoder_decoder(case)
    beams = 3 if case in ("bart", "t5") else 1
    expected = generate(model, "eager", num_beams=beams)
    for implementation in ("kvfold", "eager"):
        given = caches(model)[cache]
        options = {} if given is None else {"past_key_values": given}
        found = generate(model, implementation, num_beams=beams, **options)
        assert torch.equal(found, expected)
