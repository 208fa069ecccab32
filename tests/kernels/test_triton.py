"""The Triton kernels: under the interpreter on a CPU, or on the GPU if there is one."""

from typing import Any

import pytest
import torch

from kvfold.kernels.view import KVView
from kvfold.ops.formats import FORMATS
from kvfold.ops.options import check_options
from tests.toolbox.attention_cases import naive, noise
from tests.toolbox.triton_cases import DEVICE, SINK_LOGITS, check, stored

pytest.importorskip("triton")
from kvfold.kernels.triton.launch import attend

pytestmark = pytest.mark.usefixtures("triton")
PAIRS: list[tuple[str, str]] = [(name, name) for name in FORMATS] + [("int8", "int4")]


def case(
    formats: tuple[str, str] = ("fp32", "fp32"),
    heads: tuple[int, int] = (4, 2),
    tokens: int = 1,
    lengths: tuple[int, ...] = (70, 33),
    dims: tuple[int, int] = (32, 32),
    page: int = 16,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of the kernel, and of float64 on the decoded cache."""
    batch, keys = len(lengths), max(*lengths, 1)
    q = noise(batch, heads[0], tokens, dims[0], dtype=dtype)
    k, k_back = stored(noise(batch, heads[1], keys, dims[0], seed=1), formats[0], page, key=True)
    v, v_back = stored(noise(batch, heads[1], keys, dims[1], seed=2), formats[1], page, key=False)
    pages = -(-keys // page)
    table = torch.arange(batch * pages, dtype=torch.int32).view(batch, pages).to(DEVICE)
    ends = torch.tensor(lengths, dtype=torch.int32)
    view = KVView(k, v, table, page, None, ends.to(DEVICE), keys)
    here: dict[str, Any] = {
        n: o.to(DEVICE) if isinstance(o, torch.Tensor) else o for n, o in options.items()
    }
    splits = here.pop("splits", None)
    asked = check_options((batch, heads[0], tokens, keys), here)
    out, lse = attend(q.to(DEVICE), [view], ends.to(DEVICE), asked, splits)
    options.pop("splits", None)
    truth, true_lse = naive(q, k_back, v_back, lengths=ends, **options)
    return out.cpu(), lse.cpu(), truth, true_lse


@pytest.mark.parametrize("formats", PAIRS, ids=str)
@pytest.mark.parametrize("dims", [(32, 32), (13, 13), (59, 80), (128, 64)], ids=str)
def test_formats_and_head_sizes(formats: tuple[str, str], dims: tuple[int, int]) -> None:
    check(case(formats, dims=dims))


@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (10, 2), (9, 1), (7, 7)], ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 16])
def test_groups_and_speculative_tokens(heads: tuple[int, int], tokens: int) -> None:
    check(case(("int8", "int4"), heads=heads, tokens=tokens, lengths=(40,)))


@pytest.mark.parametrize("lengths", [(0, 1), (63, 64), (257, 5), (1, 0, 3)], ids=str)
@pytest.mark.parametrize("page", [1, 4, 64, 512])
def test_lengths_and_pages(lengths: tuple[int, ...], page: int) -> None:
    check(case(("int4", "fp8"), lengths=lengths, page=page))


@pytest.mark.parametrize(
    "options",
    [
        {"causal": False, "tokens": 3},
        {"window": 20},
        {"window": 20, "sinks": 3, "tokens": 4},
        {"window": 500, "sinks": 3},
        {"softcap": 2.0},
        {"scale": 3.0, "softcap": 30.0},
        {"start": torch.tensor([7, 30], dtype=torch.int32)},
        {"start": torch.tensor([7, 30], dtype=torch.int32), "window": 8, "sinks": 2},
        {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.0]), "tokens": 2},
        {"window": (9, 1), "causal": False, "tokens": 4},
        {"window": (9, -1), "causal": False, "sinks": 2, "tokens": 4},
        {"window": (-1, 0), "causal": False, "tokens": 4},
        {"window": 1 << 40},
        {"sink_logits": SINK_LOGITS, "tokens": 3},
        {"sink_logits": SINK_LOGITS, "start": torch.tensor([7, 33], dtype=torch.int32)},
        {"sink_logits": SINK_LOGITS, "window": 20, "splits": 3},
    ],
    ids=lambda options: "-".join(options),
)
def test_what_hides_and_bends_scores(options: dict[str, Any]) -> None:
    check(case(("bf16", "bf16"), **options))


@pytest.mark.parametrize("splits", [1, 2, 5, 64])
def test_any_number_of_splits_gives_the_same(splits: int) -> None:
    """Also where most of them are empty."""
    check(case(lengths=(130, 3), splits=splits))


def test_heads_of_256_and_extreme_scores() -> None:
    check(case(("bf16", "bf16"), dims=(256, 256)))
    check(case(scale=100.0), close=1e-3)  # scores of hundreds, of which float32 keeps 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_are_as_good_as_pytorchs(dtype: torch.dtype) -> None:
    """FlashAttention's criterion: at most twice PyTorch's error in the same dtype."""
    name = "bf16" if dtype == torch.bfloat16 else "fp16"
    out, _, truth, _ = case((name, name), dtype=dtype, lengths=(200, 200))
    q, k, v = (
        noise(2, heads, n, 32, dtype=dtype, seed=seed)
        for heads, n, seed in ((4, 1, 0), (2, 200, 1), (2, 200, 2))
    )
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    allowed = 2 * float((theirs.double() - truth).abs().max()) + 1e-5
    assert float((out.double() - truth).abs().max()) <= allowed


def test_splits_are_merged_in_the_same_order_each_time() -> None:
    first, second = (case(lengths=(300, 150), splits=4)[0] for _ in range(2))
    assert torch.equal(first, second)
