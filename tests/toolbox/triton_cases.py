"""Where the tests of Triton's kernels run, and how close they come."""

import torch

from kvfold.kernels.view import Rows
from kvfold.ops.formats import FORMATS, decode, encode
from kvfold.ops.rotation import rotate

SINK_LOGITS = torch.tensor([0.5, -torch.inf, 3.0, -1.0])
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Products of float32 numbers summed in float32, of outputs and scores of size one.
CLOSE = 5e-6


def check(found: tuple[torch.Tensor, ...], close: float = CLOSE) -> None:
    out, lse, truth, true_lse = found
    torch.testing.assert_close(out.double(), truth.double(), rtol=0, atol=close)
    torch.testing.assert_close(lse.double(), true_lse.double(), rtol=0, atol=2 * close)


def stored(x: torch.Tensor, name: str, page: int, key: bool) -> tuple[Rows, torch.Tensor]:
    """Pages of ``[B, H, S, D]`` encoded by ``ops.formats``, and what they decode to.

    Slots beyond S hold NaN or, in codes, the largest numbers.
    """
    fmt, (batch, _, keys, dim) = FORMATS[name], x.shape
    count = -(-keys // page)
    size = fmt.rotation(dim) if key else 0
    width = fmt.stored_dim(dim)
    rows = rotate(torch.nn.functional.pad(x, (0, width - dim)), size) if size else x
    data, scales = encode(rows, fmt)
    back = rotate(decode(data, scales, fmt, width if size else dim), size)[..., :dim]
    poison = (0, 0, 0, count * page - keys)
    data = torch.nn.functional.pad(data, poison, value=255)
    scales = torch.nn.functional.pad(scales, poison, value=float("nan"))
    data = data.view(fmt.dtype)

    def paged(rows: torch.Tensor) -> torch.Tensor:
        pages = rows.unflatten(2, (count, page)).transpose(1, 2).flatten(0, 1)
        return pages.contiguous().to(DEVICE)

    assert len(paged(data)) == batch * count
    return Rows(fmt, paged(data), paged(scales), dim), back
