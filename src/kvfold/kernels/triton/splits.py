"""Into how many parts the keys of a decoding step are split. A pure function: no torch.

A step has one block of work per sequence, KV head and tile of query rows. When these are fewer
than the GPU can run at once, or its last wave would be far from full, each is split along the
keys and the parts are merged afterwards (split-KV; Flash-Decoding):

- sixteen full waves or more: do not split, the last one matters little;
- otherwise the fewest parts whose waves are nearly as full as they can be, of at least
  ``LEAST_KEYS`` keys each. A part of so many keys is read in the time of about a hundred
  merges, so splitting costs next to nothing.

FlashAttention does not split from 80% of a wave on, where a batch of 1.1 waves takes as long as
one of two; below that it takes the fewest parts within 85% of the best wave efficiency, up to
128. xformers takes the power of two that gives about two blocks per multiprocessor, at most 64
and of at least 64 keys each.
"""

from dataclasses import dataclass
from math import ceil

LEAST_KEYS = 256  # a part reads these while another block would only just have started
MOST_SPLITS = 128
_ENOUGH_WAVES = 16
_GOOD = 0.95  # of the best wave efficiency


@dataclass(frozen=True)
class Gpu:
    """What the rule needs to know about a GPU.

    Attributes:
        multiprocessors: SMs (NVIDIA) or compute units (AMD). blocks_each: how many of these
            kernels' blocks run on one at a time.
    """

    multiprocessors: int
    blocks_each: int = 2

    @property
    def slots(self) -> int:
        return self.multiprocessors * self.blocks_each


def choose_splits(blocks: int, keys: int, gpu: Gpu) -> int:
    """How many parts each of ``blocks`` blocks is split into.

    Args:
        blocks: sequences x KV heads x tiles of query rows. keys: the most keys a sequence has
            (or may get to have, where a CUDA graph will be replayed with more).

    >>> choose_splits(blocks=8, keys=32_768, gpu=Gpu(132))
    32
    >>> choose_splits(blocks=264, keys=32_768, gpu=Gpu(132))
    1
    """
    if blocks < 1 or blocks >= _ENOUGH_WAVES * gpu.slots:
        return 1
    most = max(1, min(keys // LEAST_KEYS, MOST_SPLITS))
    efficiencies = [_efficiency(blocks * splits, gpu) for splits in range(1, most + 1)]
    good = _GOOD * max(efficiencies)
    return next(splits for splits, found in enumerate(efficiencies, 1) if found >= good)


def _efficiency(blocks: int, gpu: Gpu) -> float:
    """The share of the waves' slots that do work."""
    waves = blocks / gpu.slots
    return waves / ceil(waves)
