"""Many queries over pages on the CPU: prompts, whole or in chunks, against float64."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from kvfold.cache.kv import KVCache
from kvfold.errors import InputError
from kvfold.kernels.dispatch import attend_view
from kvfold.kernels.view import KVView
from kvfold.ops.formats import FORMATS
from tests.toolbox.attention_cases import (
    ISAS,
    check_as_good_as_pytorch,
    contents,
    distance,
    filled,
    naive,
    needs_kernels,
    noise,
    slopes,
    using,
)

pytestmark = needs_kernels
PLAIN: dict[str, Any] = {"exact_first": 0, "exact_recent": 0}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"causal": False},
    {"window": 30},
    {"window": 30, "sinks": 3},
    {"window": (25, 9), "causal": False, "sinks": 3},
    {"softcap": 3.0, "scale": 0.3},
    {"alibi_slopes": slopes(6), "sink_logits": torch.linspace(-1, 2, 6)},
    {"start": torch.tensor([0, 101])},
]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with using(str(request.param)):
        yield str(request.param)


def check(cache: KVCache, q: torch.Tensor, slack: float = 0.0, **options: Any) -> None:
    out, lse = cache.attend(q, return_lse=True, **options)
    check_as_good_as_pytorch(out, q, *contents(cache), lse=lse, slack=slack, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("page", [16, 10])
def test_every_format(isa: str, page: int, name: str, dtype: torch.dtype) -> None:
    """Packed pages and plain rows; a chunk behind context, of heads that fill no register."""
    cache = KVCache(2, 45, v_head_dim=37, dtype=name, kind="paged", page_size=page, **PLAIN)
    check(filled(cache, 333), noise(1, 6, 97, 45, dtype=dtype))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["bf16", "int4"])
def test_every_option(isa: str, name: str, options: dict[str, Any]) -> None:
    """Blocks of queries see windows, sinks and what is exact at both ends (``int4``)."""
    cache = KVCache(2, 32, batch=2, dtype=name, kind="paged", page_size=16)
    check(filled(cache, 300), noise(2, 6, 140, 32), **options)


@pytest.mark.parametrize("tokens", [17, 64, 131, 400])
@pytest.mark.parametrize("heads", [(1, 1), (5, 1), (64, 2)], ids=str)
def test_numbers_of_queries_and_heads(heads: tuple[int, int], tokens: int) -> None:
    """From nothing, behind context, and more queries than keys: those without keys get zeros."""
    for before in (0, 75, -9):
        cache = filled(KVCache(heads[1], 16, dtype="bf16", kind="paged"), tokens + before)
        check(cache, noise(1, heads[0], tokens, 16, dtype=torch.bfloat16))


def test_large_heads() -> None:
    cache = filled(KVCache(1, 576, v_head_dim=512, dtype="bf16"), 120)
    check(cache, noise(1, 16, 60, 576, dtype=torch.bfloat16), scale=0.03)


def test_large_scores_and_many_threads() -> None:
    """Scores that only grow, so that everything decays; as many units as threads like.

    Scores of 160 are off by a unit of float32, 160 * 2^-23, and weights by twice that of values.
    """
    cache = KVCache(1, 16, batch=3, dtype="bf16")
    k = torch.linspace(0, 40, 700)[:, None].expand(3, 1, 700, 16)
    cache.append(k, noise(3, 1, 700, 16))
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        check(cache, torch.ones(3, 8, 300, 16), slack=2 * 160 * 2**-23 * 4)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("size", [1e-4, 1.0, 300.0])
@pytest.mark.parametrize("tokens", [3, 20])
def test_small_and_large_scores_are_capped(isa: str, tokens: int, size: float) -> None:
    """The log-sum-exp tells: tanh is off by 2^-20 of itself at most, in any place."""
    cache = filled(KVCache(2, 32, dtype="fp32"), 90, scale=size)
    q = noise(1, 6, tokens, 32)
    out, lse = cache.attend(q, return_lse=True, softcap=20.0)
    truth, true_lse = naive(q, *contents(cache), softcap=20.0)
    assert distance(lse, true_lse) <= 20 * min(size, 1) * 2**-20 + 1e-6
    assert distance(out, truth) <= 2 * 20 * min(size, 1) * 2**-20 * 4 + 2e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks_and_what_is_masked_may_be_nothing(dtype: torch.dtype) -> None:
    """Masked tokens hold NaN; a query that sees nothing gets zeros."""
    k, v = (noise(2, 2, 64, 32, seed=i) for i in (1, 2))
    mask = torch.rand(2, 1, 40, 64, generator=torch.Generator().manual_seed(0)) < 0.7
    mask[:, :, :, 20:27] = False
    mask[:, :, 7] = False
    table = torch.tensor([[3, 1, 0, 5], [2, 7, 6, 4]], dtype=torch.int32)
    pages = torch.full((2, 8, 2, 16, 32), torch.nan)
    hidden = ~mask.any(2)[:, 0]
    for side, x in enumerate((k, v)):
        held = x.masked_fill(hidden[:, None, :, None], torch.nan)
        pages[side, table.long().flatten()] = (
            held.unflatten(2, (4, 16)).transpose(1, 2).flatten(0, 1)
        )
    q = noise(2, 4, 40, 32, dtype=dtype)
    view = KVView.of_pages(pages[0], pages[1], table, [64, 64])
    for given in (mask, torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)):
        out = torch.as_tensor(attend_view(q, view, mask=given))
        check_as_good_as_pytorch(out, q, k, v, mask=mask)


@pytest.mark.parametrize("tokens", [1, 40])
def test_the_output_goes_where_it_is_wanted(tokens: int) -> None:
    """Into a serving engine's ``[tokens, Hq * Dv]``, and nothing beside it is touched."""
    k, v = noise(2, 8, 2, 16, 32)
    view = KVView.of_pages(k, v, torch.tensor([[3, 0, 5]], dtype=torch.int32), [45])
    q = noise(1, 6, tokens, 32)
    buffer = torch.full((tokens + 2, 6, 40), -7.0)
    out = buffer[1:-1, :, :32].transpose(0, 1)[None]
    found, lse = attend_view(q, view, return_lse=True, out=out)
    assert found is out
    plain, plain_lse = attend_view(q, view, return_lse=True)
    assert torch.equal(out, plain)
    assert torch.equal(lse, plain_lse)
    out.fill_(-7.0)
    assert bool((buffer == -7).all())


