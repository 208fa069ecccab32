"""Keep the first head of each group (Ainslie et al., arXiv 2305.13245, section 3.2)."""

import torch

from kvfold.arch.target import Grouped
from kvfold.fold.heads import HeadGroup, SharedHead
from kvfold.fold.methods import method


@method("first", targets=(Grouped,), paper="arXiv 2305.13245", regroups=False)
def first(group: HeadGroup, generator: torch.Generator) -> SharedHead:
    """keep the first head of each group, drop the others"""
    return SharedHead(group.q, group.k[0], group.v[0], group.o)
