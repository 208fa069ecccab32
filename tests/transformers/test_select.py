"""The drop-in's cache that reads some of its pages."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig

import kvfold
import kvfold.transformers as drop_in
from kvfold.cache.kv import KVCache
from kvfold.errors import InputError, UnsupportedError
from kvfold.transformers.attend import left_padding
from tests.toolbox.tiny import DEEPSEEK, build, make

SMALL = kvfold.Select(budget=0.25, sinks=16, recent=40, dense_below=0)
LENGTH = 400


def prompt(rows: int = 1) -> torch.Tensor:
    return torch.randint(3, 90, (rows, LENGTH), generator=torch.Generator().manual_seed(1))


def model_of(case: str, **more: Any) -> Any:
    model = make(case, max_position_embeddings=1024, **more)
    model.set_attn_implementation("kvfold")
    return model


def generate(model: Any, ids: torch.Tensor, select: kvfold.Select | None, **more: Any) -> Any:
    cache = drop_in.KVCache(model.config, select=select)
    more = {"attention_mask": torch.ones_like(ids)} | more
    found = model.generate(
        ids, past_key_values=cache, max_new_tokens=6, do_sample=False, eos_token_id=None, **more
    )
    return found, cache


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Tensor, Any]]:
    """What every call of a cache's attention would read, and the call's options."""
    seen: list[tuple[torch.Tensor, Any]] = []
    attend = KVCache.attend

    def watched(self: KVCache, q: torch.Tensor, **options: Any) -> Any:
        if self.select is not None and q.shape[2] == 1:
            given = {name: x for name, x in options.items() if name != "return_lse"}
            seen.append((self.selected(q, **given), options))
        return attend(self, q, **options)

    monkeypatch.setattr(KVCache, "attend", watched)
    return seen


def test_a_whole_budget_changes_nothing() -> None:
    model, ids = model_of("llama"), prompt(2)
    whole, _ = generate(model, ids, kvfold.Select(budget=1.0, dense_below=0))
    dense, _ = generate(model, ids, None)
    assert torch.equal(whole, dense)


def test_every_step_reads_the_budget(asked: list[tuple[torch.Tensor, Any]]) -> None:
    model = model_of("llama")
    _, cache = generate(model, prompt(2), SMALL)
    assert len(asked) == 5 * len(cache.layers)  # the first token comes with the prompt
    for read, _ in asked:
        assert int(read.sum(-1).max()) <= max(SMALL.tokens(read.shape[2]), 64 + 40 + 63)


def test_padding_on_the_left(asked: list[tuple[torch.Tensor, Any]]) -> None:
    """Padded sequences select, too, and read none of their padding."""
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :150] = 0
    generate(model_of("llama"), prompt(2), SMALL, attention_mask=mask)
    assert asked
    for read, options in asked:
        assert options["mask"] is None
        assert options["start"].tolist() == [0, 150]
        assert not read[1, :, :150].any()
        assert read[1, :, 150:166].all()
        assert not read.all()


def test_beams() -> None:
    model, ids = model_of("llama"), prompt()
    found, _ = generate(model, ids, SMALL, num_beams=3)
    assert found.shape == (1, LENGTH + 6)


def test_first_layers_may_read_everything() -> None:
    config = model_of("llama").config
    select = kvfold.Select(dense_layers=1)
    layers = drop_in.KVCache(config, select=select).layers
    assert [layer._select for layer in layers] == [None] + [select] * (len(layers) - 1)


def test_pages_are_short_where_summaries_allow_it() -> None:
    model = model_of("llama")
    for dtype, given, found in (("bf16", None, 32), ("int4", None, 64), ("bf16", 16, 16)):
        cache = drop_in.KVCache(model.config, dtype=dtype, select=SMALL, page_size=given)
        with torch.no_grad():
            model(prompt(), past_key_values=cache)
        assert {layer.cache._storage.main.page_size for layer in cache.layers} == {found}
    with pytest.raises(InputError, match="page_size is of select"):
        drop_in.KVCache(model.config, page_size=32)
    with pytest.raises(InputError, match="page_size=128"):
        drop_in.KVCache(model.config, select=SMALL, page_size=128)
    wide = LlamaConfig(hidden_size=128, num_attention_heads=2)
    with pytest.raises(InputError, match="pages of 16 tokens would take more than 5%"):
        drop_in.KVCache(wide, dtype="int4", select=SMALL, page_size=16)


def test_layers_with_a_window_read_it(asked: list[tuple[torch.Tensor, Any]]) -> None:
    model = model_of("gemma3_text")
    _, cache = generate(model, prompt(), SMALL)
    selects = [layer.cache.select is not None for layer in cache.layers]
    assert selects == [layer._window is None for layer in cache.layers]
    assert any(selects)
    assert asked


def test_what_cannot_select() -> None:
    config = model_of("llama").config
    with pytest.raises(InputError, match=r"expected kvfold\.Select"):
        drop_in.KVCache(config, select=0.5)  # type: ignore[arg-type]
    latent = build("deepseek_v3", DEEPSEEK).config
    with pytest.raises(UnsupportedError, match="latents are read as a whole"):
        drop_in.KVCache(latent, select=SMALL)


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("tokens", [1, 3])
def test_masks_that_are_padding(tokens: int, additive: bool) -> None:
    keys = 10
    start = torch.tensor([0, 4])
    position = torch.arange(keys - tokens, keys)[:, None]
    shown = (torch.arange(keys) >= start[:, None, None]) & (torch.arange(keys) <= position)

    def as_given(shown: torch.Tensor) -> torch.Tensor:
        if not additive:
            return shown[:, None]
        least = torch.finfo(torch.float32).min
        return torch.zeros(shown.shape).masked_fill(~shown, least)[:, None]

    found = left_padding(as_given(shown), 2, tokens)
    assert found is not None
    assert torch.equal(found, start)
    hole = shown.clone()
    hole[0, :, 2] = False
    assert left_padding(as_given(hole), 2, tokens) is None
    ahead = shown.clone()
    ahead[0, 0, -1] = True
    if tokens > 1:
        assert left_padding(as_given(ahead), 2, tokens) is None
    one = left_padding(as_given(shown[1:]), 3, tokens)
    assert one is not None
    assert one.tolist() == [4, 4, 4]
