"""Taking tokens back: sliding caches, and every way transformers does it."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, EncoderDecoderCache

import kvfold.transformers as drop_in
from kvfold.cache.kv import KVCache
from kvfold.errors import InputError
from tests.toolbox.attention_cases import noise
from tests.toolbox.encoder_decoder_cases import decoder_prompt, make_encoder_decoder, source_of
from tests.toolbox.sliding import SLIDING, sliding
from tests.toolbox.tiny import make, tokens


def generate(model: Any, ids: torch.Tensor, implementation: str, **options: Any) -> torch.Tensor:
    model.set_attn_implementation(implementation)
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None} | options
    found: torch.Tensor = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return found


def repeating(length: int) -> torch.Tensor:
    """A prompt in which looking up what came before finds drafts."""
    return tokens(1, 7).repeat(1, -(-length // 7))[:, :length]


@pytest.mark.parametrize("case", SLIDING)
@pytest.mark.parametrize("length", [7, 15, 40, 90])
@pytest.mark.parametrize("way", ["assistant", "lookup"])
def test_speculation_on_sliding_layers(case: str, length: int, way: str) -> None:
    """Tokens are the model's own, for prompts short and long, however drafts are made."""
    model, ids = sliding(case), repeating(length)
    expected = generate(model, ids, "eager")
    assistant = sliding(case, seed=0 if length == 40 else 1)  # a perfect one, and a bad one
    draft = {"assistant": {"assistant_model": assistant}, "lookup": {"prompt_lookup_num_tokens": 5}}
    for implementation in ("kvfold", "eager"):
        cache = drop_in.KVCache(model.config)
        options = {"past_key_values": cache} | draft[way]
        assert torch.equal(generate(model, ids, implementation, **options), expected)
        assert cache.get_seq_length() == length + 23


