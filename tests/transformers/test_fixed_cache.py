"""A cache of fixed size in transformers: greedy tokens as ever, and one graph for all steps."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import CompileConfig

import kvfold.transformers as drop_in
from kvfold.errors import InputError
from kvfold.kernels.cpu.build import compiler
from kvfold.ops.formats import FORMATS
from tests.toolbox.attention_cases import needs_kernels
from tests.toolbox.tiny import CASES, make, tokens

pytestmark = needs_kernels

Step = Callable[..., torch.Tensor]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def greedy(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    found: torch.Tensor = model.generate(
        ids, max_new_tokens=12, do_sample=False, min_new_tokens=12, **options
    )
    return found


def fixed(model: Any, **options: Any) -> drop_in.FixedKVCache:
    model.set_attn_implementation("kvfold")
    return drop_in.FixedKVCache(model.config, **{"max_length": 64, **options})


@pytest.mark.parametrize("case", list(CASES))
def test_greedy_tokens_of_every_family(case: str) -> None:
    """Those of the growing cache, whose tokens are eager attention's."""
    model, ids = make(case), tokens(2, 21)
    cache = fixed(model)
    wanted = greedy(model, ids, past_key_values=drop_in.KVCache(model.config))
    assert torch.equal(greedy(model, ids, past_key_values=cache), wanted)
    assert int(cache.get_seq_length()) == 21 + 11


@pytest.mark.parametrize("case", ["llama", "gemma3_text", "mistral"])
def test_left_padding(case: str) -> None:
    model, ids = make(case), tokens(3, 20)
    mask = torch.ones_like(ids)
    mask[1, :7], mask[2, :13] = 0, 0
    cache = fixed(model)
    wanted = greedy(model, ids, attention_mask=mask, past_key_values=drop_in.KVCache(model.config))
    assert torch.equal(greedy(model, ids, attention_mask=mask, past_key_values=cache), wanted)


@pytest.mark.parametrize("turn", [3, 20], ids=["short turn", "long turn"])
@pytest.mark.parametrize("case", ["llama", "gemma2"])
def test_a_second_turn(case: str, turn: int) -> None:
    model = make(case)
    cache = fixed(model)
    first = greedy(model, tokens(1, 18), past_key_values=cache)
    whole = torch.cat([first, tokens(1, turn, seed=5)], 1)
    wanted = greedy(model, whole, past_key_values=drop_in.KVCache(model.config))
    assert torch.equal(greedy(model, whole, past_key_values=cache), wanted)


def test_beams() -> None:
    model, ids = make("llama"), tokens(2, 20)
    options = {"num_beams": 3, "max_new_tokens": 8, "do_sample": False}
    cache = fixed(model)
    wanted = model.generate(ids, past_key_values=drop_in.KVCache(model.config), **options)
    assert torch.equal(model.generate(ids, past_key_values=cache, **options), wanted)


def decode(step: Step, cache: Any, ids: torch.Tensor, steps: int = 6) -> list[torch.Tensor]:
    """Logits of the prompt's last token, and of greedy steps; only steps go through ``step``."""
    found = [step(ids, cache)]
    for index in range(steps):
        with torch._dynamo.config.patch(error_on_recompile=index > 0):
            found.append(step(found[-1].argmax(-1), cache))
    return found


def step_of(model: Any, forward: Callable[..., Any]) -> Step:
    @torch.no_grad()
    def step(ids: torch.Tensor, cache: Any) -> torch.Tensor:
        call = model.forward if ids.shape[1] > 1 else forward
        logits: torch.Tensor = call(ids, past_key_values=cache).logits[:, -1:]
        return logits

    return step


SLOW = pytest.mark.slow
COMPILED = ["llama", "gemma3_text"]
COMPILED_TOO = [pytest.param(case, marks=SLOW) for case in CASES if case not in COMPILED]


@pytest.mark.parametrize("case", [*COMPILED, *COMPILED_TOO])
def test_a_step_is_one_graph(case: str) -> None:
    """For all lengths and for another cache of that size; results are those of eager execution."""
    model, ids = make(case), tokens(2, 18)
    cache = fixed(model)
    wanted = decode(step_of(model, model.forward), cache, ids)
    compiled = step_of(model, torch.compile(model.forward, fullgraph=True, backend="aot_eager"))
    for again in (False, True):
        with torch._dynamo.config.patch(error_on_recompile=again):
            found = decode(compiled, fixed(model), ids)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "dtype", [("int8", "int4"), *(pytest.param(name, marks=SLOW) for name in FORMATS)], ids=str
)
def test_every_format_compiles(dtype: Any) -> None:
    model, ids = make("llama"), tokens(2, 18)
    wanted = decode(step_of(model, model.forward), fixed(model, dtype=dtype), ids)
    compiled = step_of(model, torch.compile(model.forward, fullgraph=True, backend="aot_eager"))
    found = decode(compiled, fixed(model, dtype=dtype), ids)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
def test_generate_compiles_and_prepacks() -> None:
    """What a user writes: inductor's code, and prepacked layers where they gain."""
    model, ids = make("llama", num_hidden_layers=1), tokens(1, 18)
    wanted = greedy(model, ids, past_key_values=fixed(model))
    config = CompileConfig(fullgraph=True, mode="default")
    config._compile_all_devices = True
    with drop_in.prepack(model):
        found = greedy(model, ids, past_key_values=fixed(model), compile_config=config)
    assert torch.equal(found, wanted)


def test_a_full_cache_refuses_compiled_or_not() -> None:
    model, ids = make("llama"), tokens(1, 18)
    compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    for forward in (model.forward, compiled):
        with pytest.raises(InputError, match="21 tokens do not fit a fixed cache of 20"):
            decode(step_of(model, forward), fixed(model, max_length=20), ids)


def test_crop_and_reset() -> None:
    model, ids = make("llama"), tokens(1, 18)
    cache = fixed(model)
    step = step_of(model, model.forward)
    wanted = decode(step, cache, ids, 3)[-1]
    cache.crop(-3)
    assert int(cache.get_seq_length()) == 18
    cache.reset()
    assert int(cache.get_seq_length()) == 0
    assert torch.equal(decode(step, cache, ids, 3)[-1], wanted)
    with pytest.raises(InputError, match="crop"):
        cache.crop("x")


def test_wrong_calls() -> None:
    model = make("llama")
    with pytest.raises(InputError, match="max_length"):
        drop_in.FixedKVCache(model.config, max_length=0)
    with pytest.raises(InputError, match="before it was given any keys"):
        _ = drop_in.FixedKVLayer(4, None, None).held
