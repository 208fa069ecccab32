"""``kvfold.attention``: every path against attention written out in float64."""

from typing import Any

import pytest
import torch

import kvfold
from kvfold.kernels.cpu.rows import attend_rows
from kvfold.kernels.torch.flex import flex
from kvfold.ops.options import Options, Scoring, Visibility, check_options
from tests.toolbox.attention_cases import (
    DTYPES,
    HALF,
    check_as_good_as_pytorch,
    distance,
    naive,
    needs_kernels,
    noise,
    prompts_by,
    qkv,
    skip_without_kernels,
    slopes,
    without_kernels,
)

# How each path is reached: number of queries and of keys, and whether kernels may be used.
PATHS = {
    "kernel": (2, 65, True),
    "kernel, prompt": (37, 65, True),
    "matmul": (2, 65, False),
    "sdpa": (37, 65, False),
}
GROUPS = (1, 2, 3, 5, 6, 7, 8, 9, 16)
DIMS = [(8, 8), (13, 13), (59, 59), (64, 32), (80, 80), (13, 80), (128, 128), (576, 512)]


@pytest.fixture(params=list(PATHS))
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name = str(request.param)
    if PATHS[name][2]:
        skip_without_kernels()
        prompts_by(monkeypatch, kernels=True)
    else:
        without_kernels(monkeypatch)
    return name


def check(path: str | None, *given: torch.Tensor, **options: Any) -> None:
    """The call takes the path and is as exact as PyTorch, with log-sum-exp where there is one."""
    q, k, v = given
    if path is not None:
        assert kvfold.explain(q, k, v, **options).name == path.split(",")[0]
    out = kvfold.attention(q, k, v, **options)
    assert isinstance(out, torch.Tensor)
    assert out.dtype == q.dtype
    assert out.shape == (*q.shape[:3], v.shape[3])
    check_as_good_as_pytorch(out, q, k, v, **options)
    again = kvfold.attention(q, k, v, **options, return_lse=True)
    assert isinstance(again, tuple)
    check_as_good_as_pytorch(again[0], q, k, v, lse=again[1], **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", GROUPS)
def test_groups(path: str, group: int, dtype: torch.dtype) -> None:
    tokens, keys, _ = PATHS[path]
    check(path, *qkv(2, (2 * group, 2), tokens, keys, dtype=dtype))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_without_kernels(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    without_kernels(monkeypatch)
    for seed in range(8):
        q, k, v = qkv(2, (6, 2), 2, 65, dtype=dtype, seed=seed)
        out, lse = kvfold.attention(q, k, v, return_lse=True)
        check_as_good_as_pytorch(out, q, k, v, lse=lse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_head_sizes(path: str, dims: tuple[int, int], dtype: torch.dtype) -> None:
    tokens, keys, _ = PATHS[path]
    check(path, *qkv(1, (6, 2), tokens, keys, dims, dtype))


@pytest.mark.parametrize("keys", [4, 63, 111, 257])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lengths(keys: int, dtype: torch.dtype) -> None:
    for tokens in (1, 3, 16, 17, keys):
        check(None, *qkv(1, (3, 1), tokens, keys, dtype=dtype))


def options_of(tokens: int, keys: int) -> dict[str, dict[str, Any]]:
    bools = noise(2, 1, tokens, keys, seed=9) > 0
    bools[0, 0, 0] = False  # a query that sees nothing
    biased = noise(1, 4, tokens, keys, seed=10)
    biased[0, 1, 0] = -torch.inf
    return {
        "causal": {},
        "cross": {"causal": False},
        "window": {"window": 5},
        "window longer than the keys": {"window": 1000},
        "sinks": {"window": 7, "sinks": 3},
        "left padding": {"start": torch.tensor([0, 40])},
        "nothing to see": {"start": torch.tensor([0, keys])},
        "right padding": {"lengths": torch.tensor([keys - 1, 50])},
        "shorter than the queries": {"lengths": torch.tensor([0, tokens - 1])},
        "both paddings": {"start": torch.tensor([3, 20]), "lengths": torch.tensor([50, keys])},
        "padded sinks": {"window": 4, "sinks": 2, "start": torch.tensor([9, 30])},
        "boolean mask": {"mask": bools},
        "mask of keys": {"mask": noise(2, 1, 1, keys, seed=9) > 0, "causal": False},
        "one mask for every key": {"mask": noise(1, 4, tokens, 1, seed=9) > 0},
        "additive mask": {"mask": biased},
        "softcap": {"softcap": 0.7},
        "alibi": {"alibi_slopes": slopes(4)},
        "alibi, padded": {"alibi_slopes": slopes(4), "lengths": torch.tensor([50, keys])},
        "window to both sides": {"window": (5, 3), "causal": False},
        "window to the left": {"window": (5, -1), "causal": False, "sinks": 2},
        "window to the right": {"window": (None, 3), "causal": False},
        "own key only": {"window": (0, 0), "causal": False},
        "pair, causal": {"window": (7, 0), "sinks": 1},
        "both sides, padded": {
            "window": (9, 2), "causal": False, "sinks": 3, "start": torch.tensor([3, 20]),
            "lengths": torch.tensor([50, keys]),
        },
        "sink logits": {"sink_logits": noise(4, seed=11) * 2},
        "sink logits, nothing to see": {
            "sink_logits": noise(4, seed=11), "start": torch.tensor([0, keys]),
        },
        "no sink": {"sink_logits": torch.full((4,), -torch.inf)},
        "sink logits and a mask": {"sink_logits": noise(4, seed=11), "mask": bools},
        "sink logits and a bias": {
            "sink_logits": noise(4, seed=11), "mask": biased, "window": (9, 2), "causal": False,
        },
        "sink logits, cross": {"sink_logits": noise(4, seed=11), "causal": False},
        "scale": {"scale": 0.5},
        "scale 0": {"scale": 0.0},
        "everything": {
            "window": 9, "sinks": 2, "start": torch.tensor([1, 5]), "mask": biased,
            "lengths": torch.tensor([50, keys]), "softcap": 2.0, "alibi_slopes": slopes(4),
            "scale": 0.3, "sink_logits": noise(4, seed=11),
        },
    }  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", list(options_of(2, 65)))
def test_options(path: str, name: str, dtype: torch.dtype) -> None:
    tokens, keys, _ = PATHS[path]
    options = options_of(tokens, keys)[name]
    taken = "matmul" if path == "sdpa" and "softcap" in options else path
    check(taken, *qkv(2, (4, 2), tokens, keys, dtype=dtype), **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "keys"), [(2, 65), (20, 65), (65, 65)])
def test_extreme_logits(tokens: int, keys: int, dtype: torch.dtype) -> None:
    """Scores of ±1e4: one key takes all the weight, and nothing overflows."""
    q, k, v = qkv(1, (4, 2), tokens, keys, (64, 64))
    k[:, :, 0] = q[:, ::2, 0] * 25  # along one query, 8 * 25 * 64 / 8
    q, k, v = (q * 50).to(dtype), k.to(dtype), v.to(dtype)
    assert 5e3 < float((q.double() @ k.double().mT.repeat_interleave(2, 1)).max()) / 8 < 2e4
    out = kvfold.attention(q, k, v)
    assert isinstance(out, torch.Tensor)
    check_as_good_as_pytorch(out, q, k, v)


@pytest.mark.parametrize(("tokens", "keys"), [(2, 65), (20, 65)])
@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.bfloat16,
        torch.float16,
    ],
    ids=str,
)
def test_extreme_logits_without_kernels(
    monkeypatch: pytest.MonkeyPatch, tokens: int, keys: int, dtype: torch.dtype
) -> None:
    """In float16 q k^T overflows where the scaled scores do not."""
    without_kernels(monkeypatch)
    q, k, v = qkv(1, (4, 2), tokens, keys, (64, 64))
    k[:, :, 0] = q[:, ::2, 0] * 25
    q, k, v = (q * 50).to(dtype), k.to(dtype), v.to(dtype)
    out, lse = kvfold.attention(q, k, v, return_lse=True)
    check_as_good_as_pytorch(out, q, k, v, lse=lse)


