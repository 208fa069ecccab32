"""What the CPU kernels read back from pages is what PyTorch decodes, bit for bit."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from kvfold.cache.kv import KVCache
from kvfold.kernels.cpu.read_back import reader
from kvfold.kernels.pages import decoded, decoded_by_pytorch
from kvfold.kernels.view import KVView, Rows
from kvfold.ops.formats import FORMATS
from tests.toolbox.attention_cases import ISAS, filled, needs_kernels, noise, using

pytestmark = needs_kernels
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PLAIN: dict[str, Any] = {"exact_first": 0, "exact_recent": 0}


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with using(str(request.param)):
        yield str(request.param)


def check(views: list[KVView], keys: int) -> None:
    for dtype in DTYPES:
        assert reader(views, dtype) is not None
        for found, truth in zip(
            decoded(views, keys, dtype), decoded_by_pytorch(views, keys, dtype), strict=True
        ):
            assert found.dtype == dtype
            assert torch.equal(found, truth)


@pytest.mark.parametrize("dims", [(64, 32), (33, 50), (1, 130)], ids=str)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("page", [16, 10])
def test_every_format(isa: str, page: int, name: str, dims: tuple[int, int]) -> None:
    """Packed pages and rows, more than a unit of work; the end of a sequence and beyond."""
    options: dict[str, Any] = {"kind": "paged", "page_size": page, **PLAIN}
    cache = filled(KVCache(2, dims[0], v_head_dim=dims[1], dtype=name, **options), 333)
    views = cache._storage.views([0], [333])
    check(views, 333)
    check(views, 360)
    check(views, 29)


@pytest.mark.parametrize("kind", ["contiguous", "paged", "sliding"])
def test_exact_ends_and_sequences_of_their_own_lengths(isa: str, kind: str) -> None:
    window: dict[str, Any] = {"window": 150} if kind == "sliding" else {}
    cache = KVCache(2, 32, batch=3, dtype="int4", kind=kind, **window)
    filled(cache, 250)
    cache.append(noise(1, 2, 60, 32, seed=3), noise(1, 2, 60, 32, seed=4), [1])
    cache.truncate(200, [2])
    check(cache._storage.views([0, 1, 2], cache.lengths), 310)


def test_pages_and_positions_of_each_head() -> None:
    memory = noise(2, 9, 2, 16, 32)
    table = torch.tensor([[[1, 8, -1], [4, 0, 2]], [[3, 3, 5], [-1, 6, 7]]], dtype=torch.int32)
    begin, end = [0, 5, 17, 16], [40, 48, 33, 20]
    check([KVView.of_pages(memory[0], memory[1], table, end, begin)], 48)


def test_nothing() -> None:
    check(KVCache(2, 32, dtype="bf16")._storage.views([0], [0]), 0)


def test_others_kernels_leave_it_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    views = filled(KVCache(2, 32, dtype="bf16"), 20)._storage.views([0], [20])
    assert reader(views, torch.float64) is None
    monkeypatch.setenv("KVFOLD_BACKEND", "torch")
    assert reader(views, torch.float32) is None


@pytest.mark.parametrize("pages", [0, 1])
def test_positions_that_the_table_does_not_list_are_zeros(pages: int) -> None:
    """As in a sliding cache, whose window has gone on: the kernels must not look behind it."""
    k, v = noise(3, 2, 16, 32), noise(3, 2, 16, 32, seed=1)
    table = torch.tensor([[2, 0, 1]], dtype=torch.int32)[:, :pages].contiguous()
    view = KVView(Rows.plain(k), Rows.plain(v), table, 16, [3], [40], 40)
    for found, whole in zip(decoded([view], 40, torch.float32), (k, v), strict=True):
        assert torch.equal(found[:, :, 3 : 16 * pages], whole[2:3, :, 3 : 16 * pages])
        assert not found[:, :, 16 * pages :].any()
