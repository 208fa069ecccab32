"""The drop-in's cache that forgets tokens of single KV heads."""

from typing import Any

import pytest
import torch

import kvfold
import kvfold.transformers as drop_in
from kvfold.errors import InputError, UnsupportedError
from kvfold.transformers.layer import KVLayer
from tests.toolbox.tiny import DEEPSEEK, build, make

HALF = kvfold.Evict(budget=0.5, sinks=16, recent=40, window=16, every=8)
LENGTH = 400


def prompt(rows: int = 1, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(1))


def model_of(case: str, **more: Any) -> Any:
    model = make(case, max_position_embeddings=1024, **more)
    model.set_attn_implementation("kvfold")
    return model


def generate(
    model: Any, ids: torch.Tensor, evict: kvfold.Evict | None, new: int = 6, **more: Any
) -> Any:
    own = {name: more.pop(name) for name in ("dtype", "select") if name in more}
    cache = drop_in.KVCache(model.config, evict=evict, **own)
    more = {"attention_mask": torch.ones_like(ids)} | more
    found = model.generate(
        ids, past_key_values=cache, max_new_tokens=new, do_sample=False, eos_token_id=None, **more
    )
    return found, cache


def full(cache: Any) -> list[KVLayer]:
    return [layer for layer in cache.layers if layer._window is None]


@torch.inference_mode()
def logits(model: Any, ids: torch.Tensor, cache: Any, **more: Any) -> torch.Tensor:
    found: torch.Tensor = model(ids, past_key_values=cache, **more).logits
    return found


def test_a_whole_budget_changes_nothing() -> None:
    model, ids = model_of("llama"), prompt(2)
    whole, _ = generate(model, ids, kvfold.Evict(budget=1.0))
    dense, _ = generate(model, ids, None)
    assert torch.equal(whole, dense)


@pytest.mark.parametrize("by", ["attention", "recent"])
@pytest.mark.parametrize("dtype", ["bf16", "int8", "int4"])
def test_memory_and_tokens_fall(dtype: str, by: str) -> None:
    how = kvfold.Evict(**{**vars(HALF), "by": by})
    model = model_of("llama")
    _, dense = generate(model, prompt(2), None, dtype=dtype)
    _, cache = generate(model, prompt(2), how, dtype=dtype, new=60)
    for layer in cache.layers:
        held = layer.cache.held
        most = (LENGTH + 60) // 2 + HALF.every + 1
        assert (held.sum(-1) <= held.shape[1] * most).all()
        assert layer.get_seq_length() == LENGTH + 59
    assert cache.nbytes < 0.8 * dense.nbytes


def test_what_is_forgotten_is_not_attended_to() -> None:
    """A step gives the logits of the same step with all other keys masked, layer by layer."""
    model, ids = model_of("llama"), prompt()
    cache = drop_in.KVCache(model.config, dtype="fp32", evict=HALF)
    logits(model, ids, cache)
    kept = []
    whole = drop_in.KVCache(model.config, dtype="fp32", evict=kvfold.Evict(budget=1.0, window=16))
    logits(model, ids, whole)
    for layer, other in zip(cache.layers, whole.layers, strict=True):
        k, own = other.cache.read(0)[0], layer.cache.read(0)[0]
        # Every row of one is a row of the other: which, says where it is equal.
        same = (k[:, :, None] == own[:, None]).all(-1).any(-1)
        assert same.sum(-1).tolist() == layer.cache.held[0].tolist()
        kept.append(same)
    seen = []

    def masked(module: Any, q: Any, key: Any, value: Any, mask: Any, **more: Any) -> Any:
        own = torch.nn.functional.pad(kept[module.layer_idx], (0, 1), value=True)
        own = own.repeat_interleave(q.shape[1] // own.shape[0], 0)
        found = kvfold.attention(
            q, key.tensor(), value.tensor(), mask=own[None, :, None], scale=more["scaling"]
        )
        seen.append(module.layer_idx)
        assert isinstance(found, torch.Tensor)
        return found.transpose(1, 2), None

    from transformers import AttentionInterface

    truth_cache = drop_in.KVCache(model.config, dtype="fp32")
    logits(model, ids, truth_cache)
    ours = logits(model, ids[:, -1:], cache)
    AttentionInterface.register("masked", masked)
    model.set_attn_implementation("masked")
    theirs = logits(model, ids[:, -1:], truth_cache)
    assert seen == list(range(len(cache.layers)))
    # Two ways to sum 400 products in float32.
    torch.testing.assert_close(ours, theirs, rtol=2**-16, atol=2**-16)


def test_padding_on_the_left() -> None:
    """A padded sequence forgets as the same one does alone, if padding fills pages."""
    model, ids = model_of("llama"), prompt(2)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :192] = 0
    both, cache = generate(model, ids, HALF, attention_mask=mask, new=12, dtype="fp32")
    for layer in cache.layers:
        assert int(layer.cache.held[1].sum()) < int(layer.cache.held[0].sum())
    alone, _ = generate(model, ids[1:, 192:], HALF, new=12, dtype="fp32")
    assert torch.equal(both[1, LENGTH:], alone[0, LENGTH - 192 :])


