"""Pages that somebody else keeps, read in place by every backend."""

from typing import Any

import pytest
import torch

from kvfold.cache.kv import KVCache
from kvfold.errors import InputError
from kvfold.kernels.dispatch import attend_view
from kvfold.kernels.registry import home
from kvfold.kernels.view import KVView
from tests.toolbox.attention_cases import (
    allowed_error,
    filled,
    naive,
    noise,
    skip_without_kernels,
)

BACKENDS = ("cpu", "triton", "torch")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CLOSE = 5e-6  # float32 sums of products of size one


@pytest.fixture(params=BACKENDS)
def _backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "cpu":
        skip_without_kernels()
    if request.param == "triton":
        pytest.importorskip("triton")
    monkeypatch.setenv("KVFOLD_BACKEND", request.param)


def engine(lengths: list[int], page: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A serving engine's memory ``[2, P, page, Hkv, D]``, poisoned where nothing is, and a table.

    Pages are handed out in no order; those behind a sequence's end are another's.
    """
    width = max(-(-length // page) for length in lengths) + 1
    order = torch.randperm(len(lengths) * width, generator=torch.Generator().manual_seed(1))
    table = order.to(torch.int32).view(len(lengths), width)
    memory = torch.full((2, table.numel(), page, 2, 32), torch.nan, dtype=dtype)
    for b, length in enumerate(lengths):
        rows = noise(2, length, 2, 32, dtype=dtype, seed=b)
        for j in range(length):
            memory[:, table[b, j // page], j % page] = rows[:, j]
    return memory, table


def truth_of(
    q: torch.Tensor, lengths: list[int], dtype: torch.dtype, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    outs = []
    for b, length in enumerate(lengths):
        k, v = noise(2, length, 2, 32, dtype=dtype, seed=b).transpose(1, 2)[:, None]
        outs.append(naive(q[b : b + 1], k, v, **options))
    out, lse = (torch.cat(side) for side in zip(*outs, strict=True))
    return out, lse


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("where", [list, torch.Tensor])
@pytest.mark.parametrize("page", [1, 5, 16])
@pytest.mark.parametrize("name", DTYPES)
def test_an_engines_pages_are_read_where_they_lie(name: str, page: int, where: type) -> None:
    lengths, dtype = [37, 1, 16, 80], DTYPES[name]
    memory, table = engine(lengths, page, dtype)
    given = lengths if where is list else torch.tensor(lengths, dtype=torch.int32)
    view = KVView.of_pages(memory[0].transpose(1, 2), memory[1].transpose(1, 2), table, given)
    assert view.keys.data.data_ptr() == memory.data_ptr()
    q = noise(4, 6, 1, 32, seed=9)
    asked: list[dict[str, Any]] = [{}, {"window": 9, "sinks": 2, "softcap": 3.0}]
    for options in asked:
        out, lse = attend_view(q, view, return_lse=True, **options)
        truth, true_lse = truth_of(q, lengths, dtype, **options)
        torch.testing.assert_close(out.double(), truth, rtol=0, atol=CLOSE)
        torch.testing.assert_close(lse.double(), true_lse, rtol=0, atol=2 * CLOSE)


@pytest.mark.usefixtures("_backend")
def test_positions_before_the_first_are_not_read() -> None:
    memory, table = engine([40, 23], 4, torch.float32)
    for b, first in enumerate((9, 4)):
        for j in range(first):
            memory[:, table[b, j // 4], j % 4] = torch.nan
    k, v = memory.transpose(2, 3)
    view = KVView.of_pages(k, v, table, [40, 23], begin=[9, 4])
    q = noise(2, 4, 1, 32, seed=9)
    found = torch.as_tensor(attend_view(q, view))
    for b, (length, first) in enumerate(((40, 9), (23, 4))):
        start = torch.tensor([first])
        kv = noise(2, length, 2, 32, seed=b).transpose(1, 2)[:, None]
        truth, _ = naive(q[b : b + 1], kv[0], kv[1], start=start)
        torch.testing.assert_close(found[b : b + 1].double(), truth, rtol=0, atol=CLOSE)


def test_gradients_reach_the_queries() -> None:
    memory, table = engine([30], 8, torch.float32)
    k, v = memory.transpose(2, 3)
    q = noise(1, 4, 3, 32).requires_grad_()
    torch.as_tensor(attend_view(q, KVView.of_pages(k, v, table, [30]))).sum().backward()
    assert q.grad is not None
    assert bool(q.grad.isfinite().all())


GOOD = torch.zeros(6, 2, 4, 32)
TABLE = torch.tensor([[0, 5], [2, -1]], dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k": GOOD[0]}, r"k: torch.Size\(\[2, 4, 32\]\)"),
        ({"v": None}, "v: NoneType"),
        ({"v": GOOD[:5]}, "do not fit"),
        ({"v": GOOD.half()}, "float16"),
        ({"k": GOOD.mT.contiguous().mT}, "rows are not contiguous"),
        ({"k": GOOD.double(), "v": GOOD.double()}, "float64"),
        ({"table": TABLE.long()}, "int32"),
        ({"table": TABLE + 1}, "page 6 of 6"),
        ({"lengths": [8]}, "2 numbers"),
        ({"lengths": [8, 9]}, "0 to 8"),
        ({"begin": torch.tensor([-1, 0], dtype=torch.int32)}, "begin"),
        ({"lengths": torch.tensor([8, 3])}, "int64"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_kernels_could_not_follow_is_refused(change: dict[str, Any], words: str) -> None:
    given: dict[str, Any] = {"k": GOOD, "v": GOOD, "table": TABLE, "lengths": [8, 3], **change}
    with pytest.raises(InputError, match=words):
        KVView.of_pages(**given)


@pytest.mark.parametrize(
    ("q", "words"),
    [
        (noise(3, 4, 1, 32), "2 sequences"),
        (noise(2, 3, 1, 32), "2 KV heads"),
        (noise(2, 4, 1, 31), "of 32"),
        (noise(2, 4, 1, 32).double(), "float64"),
    ],
    ids=["batch", "heads", "dim", "dtype"],
)
def test_queries_that_do_not_fit_are_refused(q: torch.Tensor, words: str) -> None:
    with pytest.raises(InputError, match=words):
        attend_view(q, KVView.of_pages(GOOD, GOOD, TABLE, [8, 3]))


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("dtype", ["bf16", "int8", "int4"])
@pytest.mark.parametrize(
    "options", [{}, {"window": 20, "sinks": 4, "tokens": 3}], ids=["", "window"]
)
def test_each_kv_head_may_have_pages_and_positions_of_its_own(
    dtype: str, options: dict[str, Any]
) -> None:
    """Where a cache lies, as its own table has it; each head sees some of it, as in float64."""
    options = dict(options)
    lengths, tokens = [70, 70], options.pop("tokens", 1)
    cache = KVCache(
        2, 32, batch=2, dtype=dtype, kind="paged", page_size=16, exact_first=0, exact_recent=0
    )
    filled(cache, 70)
    (whole,) = cache._storage.views([0, 1], lengths)
    begins, ends = [0, 16, 33, 5], [70, 40, 70, 21]
    table = whole.table[:, None].repeat(1, 2, 1)
    for at, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        b, head = divmod(at, 2)
        page = torch.arange(table.shape[2]) * 16
        table[b, head, (page + 16 <= begin) | (page >= end)] = -1
    q = noise(2, 4, tokens, 32, seed=9)
    k, v = cache.tensors(torch.float32)
    j = torch.arange(70)
    seen = torch.stack([(j >= b) & (j < e) for b, e in zip(begins, ends, strict=True)])
    mask = seen.view(2, 2, 1, 70).repeat_interleave(2, 1)
    truth, true_lse = naive(q, k, v, mask=mask, **options)
    for kind in (list, torch.Tensor):
        given = [x if kind is list else torch.tensor(x, dtype=torch.int32) for x in (begins, ends)]
        view = whole._replace(table=table, begin=given[0], end=given[1])
        out, lse = attend_view(q, view, lengths, return_lse=True, **options)
        close = allowed_error(cache, q, k, v) if home(q.device).name == "cpu" else CLOSE
        torch.testing.assert_close(out.double(), truth, rtol=0, atol=close)
        torch.testing.assert_close(lse.double(), true_lse, rtol=0, atol=max(close, 2 * CLOSE))


def test_tables_of_each_head_are_checked() -> None:
    table = TABLE[:, None].repeat(1, 2, 1)
    view = KVView.of_pages(GOOD, GOOD, table, [8, 3, 0, 5])
    assert view.per_head
    with pytest.raises(InputError, match="4 numbers"):
        KVView.of_pages(GOOD, GOOD, table, [8, 3])
    with pytest.raises(InputError, match="int32"):
        KVView.of_pages(GOOD, GOOD, table[:, :1], [8, 3])
    with pytest.raises(InputError, match="4 lengths for 2 sequences"):
        attend_view(noise(2, 4, 1, 32), view)
