"""Where the tests of Triton's kernels run, and how close they come."""

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Products of float32 numbers summed in float32, of outputs and scores of size one.
CLOSE = 5e-6


def check(found: tuple[torch.Tensor, ...], close: float = CLOSE) -> None:
    out, lse, truth, true_lse = found
    torch.testing.assert_close(out.double(), truth.double(), rtol=0, atol=close)
    torch.testing.assert_close(lse.double(), true_lse.double(), rtol=0, atol=2 * close)
