"""Fresh random K and V of the source's scale (Ainslie et al., arXiv 2305.13245, section 3.2)."""

import torch

from kvfold.arch.target import Grouped
from kvfold.fold.heads import HeadGroup, SharedHead
from kvfold.fold.methods import method


@method("random", targets=(Grouped,), paper="arXiv 2305.13245", regroups=False)
def random(group: HeadGroup, generator: torch.Generator) -> SharedHead:
    """draw K and V at random, with the source's scale: the floor for comparison"""
    return SharedHead(group.q, _like(group.k, generator), _like(group.v, generator), group.o)


def _like(heads: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One head whose weights, and whose biases, have the variance of the given heads'."""
    shape, on = heads.shape[1:], generator.device  # the same numbers whatever the heads lie on
    noise = torch.randn(shape, dtype=heads.dtype, generator=generator, device=on).to(heads.device)
    noise[:, :-1] *= heads[..., :-1].square().mean().sqrt()
    noise[:, -1] *= heads[..., -1].square().mean().sqrt()
    return noise
