"""How many splits a decoding step on a GPU is cut into."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from kvfold.kernels.triton.splits import LEAST_KEYS, MOST_SPLITS, Gpu, choose_splits


@given(st.integers(1, 4096), st.integers(0, 10**6), st.integers(1, 304), st.integers(1, 8))
def test_splits_are_within_bounds_and_do_not_overfill(
    blocks: int, keys: int, multiprocessors: int, each: int
) -> None:
    gpu = Gpu(multiprocessors, each)
    splits = choose_splits(blocks, keys, gpu)
    assert 1 <= splits <= MOST_SPLITS
    assert splits == 1 or splits * LEAST_KEYS <= keys
    if blocks >= 16 * gpu.slots:
        assert splits == 1


@given(st.integers(1, 200), st.integers(1, 304))
def test_long_contexts_fill_the_gpu(blocks: int, multiprocessors: int) -> None:
    gpu = Gpu(multiprocessors)
    work = blocks * choose_splits(blocks, 10**6, gpu)
    if blocks * MOST_SPLITS >= gpu.slots:
        assert work / (-(-work // gpu.slots) * gpu.slots) >= 0.85


def test_one_more_sequence_never_costs_much_more() -> None:
    """No cliff: what the rule predicts for a batch grows by about one sequence's share."""
    gpu = Gpu(132)

    def waves(batch: int) -> float:
        splits = choose_splits(8 * batch, 32_768, gpu)
        return -(-8 * batch * splits // gpu.slots) / splits

    times = [waves(batch) for batch in range(1, 300)]
    for batch, (before, after) in enumerate(pairwise(times), 1):
        assert after <= before * (1 + 1 / batch) * 1.1
