"""Average the heads of each group (Ainslie et al., arXiv 2305.13245, section 2.1).

Assumes that the heads speak the same coordinates, which trained heads do not.
"""

import torch

from kvfold.arch.target import Grouped
from kvfold.fold.heads import HeadGroup, SharedHead
from kvfold.fold.methods import method


@method("mean", targets=(Grouped,), paper="arXiv 2305.13245", regroups=False)
def mean(group: HeadGroup, generator: torch.Generator) -> SharedHead:
    """average the heads of each group as they are (the GQA paper's choice)"""
    return SharedHead(group.q, group.k.mean(0), group.v.mean(0), group.o)
