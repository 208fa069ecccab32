"""CARE (Zhou et al., arXiv 2603.17946): for comparison.

Keys are parted as in TransMLA (``fold.rotated``), as the authors' code does. What is to be read out
of the latent, W z of the position-free keys and values z, is factorised by the singular vectors of
W H^1/2, H the damped second moment of z: the best low rank of what is put out, not of weights. The
authors also give layers different ranks; the layouts here know one rank for all layers.
"""

import torch

from kvfold.arch.target import Latent
from kvfold.fold.heads import HeadGroup
from kvfold.fold.latents import LatentSizes, SharedLatent
from kvfold.fold.methods import method
from kvfold.fold.rotated import rotated_keys
from kvfold.fold.subspace import through

_DAMP = 0.1  # of the mean energy of z; ten times percdamp, as in the authors' code


@method("care", targets=(Latent,), paper="arXiv 2603.17946")
def care(group: HeadGroup, sizes: LatentSizes, generator: torch.Generator) -> SharedLatent:
    """covariance-weighted low rank of keys and values (for comparison)"""
    keys = rotated_keys(group, sizes)
    ratio = keys.balance(group)
    z = torch.cat([keys.still / ratio, group.v.flatten(0, 1)])
    moment = through(z, group.moment) @ z.mT
    eye = torch.eye(len(z), dtype=z.dtype, device=z.device)
    moment = moment + _DAMP * moment.diagonal().mean() * eye
    values = group.v.shape[0] * group.v.shape[1]
    reads = torch.block_diag(keys.up.flatten(0, 1) * ratio, eye[:values, :values])
    # With W H^1/2 = B S A^T, the factors are B and S A^T H^-1/2 = B^T W.
    basis = torch.linalg.eigh(reads @ moment @ reads.mT).eigenvectors.flip(-1)[:, : sizes.latent]
    up_k, up_v = basis.tensor_split([len(reads) - values])
    heads = len(group.k)
    return keys.with_latent(
        group,
        basis.mT @ reads @ z,
        up_k.unflatten(0, (heads, -1)),
        up_v.unflatten(0, (heads, -1)),
    )
