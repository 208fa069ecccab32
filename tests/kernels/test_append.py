"""Prompts are written a block at a time, on all threads: to the bytes that tokens make alone."""

from collections.abc import Iterator

import pytest
import torch

from kvfold.cache.store import Shape, Store
from kvfold.ops.formats import FORMATS, encode, format_of
from tests.toolbox.attention_cases import ISAS, needs_kernels, noise, using

pytestmark = needs_kernels
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with using(str(request.param)):
        yield str(request.param)


def store(name: str, dims: tuple[int, int], page: int, batch: int = 1) -> Store:
    fmt = format_of(name)
    made = Store(Shape(batch, 2, *dims, fmt, fmt, page))
    for b in range(batch):
        made.reserve(b, 0, 150)
    return made


def special(x: torch.Tensor) -> torch.Tensor:
    """With ties, zeros of both signs, and what is not finite, in rows of their own."""
    x[:, :, 3, 1::2] = -x[:, :, 3, : x.shape[3] // 2 * 2 : 2]
    x[:, :, 4] = 0.0
    x[:, :, 5] = -0.0
    x[:, :, 6, 2] = torch.nan
    x[:, :, 7, 5] = -torch.inf
    x[:, :, 8] = 1.0
    x[:, :, 9] = -1.0
    return x


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("dims", [(64, 64), (20, 13), (33, 50), (130, 8)], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_blocks_are_what_their_tokens_are(isa: str, name: str, dims: tuple[int, int]) -> None:
    for dtype in DTYPES:
        k, v = (special(noise(1, 2, 70, d, seed=i)).to(dtype) for i, d in enumerate(dims))
        for first in (0, 9):
            whole, single = store(name, dims, 48), store(name, dims, 48)
            whole.write(k, v, first, [0])
            for t in range(70):
                single.write(k[:, :, t : t + 1], v[:, :, t : t + 1], first + t, [0])
            for a, b in zip(whole, single, strict=True):
                assert same(a, b)


@pytest.mark.parametrize("name", FORMATS)
def test_ties_and_zeros_are_what_their_format_says(isa: str, name: str) -> None:
    """Of numbers of one size the first gives a group's scale its sign, as in ``encode``."""
    x = special(noise(1, 2, 70, 64))
    kept = store(name, (64, 64), 10)
    kept.write(x, x, 0, [0])
    half, finite = kept.values, x[0].isfinite().all(-1)
    data, scales = encode(x[0], FORMATS[name])
    pages = kept.table[0, :7].long()
    held = half.layout.rows(half.data[pages]).transpose(0, 1).flatten(1, 2)
    assert torch.equal(held[finite], data[finite])
    held = half.layout.scales(half.scales[pages]).transpose(0, 1).flatten(1, 2)
    assert same(held[finite], scales[finite])


@pytest.mark.parametrize("name", ["bf16", "int4"])
def test_threads_share_prompts(name: str) -> None:
    """Any number of threads makes the same pages, of sequences that begin anywhere."""
    k, v = noise(3, 2, 130, 32), noise(3, 2, 130, 32, seed=1)
    made = []
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        try:
            kept = store(name, (32, 32), 16, batch=3)
            kept.kernels.append(k, v, kept.view([0, 1, 2], None, [0, 7, 19], 0))
        finally:
            torch.set_num_threads(before)
        made.append(kept)
    for kept in made[1:]:
        assert all(same(a, b) for a, b in zip(kept, made[0], strict=True))
