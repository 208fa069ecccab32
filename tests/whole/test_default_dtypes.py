"""PyTorch's default dtype and device, which programs that load models change, change nothing."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

import kvfold
import kvfold.transformers
from kvfold.cache.kv import KVCache
from kvfold.kernels.torch.flex import flex
from kvfold.nn import GroupedQueryAttention
from kvfold.ops.formats import FORMATS
from kvfold.ops.options import Options, Scoring, Visibility
from kvfold.ops.rope import Rotary, following
from tests.toolbox import tiny
from tests.toolbox.attention_cases import (
    DEFAULT_DTYPES,
    DTYPES,
    default_dtype,
    noise,
    qkv,
    without_kernels,
)

OPTIONS: dict[str, dict[str, Any]] = {
    "causal": {},
    "boolean mask": {"mask": noise(2, 1, 1, 65, seed=9) > 0},
    "additive mask": {"mask": noise(1, 4, 1, 65, seed=9)},
    "padding": {"start": torch.tensor([0, 40]), "lengths": torch.tensor([50, 65])},
    "bias": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.1], dtype=torch.float32)},
    "window": {"window": 9, "sinks": 2, "softcap": 3.0},
    "sink logits": {"sink_logits": torch.tensor([0.5, 2.0, 0.1, -3.0], dtype=torch.float32)},
}


@pytest.fixture(params=[*DEFAULT_DTYPES, "meta"])
def otherwise(request: pytest.FixtureRequest) -> Callable[[Callable[[], Any]], Any]:
    """Run something with another default dtype, or with another default device."""

    def run(what: Callable[[], Any]) -> Any:
        if request.param == "meta":
            with torch.device("meta"):
                return what()
        with default_dtype(str(request.param)):
            return what()

    return run


def check_equal(found: Any, expected: Any) -> None:
    """The same bits in the same dtypes."""
    pairs = list(zip(tree_leaves(found), tree_leaves(expected), strict=True))
    assert pairs
    for x, y in pairs:
        assert x.dtype == y.dtype
        assert x.device == y.device
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("name", list(OPTIONS))
@pytest.mark.parametrize("path", ["kernel", "plain", "many", "gradients"])
def test_attention(
    monkeypatch: pytest.MonkeyPatch, otherwise: Any, path: str, name: str, dtype: torch.dtype
) -> None:
    q, k, v = qkv(2, (4, 2), 20 if path == "many" else 2, 65, dtype=dtype)
    if path == "plain":
        without_kernels(monkeypatch)

    def call() -> list[torch.Tensor]:
        x = q.clone().requires_grad_(path == "gradients")
        out: Any = kvfold.attention(x, k, v, **OPTIONS[name])
        again: Any = kvfold.attention(x, k, v, **OPTIONS[name], return_lse=True)
        found = [out, *again, *kvfold.merge([again, again])]
        if path == "gradients":
            found += torch.autograd.grad(out.sum(), x)
        return [each.detach() for each in found]

    check_equal(otherwise(call), call())


@pytest.mark.parametrize("source", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["contiguous", "paged", "sliding", "selecting", "evicting"])
@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("compiled", [True, False])
def test_caches(
    monkeypatch: pytest.MonkeyPatch,
    otherwise: Any,
    compiled: bool,
    name: str,
    kind: str,
    source: torch.dtype,
) -> None:
    if not compiled:
        without_kernels(monkeypatch)
    own: dict[str, Any] = {"kind": kind}
    if kind == "sliding":
        own |= {"window": 30, "sinks": 2}
    if kind == "selecting":
        select = kvfold.Select(budget=40, sinks=0, recent=8, dense_below=0)
        own = {"kind": "paged", "select": select}
    if kind == "evicting":
        own = {"kind": "paged", "page_size": 16}
    k, v = noise(2, 2, 130, 40, dtype=source), noise(2, 2, 130, 24, dtype=source, seed=1)
    q = noise(2, 4, 2, 40, dtype=source, seed=2)
    mask = noise(2, 4, 2, 130, seed=3) > -1

    def use() -> list[torch.Tensor]:
        cache = KVCache(2, 40, v_head_dim=24, batch=2, dtype=name, **own)
        found = [*cache.read(0), *cache.tensors(torch.float32)]
        for low, high in ((0, 80), (80, 81), (81, 130)):
            cache.append(k[:, :, low:high], v[:, :, low:high])
        found += cache.attend(q, mask=mask, return_lse=True)
        if kind == "evicting":
            found.append(cache.evict(0.5, by=cache.scores(q), sinks=2, recent=8))
            cache.append(k[:, :, :1], v[:, :, :1])
        found += cache.attend(q, return_lse=True)
        found += [*cache.read(1), *cache.tensors(source)]
        return found

    check_equal(otherwise(use), use())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layers(otherwise: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rotary = Rotary(8)
    layer = GroupedQueryAttention(32, 4, 2, rotary=rotary, dtype=dtype, device="cpu").eval()
    x, step = noise(1, 7, 32, dtype=dtype), noise(1, 1, 32, dtype=dtype, seed=1)

    def call() -> list[torch.Tensor]:
        cache = kvfold.KVCache(2, 8)
        return [layer(x), layer(x, cache=cache), layer(step, cache=cache)]

    with torch.no_grad():
        check_equal(otherwise(call), call())


def test_flex_and_rotary(otherwise: Any) -> None:
    q, k, v = qkv(heads=(4, 2), tokens=20, keys=20)
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.1], dtype=torch.float32)

    def call() -> list[torch.Tensor]:
        found = flex(q, k, v, Options(Visibility(8, 0, 1), Scoring(None, 2.0, slopes)))
        cpu = torch.device("cpu")
        positions = following(20, [0, 3], cpu)
        cos, sin = Rotary(8).cos_sin(positions)
        return [*found, positions, cos, sin, Rotary(8).apply(q, cos, sin)]

    check_equal(otherwise(call), call())


@pytest.mark.parametrize("cache_dtype", ["bf16", "int4"])
@pytest.mark.parametrize("name", DEFAULT_DTYPES)
def test_drop_in(name: str, cache_dtype: str) -> None:
    model = tiny.make("llama")
    model.set_attn_implementation("kvfold")
    prompt = torch.arange(1, 41, device="cpu").view(1, -1)

    def tokens() -> torch.Tensor:
        cache = kvfold.transformers.KVCache(model.config, dtype=cache_dtype)
        ids = model.generate(
            prompt, past_key_values=cache, max_new_tokens=12, do_sample=False, pad_token_id=0
        )
        return torch.as_tensor(ids)

    expected = tokens()
    with default_dtype(name):
        check_equal(tokens(), expected)


def test_folding() -> None:
    model, windows = tiny.make("llama"), torch.arange(96).view(2, 48)
    expected = kvfold.fold_model(model, 1, windows=windows).model.state_dict()
    for name in DEFAULT_DTYPES:
        with default_dtype(name):
            check_equal(kvfold.fold_model(model, 1, windows=windows).model.state_dict(), expected)


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    before = torch.get_default_dtype()
    yield
    assert torch.get_default_dtype() is before


FILES = (
    "kernels/test_attention*.py", "kernels/test_kernels*.py", "kernels/test_triton.py",
    "kernels/test_triton_append.py", "kernels/test_triton_caches.py", "kernels/test_view.py",
    "cache/test_cache*.py", "ops/test_*.py", "nn/test_*.py", "transformers/test_transformers.py",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", DEFAULT_DTYPES)
def test_whole_files(request: pytest.FixtureRequest, name: str) -> None:
    tests = request.config.rootpath / "tests"
    files = [str(path) for each in FILES for path in sorted(tests.glob(each))]
    assert all(any(tests.glob(each)) for each in FILES)
    command = [sys.executable, "-m", "pytest", "--default-dtype", name, *files]
    done = subprocess.run(
        command, cwd=request.config.rootpath, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:]
