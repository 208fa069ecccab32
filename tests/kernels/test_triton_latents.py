"""Triton's kernel for latents: rows that are keys as a whole and values in part."""

from typing import Any

import pytest
import torch

from kvfold import LatentCache
from kvfold.kernels.view import KVView, Rows
from kvfold.ops.options import check_options
from tests.toolbox.attention_cases import naive, noise
from tests.toolbox.triton_cases import DEVICE, SINK_LOGITS, check, stored

pytest.importorskip("triton")
from kvfold.kernels.triton import launch

pytestmark = pytest.mark.usefixtures("triton")
FORMATS = ("fp32", "fp16", "bf16", "fp8", "int8")


def case(
    name: str = "fp32",
    sizes: tuple[int, int] = (64, 32),
    heads: int = 4,
    tokens: int = 1,
    lengths: tuple[int, ...] = (70, 33),
    page: int = 16,
    dtype: torch.dtype = torch.float32,
    splits: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of the kernel, and of float64 on the decoded rows."""
    batch, keys, (rank, rope) = len(lengths), max(*lengths, 1), sizes
    q = noise(batch, heads, tokens, rank + rope, dtype=dtype)
    k, back = stored(noise(batch, 1, keys, rank + rope, seed=1), name, page, key=True)
    v = Rows(k.fmt, k.data[..., :rank], k.scales, rank)
    pages = -(-keys // page)
    table = torch.arange(batch * pages, dtype=torch.int32).view(batch, pages).to(DEVICE)
    ends = torch.tensor(lengths, dtype=torch.int32)
    view = KVView(k, v, table, page, None, ends.to(DEVICE), keys)
    assert view.within
    here = {n: o.to(DEVICE) if isinstance(o, torch.Tensor) else o for n, o in options.items()}
    asked = check_options((batch, heads, tokens, keys), here)
    out, lse = launch.attend(q.to(DEVICE), [view], ends.to(DEVICE), asked, splits)
    truth, true_lse = naive(q, back, back[..., :rank], lengths=ends, **options)
    return out.cpu(), lse.cpu(), truth, true_lse


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("sizes", [(24, 8), (64, 32), (256, 32), (512, 64)], ids=str)
def test_formats_and_sizes(name: str, sizes: tuple[int, int]) -> None:
    check(case(name, sizes))


@pytest.mark.parametrize("heads", [1, 20, 70])
@pytest.mark.parametrize("tokens", [1, 3])
def test_all_heads_share_the_rows(heads: int, tokens: int) -> None:
    check(case("int8", heads=heads, tokens=tokens, lengths=(40,)))


@pytest.mark.parametrize("lengths", [(0, 1), (257, 5)], ids=str)
@pytest.mark.parametrize("page", [1, 64, 512])
def test_lengths_and_pages(lengths: tuple[int, ...], page: int) -> None:
    check(case("fp8", lengths=lengths, page=page))


@pytest.mark.parametrize(
    "options",
    [
        {"causal": False, "tokens": 3},
        {"window": 20, "sinks": 3, "tokens": 4},
        {"scale": 0.3, "softcap": 2.0},
        {"start": torch.tensor([7, 30], dtype=torch.int32)},
        {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.0]), "tokens": 2},
        {"window": (9, 1), "causal": False, "tokens": 4},
        {"sink_logits": SINK_LOGITS, "tokens": 3},
        {"sink_logits": SINK_LOGITS, "splits": 3},
        {"splits": 64},
        {"mask": noise(2, 1, 1, 70, seed=3) > -0.5},
        {"mask": noise(2, 4, 2, 70, seed=3), "tokens": 2},
    ],
    ids=lambda options: "-".join(options),
)
def test_what_hides_and_bends_scores(options: dict[str, Any]) -> None:
    check(case("bf16", **options))


def test_masked_rows_may_hold_anything() -> None:
    """As values too, which the kernel reads no second time."""
    rows = noise(1, 1, 40, 24)
    rows[:, :, 5] = torch.nan
    mask = torch.arange(40) != 5
    view = KVView.of_tensors(rows, rows[..., :16], torch.tensor([40], dtype=torch.int32))
    assert view.within
    q = noise(1, 4, 1, 24)
    asked = check_options((1, 4, 1, 40), {"mask": mask.to(DEVICE)})
    ends = torch.tensor([40], dtype=torch.int32, device=DEVICE)
    out, lse = launch.attend(q.to(DEVICE), [view], ends, asked)
    kept = rows[:, :, mask]
    check((out, lse, *naive(q, kept, kept[..., :16], causal=False)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_are_as_good_as_pytorchs(dtype: torch.dtype) -> None:
    """FlashAttention's criterion: at most twice PyTorch's error in the same dtype."""
    name = "bf16" if dtype == torch.bfloat16 else "fp16"
    out, _, truth, _ = case(name, dtype=dtype, lengths=(200, 200))
    q, k = noise(2, 4, 1, 96, dtype=dtype), noise(2, 1, 200, 96, dtype=dtype, seed=1)
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, k[..., :64], enable_gqa=True)
    allowed = 2 * float((theirs.double() - truth).abs().max()) + 1e-5
    assert float((out.double() - truth).abs().max()) <= allowed


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
@pytest.mark.parametrize("dtype", FORMATS)
def test_a_cache_of_512_and_64_goes_through_the_kernel(
    dtype: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[KVView] = []
    own = launch.attend

    def attend(q: torch.Tensor, views: Any, *others: Any) -> Any:
        called.extend(views)
        return own(q, views, *others)

    monkeypatch.setattr(launch, "attend", attend)
    cache = LatentCache(512, 64, batch=2, dtype=dtype, kind=kind, page_size=16, device=DEVICE)
    rows = noise(2, 41, 576)
    cache.append(rows[..., :512].to(DEVICE), rows[..., 512:].to(DEVICE))
    q = noise(2, 16, 1, 576, seed=5)
    out, lse = cache.attend(q.to(DEVICE), scale=192**-0.5, return_lse=True)
    (view,) = called
    assert view.within
    held = torch.cat(cache.tensors(torch.float32), -1)[:, None].cpu()
    truth, true_lse = naive(q, held, held[..., :512], scale=192**-0.5)
    check((out.cpu(), lse.cpu(), truth, true_lse))


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize("dtype", ["bf16", "fp8", "int8"])
def test_long_latents_on_a_gpu(dtype: str, heads: int) -> None:
    """Every tile that a card's memory allows; queries of bfloat16, 10,000 tokens."""
    cache = LatentCache(512, 64, batch=2, dtype=dtype, kind="paged", device="cuda")
    rows = noise(2, 10_000, 576).cuda().bfloat16()
    cache.append(rows[..., :512], rows[..., 512:])
    q = noise(2, heads, 1, 576, seed=5).cuda().bfloat16()
    out = cache.attend(q, scale=192**-0.5)
    held = torch.cat(cache.tensors(torch.float32), -1)[:, None]
    truth, _ = naive(q, held, held[..., :512], scale=192**-0.5)
    assert isinstance(out, torch.Tensor)
    error = float((out.double() - truth).norm() / truth.norm())
    assert error < 0.02  # bfloat16 weights and products over thousands of keys stay far below
