"""``torch.compile``: one graph, whatever the path and options; what eager execution gives.

Compiled with ``eager``, which traces every operator with symbols for sizes and generates no code.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import StaticCache

import kvfold
import kvfold.transformers as drop_in
from kvfold.kernels.cpu.rows import attend_rows
from kvfold.kernels.dispatch import explain
from kvfold.ops.options import Options, Scoring, Visibility, check_options
from tests.toolbox.attention_cases import (
    needs_kernels,
    noise,
    prompts_by,
    skip_without_kernels,
    without_kernels,
)
from tests.toolbox.tiny import make

# How each path is reached: number of queries, whether kernels may be used, and gradients.
PATHS = {
    "kernel": (3, True, False),
    "kernel, prompt": (37, True, False),
    "sdpa": (37, False, False),
    "sdpa, gradients": (37, True, True),
    "matmul": (3, False, False),
}
Outputs = tuple[torch.Tensor, ...]
# Sums of some dozens of products of size one, in another order.
CLOSE: dict[str, Any] = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(params=list(PATHS))
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name = str(request.param)
    if name.startswith("kernel"):
        skip_without_kernels()
        prompts_by(monkeypatch, kernels=True)
    if not PATHS[name][1]:
        without_kernels(monkeypatch)
    return name


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def options_of(tokens: int, keys: int) -> dict[str, dict[str, Any]]:
    return {
        "causal": {},
        "scale": {"scale": 0.3},
        "window": {"window": 11, "sinks": 2},
        "both sides": {"window": (11, 4), "causal": False},
        "boolean mask": {"mask": noise(5, 1, tokens, keys) > -1},
        "bias": {"mask": noise(tokens, keys)},
        "lengths": {"lengths": torch.tensor([keys, 40, 41, 50, 7])},
        "start": {"start": torch.tensor([0, 9, 3, 2, 4])},
        "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.2])},
        "sink logits": {"sink_logits": noise(4, seed=9)},
        "softcap": {"softcap": 2.0},
        "lse": {"return_lse": True},
        "everything": {
            "scale": 0.3, "softcap": 3.0, "window": 9, "sinks": 1, "mask": noise(tokens, keys),
            "lengths": torch.tensor([keys, 40, 41, 50, 7]), "sink_logits": noise(4, seed=9),
            "return_lse": True, "start": torch.tensor([0, 9, 3, 2, 4]),
        },
    }  # fmt: skip


def inputs(tokens: int, keys: int, gradients: bool = False) -> Outputs:
    """Of sizes that are all different: equal ones would be taken to be one symbol."""
    shapes = (5, 4, tokens, 16), (5, 2, keys, 16), (5, 2, keys, 24)
    return tuple(
        noise(*shape, seed=seed).requires_grad_(gradients) for seed, shape in enumerate(shapes)
    )


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, dynamic=True, backend="eager")


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Outputs:
    found = kvfold.attention(q * 2, k, v, **options)
    return found if isinstance(found, tuple) else (found,)


def check(step: Callable[..., Any], given: Outputs, **options: Any) -> None:
    """Outputs, and gradients if there are any, are those of eager execution."""
    ours, wanted = step(*given, **options), attend(*given, **options)
    torch.testing.assert_close(ours, wanted, **CLOSE)
    if wanted[0].requires_grad:
        found = [torch.autograd.grad(out[0].square().sum(), given) for out in (ours, wanted)]
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


OPTIONS = list(options_of(3, 65))
# What takes another path than the one it is meant for needs no second test.
BENT = {"softcap", "lse", "everything"}
ASKED = {
    "kernel": OPTIONS,
    "kernel, prompt": ["causal", "window", "lengths", "lse", "everything"],
    "sdpa": [name for name in OPTIONS if name not in BENT],
    "sdpa, gradients": ["scale", "bias", "sink logits"],
    "matmul": ["causal", "scale", *sorted(BENT)],
}


@pytest.mark.parametrize(
    ("path", "name"), [(path, name) for path in PATHS for name in ASKED[path]], indirect=["path"]
)
def test_one_graph_for_all_sizes(path: str, name: str) -> None:
    """``dynamic=True``: compiled once; a call for each length, as in decoding, compiles no more."""
    tokens, _, gradients = PATHS[path]
    given = inputs(tokens, 65, gradients)
    asked = options_of(tokens, 65)[name]
    assert explain(*given, **asked).name == path.split(",")[0]
    step = compiled(attend)
    check(step, given, **asked)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for more, keys in ((tokens, 66), (tokens + 3, 91)):
            check(step, inputs(more, keys, gradients), **options_of(more, keys)[name])


@pytest.mark.parametrize("path", ["kernel", "sdpa, gradients"], indirect=True)
def test_a_backend_gets_everything(path: str) -> None:
    """Functionalized and differentiated by ``aot_eager``, as inductor would have it."""
    tokens, _, gradients = PATHS[path]
    asked: dict[str, Any] = {"scale": 0.3, "window": 9, "sink_logits": noise(4, seed=9)}
    step = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    check(step, inputs(tokens, 65, gradients), **asked)


PYTHON_STATE = "lengths of a kvfold KVCache are Python state"


def test_a_fixed_cache_is_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """With every option, for whatever number of tokens, compiled once."""
    pytest.importorskip("triton")
    monkeypatch.setenv("KVFOLD_BACKEND", "triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    asked: dict[str, Any] = {"scale": 0.3, "softcap": 3.0}
    asked["sink_logits"] = noise(4, seed=9).to(device)
    ours, theirs = (
        kvfold.FixedKVCache(2, 16, max_length=32, batch=3, window=9, device=device)
        for _ in range(2)
    )

    def step(cache: Any, q: torch.Tensor, k: torch.Tensor, scale: float) -> Outputs:
        cache.append(k, k)
        found: Outputs = cache.attend(q, return_lse=True, **{**asked, "scale": scale})
        return found

    once = compiled(step)
    for index, tokens in enumerate((7, 5, 6)):
        q, k = (noise(3, heads, tokens, 16, seed=index + heads).to(device) for heads in (4, 2))
        with torch._dynamo.config.patch(error_on_recompile=index > 0):
            torch.testing.assert_close(once(ours, q, k, 0.3), step(theirs, q, k, 0.3), **CLOSE)


def test_a_layer_is_one_graph() -> None:
    layer = kvfold.nn.GroupedQueryAttention(64, 8, 2, rotary=kvfold.nn.Rotary(8), softcap=9.0)
    once = compiled(layer)
    for index, tokens in enumerate((21, 22, 50)):
        x, lengths = noise(3, tokens, 64), torch.tensor([tokens, 9, 8])
        with torch._dynamo.config.patch(error_on_recompile=index > 0):
            found = once(x, lengths=lengths)
        torch.testing.assert_close(found, layer(x, lengths=lengths), **CLOSE)


def test_a_growing_cache_is_read_between_graphs() -> None:
    """And compiles nothing anew for any length; with ``fullgraph`` one line says why not."""
    layer = kvfold.nn.GroupedQueryAttention(64, 8, 2, rotary=kvfold.nn.Rotary(8))
    ours, theirs = layer.new_cache(3), layer.new_cache(3)

    def step(x: torch.Tensor, cache: kvfold.KVCache) -> torch.Tensor:
        return torch.as_tensor(layer(x * 2, cache=cache)) + 1

    counter = CompileCounter()
    broken = torch.compile(step, dynamic=True, backend=counter)
    with torch.no_grad():
        for tokens in (7, *[1] * 12):
            x = noise(3, tokens, 64, seed=tokens)
            torch.testing.assert_close(broken(x, ours), step(x, theirs), **CLOSE)
        assert counter.frame_count <= 4  # before and after it, for many tokens and for one
        with pytest.raises(torch._dynamo.exc.Unsupported, match=PYTHON_STATE):
            compiled(step)(x, ours)
    for call in (lambda x: ours.attend(x), lambda x: ours.append(x, x), lambda x: ours.read(0)):
        with pytest.raises(torch._dynamo.exc.Unsupported, match=PYTHON_STATE):
            compiled(call)(noise(3, 8, 1, 8))


@pytest.mark.parametrize(
    ("case", "cache"),
    [
        ("llama", "static"),
        ("llama", "ours"),
        pytest.param("gemma3_text", "static", marks=pytest.mark.slow),
        pytest.param("gemma3_text", "ours", marks=pytest.mark.slow),
    ],
)
def test_a_transformers_model(case: str, cache: str) -> None:
    """One graph with transformers' fixed cache; with ours graphs that are never made anew."""
    model = make(case, **({"num_hidden_layers": 1} if case == "llama" else {}))
    model.set_attn_implementation("kvfold")

    def new() -> Any:
        if cache == "ours":
            return drop_in.KVCache(model.config)
        return StaticCache(model.config, max_cache_len=64)

    def call(function: Callable[..., Any], ids: torch.Tensor, held: Any, past: int) -> torch.Tensor:
        positions = torch.arange(past, past + ids.shape[1])
        given = {"cache_position": positions, "position_ids": positions[None]}
        found: torch.Tensor = function(ids, past_key_values=held, **given).logits
        return found

    step = torch.compile(model.forward, dynamic=True, fullgraph=cache == "static", backend="eager")
    ours, theirs, past = new(), new(), 0
    with torch.no_grad():
        for index, tokens in enumerate((21, 1, 1, 1)):
            ids = torch.full((3, tokens), 5 + index)
            with torch._dynamo.config.patch(error_on_recompile=index > 1):
                found = call(step, ids, ours, past)
            torch.testing.assert_close(found, call(model.forward, ids, theirs, past), **CLOSE)
            past += tokens
        if cache == "ours":
            whole = torch.compile(model.forward, fullgraph=True, backend="eager")
            with pytest.raises(torch._dynamo.exc.Unsupported, match=PYTHON_STATE):
                call(whole, ids, ours, past)