def test_the_assistant_may_use_kvfold_too() -> None:
    model, assistant = sliding("gemma3"), sliding("gemma3", seed=1)
    expected = generate(model, repeating(40), "eager")
    assistant.set_attn_implementation("kvfold")
    found = generate(
        model,
        repeating(40),
        "kvfold",
        assistant_model=assistant,
        past_key_values=drop_in.KVCache(model.config, dtype="fp32"),
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("case", ["bart", "t5", "whisper"])
def test_speculation_in_encoder_decoders(case: str) -> None:
    model, assistant = make_encoder_decoder(case), make_encoder_decoder(case, seed=1)
    given_ = source_of(model, rows=1)
    if case != "whisper":  # which takes no prompt beside an assistant
        given_ |= {"decoder_input_ids": decoder_prompt(1, 3)}

    def run(implementation: str, **options: Any) -> torch.Tensor:
        model.set_attn_implementation(implementation)
        options |= {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
        found: torch.Tensor = model.generate(**given_, **options)
        return found

    expected = run("eager")
    cache = EncoderDecoderCache(*(drop_in.KVCache(model.config) for _ in range(2)))
    assert torch.equal(run("kvfold", assistant_model=assistant, past_key_values=cache), expected)


def fed(case: str, length: int, **options: Any) -> tuple[Any, Any]:
    model = sliding(case)
    model.set_attn_implementation("kvfold")
    cache = drop_in.KVCache(model.config, **options)
    with torch.no_grad():
        model(repeating(length), past_key_values=cache)
    return model, cache


def test_memory_of_a_recorded_past_is_given_back() -> None:
    """While recording, a window keeps everything; ``crop`` frees all but the window."""
    _, plain = fed("mistral", 4)
    model = sliding("mistral")
    model.set_attn_implementation("kvfold")
    cache = drop_in.KVCache(model.config)
    cache.activate_past_recording()
    with torch.no_grad():
        model(tokens(1, 2000), past_key_values=cache)
        recorded = cache.nbytes
        cache.crop(-3)
    assert recorded >= 10 * cache.nbytes
    assert cache.nbytes <= 3 * plain.nbytes  # a window may lie on two pages, with one to spare
    assert cache.get_seq_length() == 1997


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_crop_is_that_of_transformers(data: st.DataObject) -> None:
    """What their layer leaves, ours leaves, and what it raises for, ours raises for."""
    length = data.draw(st.integers(0, 20))
    k, v = noise(1, 2, length, 16), noise(1, 2, length, 16, seed=1)
    ours = drop_in.KVCache(make("llama").config, dtype="fp32")
    theirs = DynamicCache(config=make("llama").config)
    for cache in (ours, theirs):
        for layer in (0, 1) if length else ():
            cache.update(k, v, layer)
    for n in data.draw(st.lists(st.one_of(st.integers(-25, 25), st.none(), st.text()), max_size=3)):
        try:
            theirs.crop(n)
        except (ValueError, RuntimeError, TypeError):
            with pytest.raises(InputError):
                ours.crop(n)  # type: ignore[arg-type]
        else:
            ours.crop(n)  # type: ignore[arg-type]
        left = theirs.get_seq_length()
        assert [layer.get_seq_length() for layer in ours.layers] == [left, left]
        if left:
            assert torch.equal(ours.layers[1].keys.tensor(), theirs.layers[1].keys)


def test_a_refused_crop_changes_no_layer() -> None:
    _, cache = fed("gemma3", 200)
    with pytest.raises(InputError, match="a window has freed") as error:
        cache.crop(-150)
    assert "activate_past_recording" in error.value.hint
    assert [layer.get_seq_length() for layer in cache.layers] == [200, 200]


def test_nothing_freed_nothing_refused() -> None:
    """Fewer tokens than a page or a window: all of them can go."""
    for tokens_ in range(1, 12):
        for left in range(tokens_):
            cache = KVCache(1, 16, kind="sliding", window=12)
            for step in range(tokens_):
                cache.append(noise(1, 1, 1, 16, seed=step), noise(1, 1, 1, 16, seed=step))
            cache.truncate(left)
            assert cache.lengths == [left]


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_rollback_of_sliding_caches(data: st.DataObject) -> None:
    """Whatever is appended and taken back, a sliding cache holds what the next token sees.

    It can always take back its last append, and go back to ``slack`` tokens before the longest it
    was; what it refuses is gone.
    """
    draw = data.draw
    window, slack = draw(st.integers(1, 30)), draw(st.integers(0, 12))
    page, sinks = draw(st.sampled_from([(1, 0), (1, 3), (4, 0), (16, 0), (16, 16)]))
    dtype = draw(st.sampled_from(["fp32", "int8", "int4"]))
    made: dict[str, Any] = {"window": window, "page_size": page, "sinks": sinks, "slack": slack}
    cache = KVCache(1, 16, dtype=dtype, kind="sliding", **made)
    history: list[int] = []  # the seed of every token
    longest = 0
    for step in range(draw(st.integers(1, 12))):
        last, count = len(history), draw(st.integers(1, 3) | st.integers(1, 40))
        history += [100 * step + i for i in range(count)]
        cache.append(rows(history[last:], 0), rows(history[last:], 1))
        longest = max(longest, len(history))
        left = draw(st.integers(0, len(history)))
        needed = [*range(min(sinks, left)), *range(max(sinks, left - window + 1), left)]
        if cache.can_truncate(left):
            cache.truncate(left)
            history = history[:left]
            assert held(cache, history, needed)
        else:
            assert left < min(last, longest - slack)
            # INT4's exact first page goes with the sinks in it, as a whole.
            assert not held(cache, history, needed) or (sinks and dtype == "int4")
            with pytest.raises(InputError, match="freed"):
                cache.truncate(left)
        assert cache.lengths == [len(history)]


def rows(seeds: list[int], side: int) -> torch.Tensor:
    return torch.cat([noise(1, 1, 1, 16, seed=2 * seed + side) for seed in seeds], 2)


def held(cache: KVCache, history: list[int], positions: list[int]) -> bool:
    """Whether the cache holds the tokens at all of these positions, up to the format's rounding."""
    if not positions:
        return True
    rounding = 0.0 if cache.formats[0].name == "fp32" else 0.2
    for side, x in enumerate(cache.read(0)):
        expected = rows([history[j] for j in positions], side)[0]
        error = (x[:, positions] - expected).norm(dim=-1)
        if not bool((error <= rounding * expected.norm(dim=-1)).all()):
            return False
    return True
