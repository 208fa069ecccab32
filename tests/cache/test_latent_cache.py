"""The cache of latents: rows that are keys as a whole, and values in part."""

from typing import Any

import pytest
import torch

from kvfold import LatentCache
from kvfold.errors import InputError
from kvfold.ops.formats import format_of
from tests.toolbox.attention_cases import check_as_good_as_pytorch, noise, use_backend

RANK, ROPE, HEADS = 40, 16, 6
FORMATS = ("fp32", "fp16", "bf16", "fp8", "int8")


@pytest.fixture(params=["cpu", "triton", "torch"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    use_backend(request.param, monkeypatch)


def latents(batch: int, tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rows = noise(batch, tokens, RANK + ROPE, seed=seed)
    return rows[..., :RANK], rows[..., RANK:]


def check(cache: LatentCache, q: torch.Tensor) -> None:
    """Attention over what the cache says it holds, keys and values apart."""
    c, k_rope = cache.tensors(torch.float32)
    rows = torch.cat([c, k_rope], -1)[:, None]
    out, lse = cache.attend(q, scale=0.2, return_lse=True)
    lengths = torch.tensor(cache.lengths)
    values = rows[..., :RANK].contiguous()
    precision = torch.bfloat16 if cache.format.bits < 16 else None
    check_as_good_as_pytorch(
        out, q, rows, values, precision, lse, scale=0.2, causal=True, lengths=lengths
    )


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
@pytest.mark.parametrize("dtype", FORMATS)
def test_attention_is_that_of_the_rows_it_holds(dtype: str, kind: str, backend: None) -> None:
    cache = LatentCache(RANK, ROPE, batch=2, dtype=dtype, kind=kind, page_size=16)
    cache.append(*latents(2, 30))
    cache.append(*latents(1, 9, seed=1), sequences=[1])
    for tokens in (1, 3):
        cache.append(*latents(2, tokens, seed=tokens))
        check(cache, noise(2, HEADS, tokens, RANK + ROPE, seed=5))


@pytest.mark.parametrize("dtype", FORMATS)
def test_rows_are_stored_once_as_their_format_rounds_them(dtype: str, backend: None) -> None:
    """The last number counts like the first: one scale for latent and rotary key together."""
    c, k_rope = latents(1, 5)
    k_rope[:, 2] *= 50
    cache = LatentCache(RANK, ROPE, dtype=dtype)
    cache.append(c, k_rope)
    fmt = format_of(dtype)
    given = torch.cat([c, k_rope], -1)
    expected = fmt.decode(*fmt.encode(given), RANK + ROPE)
    for row, found in zip(expected.split([RANK, ROPE], -1), cache.read(), strict=True):
        assert torch.equal(found, row[0])
    assert cache.bytes_per_token == fmt.row_bytes(RANK + ROPE) + 2 * fmt.groups(RANK + ROPE)


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_pages_are_shared_until_they_change(dtype: str, backend: None) -> None:
    cache = LatentCache(RANK, ROPE, batch=2, dtype=dtype, kind="paged", page_size=16)
    cache.append(*latents(1, 40), sequences=[0])
    before, held = cache.nbytes, cache.read(0)
    cache.fork(0, 1)
    assert cache.nbytes == before
    cache.truncate(35, [1])
    cache.append(*latents(1, 3, seed=2), sequences=[1])
    assert cache.lengths == [40, 38]
    assert all(torch.equal(a, b) for a, b in zip(cache.read(0), held, strict=True))
    assert torch.equal(cache.read(1)[0][:35], held[0][:35])
    cache.reorder([1, 1, 0])
    assert cache.batch == 3
    check(cache, noise(3, HEADS, 1, RANK + ROPE))
    cache.clear()
    assert cache.lengths == [0, 0, 0]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"dtype": "int4"}, "dtype='int4'"),
    ({"dtype": 3}, "dtype"),
    ({"kind": "sliding"}, "contiguous"),
    ({"kv_lora_rank": 1020}, "at most 1024"),
    ({"qk_rope_head_dim": 0}, "qk_rope_head_dim=0"),
]


@pytest.mark.parametrize(("options", "said"), REFUSED)
def test_what_cannot_be_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        LatentCache(**{"kv_lora_rank": RANK, "qk_rope_head_dim": ROPE} | options)


def test_calls_that_do_not_fit_are_refused() -> None:
    cache = LatentCache(RANK, ROPE, max_length=8)
    c, k_rope = latents(1, 4)
    for given, said in (
        ((c[:, :, 1:], k_rope), "c has shape"),
        ((c, k_rope[:, 1:]), "4 tokens but k_rope has 3"),
        ((c, k_rope.half()), "float16"),
        ((c.clone().requires_grad_(), k_rope), "gradient"),
        (latents(1, 9), "max_length=8"),
    ):
        with pytest.raises(InputError, match=said):
            cache.append(*given)
    assert cache.lengths == [0]
    cache.append(c, k_rope)
    q = noise(1, HEADS, 1, RANK + ROPE)
    with pytest.raises(InputError, match="no scale"):
        cache.attend(q)
    with pytest.raises(InputError, match="q has shape"):
        cache.attend(q[..., 1:], scale=1.0)