@pytest.mark.parametrize("shape", [(0, 2, 65), (2, 0, 65), (2, 2, 0), (2, 0, 0), (2, 40, 0)])
@pytest.mark.parametrize("causal", [True, False])
def test_empty(shape: tuple[int, int, int], causal: bool) -> None:
    batch, tokens, keys = shape
    q, k, v = qkv(batch, (4, 2), tokens, keys, (16, 24))
    out, lse = kvfold.attention(q, k, v, causal=causal, return_lse=True)
    assert out.shape == (batch, 4, tokens, 24)
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, torch.full((batch, 4, tokens), -torch.inf))
    assert torch.equal(torch.as_tensor(kvfold.attention(q, k, v, causal=causal)), out)


def test_strided_inputs(path: str) -> None:
    """Transposed, sliced and expanded inputs give what their contiguous copies give."""
    tokens, keys, _ = PATHS[path]
    q, k, v = qkv(2, (4, 2), tokens, keys)
    expected = torch.as_tensor(kvfold.attention(q, k, v))

    def views(x: torch.Tensor) -> list[torch.Tensor]:
        by_token = x.transpose(1, 2).contiguous().transpose(1, 2)
        by_dim = x.mT.contiguous().mT
        wide = torch.full((*x.shape[:3], 2 * x.shape[3]), torch.nan, dtype=x.dtype)
        wide[..., ::2] = x
        return [by_token, by_dim, wide[..., ::2]]

    for given in zip(views(q), views(k), views(v), strict=True):
        assert not given[1].is_contiguous()
        torch.testing.assert_close(kvfold.attention(*given), expected, atol=1e-5, rtol=0)
    alike = [x[:1].expand(2, -1, -1, -1) for x in (q, k, v)]
    out = torch.as_tensor(kvfold.attention(alike[0], alike[1], alike[2]))
    torch.testing.assert_close(out[1], expected[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merge_of_splits_is_the_whole(path: str, dtype: torch.dtype) -> None:
    """The split-KV identity, an empty and an invisible part included."""
    tokens, keys, _ = PATHS[path]
    q, k, v = qkv(2, (6, 2), tokens, keys, dtype=dtype)
    nowhere = torch.zeros(1, 1, 1, 20, dtype=torch.bool)
    cuts = [(0, 0, None), (0, 20, None), (20, keys, None), (0, 20, nowhere)]
    parts = []
    for low, high, mask in cuts:
        cut = kvfold.attention(
            q, k[:, :, low:high], v[:, :, low:high], causal=False, mask=mask, return_lse=True
        )
        assert isinstance(cut, tuple)
        parts.append(cut)
    out, lse = kvfold.merge(parts)
    assert out.dtype == dtype
    check_as_good_as_pytorch(out, q, k, v, lse=lse, causal=False)
    nothing, none = kvfold.merge([parts[0], parts[3]])
    assert torch.equal(nothing, torch.zeros_like(out))
    assert bool(none.isneginf().all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sink_logits_given_to_one_of_the_merged_parts(path: str, dtype: torch.dtype) -> None:
    """The log-sum-exp counts the sink, so the split-KV identity holds."""
    tokens, keys, _ = PATHS[path]
    q, k, v = qkv(2, (6, 2), tokens, keys, dtype=dtype)
    sink: dict[str, Any] = {"sink_logits": noise(6, seed=4)}
    parts = []
    for low, high, options in ((0, 20, sink), (20, keys, {})):
        cut = k[:, :, low:high], v[:, :, low:high]
        found = kvfold.attention(q, *cut, causal=False, return_lse=True, **options)
        assert isinstance(found, tuple)
        parts.append(found)
    out, lse = kvfold.merge(parts)
    check_as_good_as_pytorch(out, q, k, v, lse=lse, causal=False, **sink)


@needs_kernels
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_the_operator_is_well_behaved(dtype: torch.dtype) -> None:
    q, k, v = qkv(2, (4, 2), 2, 20, (16, 24), dtype)
    lengths = torch.tensor([20, 11])
    for padding in (None, lengths):
        asked = Options(Visibility(0, 0, lengths=padding), Scoring(0.25))
        given = q, k, v, *asked.flat()
        torch.library.opcheck(attend_rows, given, test_utils=("test_schema", "test_faketensor"))


@needs_kernels
@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_decoding(dynamic: bool) -> None:
    """No graph breaks, and what eager execution gives."""

    def step(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:
        out = kvfold.attention(q * 2, k, v, lengths=lengths, window=30, softcap=9.0)
        assert isinstance(out, torch.Tensor)
        return out + 1

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    for keys in (65, 66, 130):
        q, k, v = qkv(2, (4, 2), 1, keys)
        lengths = torch.tensor([keys, 40])
        torch.testing.assert_close(compiled(q, k, v, lengths), step(q, k, v, lengths))
        truth, _ = naive(q * 2, k, v, lengths=lengths, window=30, softcap=9.0)
        assert distance(compiled(q, k, v, lengths), truth + 1) < 1e-5


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": False},
        {"window": 7, "sinks": 2},
        {"softcap": 2.0, "scale": 0.7},
        {"alibi_slopes": "yes"},
        {"window": (4, 2), "causal": False},
        {"window": (4, -1), "causal": False, "sinks": 1},
        {"sink_logits": noise(6, seed=3), "start": torch.tensor([20, 0])},
        {"start": torch.tensor([3, 0]), "lengths": torch.tensor([20, 9])},
        {"start": torch.tensor([20, 0]), "window": 4},
    ],
    ids=str,
)
def test_flex_attention_is_told_the_same(heads: tuple[int, int], options: dict[str, Any]) -> None:
    """The path that GPUs take for windows and softcaps, unfused on the CPU."""
    q, k, v = qkv(heads=heads, tokens=20, keys=20)
    if "sink_logits" in options:
        options = {**options, "sink_logits": options["sink_logits"][: heads[0]]}
    if "alibi_slopes" in options:
        options = {"alibi_slopes": torch.arange(1, heads[0] + 1, dtype=torch.float32) / 10}
    truth, true_lse = naive(q, k, v, **options)
    out, lse = flex(q, k, v, check_options((2, heads[0], 20, 20), options))
    torch.testing.assert_close(out.double(), truth, rtol=0, atol=5e-6)
    torch.testing.assert_close(lse.double(), true_lse, rtol=0, atol=1e-5)
