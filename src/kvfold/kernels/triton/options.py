"""Options as arguments of the kernels, by name: whatever a kernel names, it is given.

Of an option called ``softcap`` a kernel may take the number ``softcap`` and the constant
``HAS_SOFTCAP``, whether it was asked for; of one that is a tensor the pointer ``ALIBI_SLOPES`` and
``HAS_ALIBI_SLOPES``. The mask has strides besides, and is passed where the kernel is launched.
"""

from typing import Any

import torch

from kvfold.kernels.triton.decode import attend_kernel, merge_kernel
from kvfold.ops.kinds import MASK
from kvfold.ops.options import FIELDS, Options, unflattened

#: The options that some kernel names; lengths are given beside the options.
KNOWN = frozenset({name.lower() for k in (attend_kernel, merge_kernel) for name in k.arg_names})
KNOWN = KNOWN.intersection(FIELDS) | {"lengths"}


def ready(options: Options, head_dim: int, device: torch.device) -> Options:
    """With tensors of the dtypes that the kernels read, where they run, and a scale."""
    values = [
        x if x is None or kind.dtype is None else kind.stored(x.to(device))
        for x, kind in zip(options.flat(), FIELDS.values(), strict=True)
    ]
    found = unflattened(values)
    if found.scoring.scale is not None:
        return found
    return found._replace(scoring=found.scoring._replace(scale=head_dim**-0.5))


def arguments(kernel: Any, options: Options, none: torch.Tensor) -> dict[str, Any]:
    """What a kernel takes of the options.

    Args:
        none: a tensor whose pointer stands for those that were not asked for.
    """
    found: dict[str, Any] = {}
    for (name, kind), x in zip(FIELDS.items(), options.flat(), strict=True):
        if kind is MASK:
            continue
        if kind.is_tensor:
            found[name.upper()] = none if x is None else x
        else:
            found[name] = kind.number(x)
        found[f"HAS_{name.upper()}"] = x is not None
    return {name: x for name, x in found.items() if name in kernel.arg_names}