def test_beams() -> None:
    model, ids = model_of("llama"), prompt()
    found, cache = generate(model, ids, HALF, num_beams=3, new=30)
    assert found.shape == (1, LENGTH + 30)
    assert cache.layers[0].cache.batch == 3


def test_a_second_prompt() -> None:
    model = model_of("llama")
    cache = drop_in.KVCache(model.config, dtype="fp32", evict=HALF)
    logits(model, prompt(), cache)
    first = cache.layers[0].cache.held.clone()
    logits(model, prompt(length=100), cache)
    assert cache.get_seq_length() == LENGTH + 100
    held = cache.layers[0].cache.held
    assert int(first.sum()) < int(held.sum()) <= held.numel() * (LENGTH + 100) // 2
    logits(model, prompt(length=1), cache)


def test_layers_with_a_window_and_first_layers_keep_everything() -> None:
    model = model_of("gemma3_text")
    _, cache = generate(model, prompt(), HALF)
    evicts = [layer.evict is not None for layer in cache.layers]
    assert evicts == [layer._window is None for layer in cache.layers]
    assert any(evicts)
    first = drop_in.KVCache(
        model_of("llama").config, evict=kvfold.Evict(dense_layers=1), select=kvfold.Select()
    ).layers
    assert [layer.evict is None for layer in first] == [True] + [False] * (len(first) - 1)
    assert all(layer._select is not None for layer in first)


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_selecting_from_what_is_left(dtype: str) -> None:
    model = model_of("llama")
    select = kvfold.Select(budget=0.25, sinks=16, recent=40, dense_below=0)
    _, both = generate(model, prompt(2), HALF, select=select, dtype=dtype, new=30)
    _, one = generate(model, prompt(2), HALF, dtype=dtype, new=30)
    for ours, theirs in zip(both.layers, one.layers, strict=True):
        assert ours.cache.bytes_per_step < 0.8 * theirs.cache.bytes_per_step


def test_rejected_tokens_are_taken_back() -> None:
    model = model_of("llama")
    cache = drop_in.KVCache(model.config, evict=HALF)
    logits(model, prompt(), cache)
    logits(model, prompt(length=5), cache)
    cache.crop(-3)
    assert cache.get_seq_length() == LENGTH + 2
    # They are kept only shortly before an eviction, and without gaps.
    assert all(layer._queries.count in (0, 2) for layer in cache.layers)
    layer = cache.layers[0]
    layer._queries.add(torch.zeros(1, 1, 3, 4))
    layer.evict = kvfold.Evict(budget=0.9, window=4)
    layer.asked(torch.zeros(1, 1, 1, 4), {})
    assert layer._queries.count == 0
    layer.evict = HALF
    with pytest.raises(InputError, match="of these some were evicted"):
        cache.crop(-300)
    assert cache.get_seq_length() == LENGTH + 2


def test_others_cannot_read_it() -> None:
    model = make("llama")
    cache = drop_in.KVCache(model.config, evict=HALF)
    model.set_attn_implementation("sdpa")
    logits(model, prompt(length=60), cache)
    with pytest.raises(UnsupportedError, match="hold different tokens"):
        logits(model, prompt(length=1), cache)


def test_other_masks_are_refused() -> None:
    model, ids = model_of("llama"), prompt()
    mask = torch.ones(1, LENGTH, dtype=torch.long)
    mask[0, 200:210] = 0
    with pytest.raises(UnsupportedError, match="knows of padding on the left"):
        logits(model, ids, drop_in.KVCache(model.config, evict=HALF), attention_mask=mask)


def test_what_cannot_evict() -> None:
    config = model_of("llama").config
    with pytest.raises(InputError, match=r"expected kvfold\.Evict"):
        drop_in.KVCache(config, evict=0.5)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="latents are kept as a whole"):
        drop_in.KVCache(build("deepseek_v3", DEEPSEEK).config, evict=HALF)
