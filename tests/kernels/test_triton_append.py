"""What the Triton kernels write: the bytes of the formats' definitions, at the right places."""

import pytest
import torch

from kvfold.kernels.view import Angles, Rows
from kvfold.ops.formats import FORMATS, encode
from kvfold.ops.rope import Rotary
from kvfold.ops.rotation import rotate
from tests.toolbox.attention_cases import noise
from tests.toolbox.triton_cases import DEVICE

pytest.importorskip("triton")
from kvfold.kernels.triton.launch import append

pytestmark = pytest.mark.usefixtures("triton")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dim", [13, 32, 80])
@pytest.mark.parametrize("key", [True, False])
def test_append_writes_what_the_format_encodes(name: str, dim: int, key: bool) -> None:
    """Byte for byte, at the right places, and nothing elsewhere."""
    fmt, page, pages = FORMATS[name], 4, 3
    x = 3 * noise(2, 2, 5, dim)
    x[0, 0, 0] = 0  # a scale of zero
    width = fmt.stored_dim(dim)
    size = fmt.rotation(dim) if key else 0
    rows = rotate(torch.nn.functional.pad(x, (0, width - dim)), size) if size else x
    wanted, wanted_scales = encode(rows, fmt)
    data = torch.full((2 * pages, 2, page, fmt.row_bytes(dim)), 7, dtype=torch.uint8)
    scales = torch.full((2 * pages, 2, page, fmt.groups(dim)), 7, dtype=torch.bfloat16)
    data, scales = data.to(DEVICE), scales.to(DEVICE)
    view = data.view(fmt.dtype)
    table = torch.arange(2 * pages, dtype=torch.int32).view(2, pages).flip(1).contiguous()
    table[1, 0] = -1  # a page that has been freed: positions there are skipped
    first = torch.tensor([6, 2], dtype=torch.int32)
    append(
        x.to(DEVICE), Rows(fmt, view, scales, dim), table.to(DEVICE), page, first.to(DEVICE),
        rotated=key,
    )  # fmt: skip
    expected, expected_scales = torch.full_like(data, 7), torch.full_like(scales, 7)
    for b in range(2):
        for t in range(5):
            at, slot = divmod(int(first[b]) + t, page)
            if table[b, at] >= 0:
                expected[table[b, at], :, slot] = wanted[b, :, t].to(DEVICE)
                expected_scales[table[b, at], :, slot] = wanted_scales[b, :, t].to(DEVICE)
    assert torch.equal(data, expected)
    assert torch.equal(scales, expected_scales)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [8, 32])
def test_append_applies_rotary_embedding(interleaved: bool, rotary_dim: int) -> None:
    x = noise(2, 2, 3, 32)
    rotary = Rotary(rotary_dim, interleaved=interleaved)
    cos, sin = rotary.cos_sin(torch.tensor([[5, 6, 7], [0, 1, 2]]))
    wanted = rotary.apply(x, cos, sin)
    data = torch.zeros(2, 2, 4, 32, dtype=torch.float32, device=DEVICE)
    rows = Rows(FORMATS["fp32"], data, data.new_empty(2, 2, 4, 0, dtype=torch.bfloat16), 32)
    table = torch.arange(2, dtype=torch.int32, device=DEVICE)[:, None]
    first = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    angles = Angles(cos.to(DEVICE), sin.to(DEVICE), interleaved)
    append(x.to(DEVICE), rows, table, 4, first, rotary=angles)
    torch.testing.assert_close(data[:, :, :3].cpu(), wanted, rtol=0, atol=1e-6)
