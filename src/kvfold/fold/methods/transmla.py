"""TransMLA (Meng et al., arXiv 2502.07864): for comparison, and to fit latents with gaps from.

Keys are parted by RoRoPE and FreqFold (``fold.rotated``). Balanced KV PCA: what loses its rotary
embedding is divided by how much larger it is than the values, and the latent has the principal
components of both, over plain inputs; it looks at no queries and no outputs.
"""

import torch

from kvfold.arch.target import Latent
from kvfold.fold.heads import HeadGroup
from kvfold.fold.latents import LatentSizes, SharedLatent
from kvfold.fold.methods import is_fitted_with_gaps, method
from kvfold.fold.rotated import principal, rotated_keys
from kvfold.fold.subspace import through


@method(
    "transmla",
    targets=(Latent,),
    paper="arXiv 2502.07864",
    candidate=True,
    suits=is_fitted_with_gaps,
)
def transmla(group: HeadGroup, sizes: LatentSizes, generator: torch.Generator) -> SharedLatent:
    """principal components of keys by frequency, then of keys and values"""
    keys = rotated_keys(group, sizes)
    ratio = keys.balance(group)
    stack = torch.cat([keys.still / ratio, group.v.flatten(0, 1)])
    basis = principal(through(stack, group.moment) @ stack.mT)[:, : sizes.latent]
    k_up, v_up = basis.tensor_split([len(keys.still)])
    up_v = v_up.unflatten(0, group.v.shape[:2])
    return keys.with_latent(group, basis.mT @ stack, keys.up @ k_up * ratio, up_v)
