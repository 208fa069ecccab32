"""Why o_proj keeps all its inputs when KV heads are shared (LitGPT issue 1890).

That issue proposes to shrink o_proj to num_kv_heads * head_dim inputs, as if a group's query
heads could be summed before it. But y = sum_r O_r A_r V x, and every query head has an attention
matrix A_r of its own: the sum collapses to one O only if all A_r, or all O_r, are equal.
"""

import torch


def random(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


HEADS, TOKENS, SIZE, HIDDEN = 4, 12, 8, 32
ATTENTION = random(HEADS, TOKENS, TOKENS, seed=0).softmax(-1)
VALUES = random(TOKENS, SIZE, seed=1)
OUTPUTS = random(HEADS, HIDDEN, SIZE, seed=2)


def full(attention: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """y = sum_r O_r (A_r V), what the layer computes: ``[T, C]``."""
    return torch.einsum("rcd,rts,sd->tc", outputs, attention, VALUES)


def best_small(attention: torch.Tensor, outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The target and the best any single O of SIZE inputs can do with the summed heads."""
    summed = torch.einsum("rts,sd->td", attention, VALUES)
    target = full(attention, outputs)
    solution = torch.linalg.lstsq(summed, target).solution
    return target, summed @ solution


def test_the_smaller_projection_is_not_equivalent() -> None:
    target, best = best_small(ATTENTION, OUTPUTS)
    assert (target - best).norm() > 0.3 * target.norm()
    # The layer's outputs span more directions than SIZE inputs can feed.
    assert torch.linalg.matrix_rank(target) > SIZE


def test_it_would_be_if_all_heads_attended_alike() -> None:
    target, best = best_small(ATTENTION[:1].expand(HEADS, -1, -1), OUTPUTS)
    torch.testing.assert_close(best, target)


def test_or_if_all_heads_wrote_alike() -> None:
    target, best = best_small(ATTENTION, OUTPUTS[:1].expand(HEADS, -1, -1))
    torch.testing.assert_close(best, target)