@needs_kernels
@pytest.mark.parametrize("name", OPTIONS)
def test_the_operator_is_well_behaved(name: str) -> None:
    """PyTorch's own checks of a custom operator: schema, shapes, symbols."""
    q, k, v = inputs(3, 65)
    asked = {**options_of(3, 65)[name]}
    asked.pop("return_lse", None)
    o = check_options((5, 4, 3, 65), asked)
    tests = "test_schema", "test_faketensor", "test_aot_dispatch_dynamic"
    torch.library.opcheck(attend_rows, (q, k, v, *o.flat()), test_utils=tests)


def test_the_fixed_caches_operators_are_well_behaved(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("KVFOLD_BACKEND", "triton")
    from kvfold.kernels.triton.ops import gpu_append, gpu_attend

    device = "cuda" if torch.cuda.is_available() else "cpu"
    cache = kvfold.FixedKVCache(2, 16, max_length=32, batch=3, dtype="int8", device=device)
    x = noise(3, 2, 5, 16).to(device)
    cache.append(x, x)
    keys, values = cache._view.keys, cache._view.values
    where = cache._table, cache.lengths
    tests = "test_schema", "test_faketensor"
    written = x, keys.data, keys.scales, *where, None, None, "int8", False, False
    torch.library.opcheck(gpu_append, written, test_utils=tests)
    q, sinks = noise(3, 4, 5, 16).to(device), noise(4).to(device)
    stored = keys.data, keys.scales, values.data, values.scales
    options = Options(Visibility(8, 0, 1), Scoring(0.3, 2.0, sink_logits=sinks))
    read = (q, *stored, *where, "int8", "int8", 16, None, *options.flat())
    torch.library.opcheck(gpu_attend, read, test_utils=tests)


def test_ragged_sequences_are_attended_between_graphs() -> None:
    q, k, begins = noise(7, 4, 16), noise(7, 2, 16), torch.tensor([0, 3, 7])

    def step(q: torch.Tensor, k: torch.Tensor, begins: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(kvfold.attention_varlen(q, k, k, begins, begins, causal=True)) + 1

    with pytest.raises(torch._dynamo.exc.Unsupported, match="reads cu_seqlens"):
        compiled(step)(q, k, begins)
    broken = torch.compile(step, dynamic=True, backend="eager")
    torch.testing.assert_close(broken(q, k, begins), step(q, k, begins))