def test_others_outputs_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVFOLD_BACKEND", "torch")
    k, v = noise(2, 8, 2, 16, 32)
    view = KVView.of_pages(k, v, torch.tensor([[3, 0, 5]], dtype=torch.int32), [45])
    q, out = noise(1, 6, 20, 32), torch.empty(20, 6, 32).transpose(0, 1)[None]
    assert attend_view(q, view, out=out) is out
    assert torch.equal(out, torch.as_tensor(attend_view(q, view)))


@pytest.mark.parametrize(
    ("out", "words"),
    [
        (torch.zeros(1, 6, 20, 31), r"\[1, 6, 20, 31\] on cpu"),
        (torch.zeros(1, 6, 20, 32).half(), "float16"),
        (torch.zeros(1, 6, 32, 20).mT, "rows are not contiguous"),
        (3, "expected a tensor"),
    ],
    ids=["shape", "dtype", "strides", "kind"],
)
def test_outputs_that_do_not_fit_are_refused(out: Any, words: str) -> None:
    k, v = noise(2, 8, 2, 16, 32)
    view = KVView.of_pages(k, v, torch.tensor([[3, 0, 5]], dtype=torch.int32), [45])
    with pytest.raises(InputError, match=words):
        attend_view(noise(1, 6, 20, 32), view, out=out)


def test_an_output_is_not_for_gradients() -> None:
    k, v = noise(2, 8, 2, 16, 32)
    view = KVView.of_pages(k, v, torch.tensor([[3, 0, 5]], dtype=torch.int32), [45])
    q = noise(1, 6, 20, 32).requires_grad_()
    with pytest.raises(InputError, match="gradients"):
        attend_view(q, view, out=torch.zeros(1, 6, 20, 32))
    truth, _ = naive(q, *(x[[3, 0, 5]].transpose(0, 1).flatten(1, 2)[None, :, :45] for x in (k, v)))
    assert torch.allclose(torch.as_tensor(attend_view(q, view)).double(), truth, atol=1e-5)
