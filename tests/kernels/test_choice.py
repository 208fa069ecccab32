"""Which instruction set's kernels take a call: the fastest of its kind in a trial, once for all."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from kvfold.cache.kv import KVCache
from kvfold.kernels.cpu.library import TIMER
from tests.toolbox.attention_cases import (
    ISAS,
    kernels,
    needs_kernels,
    noise,
    skip_without_kernels,
    using,
)

pytestmark = [
    needs_kernels,
    pytest.mark.skipif(len(ISAS) < 3, reason="this machine has one copy only"),
]


@pytest.fixture(autouse=True)
def afresh() -> Iterator[None]:
    """No choices before a test, and none of its own after it."""
    skip_without_kernels()
    with using("auto"):
        yield
    kernels().set_timer()


def told(seconds: Callable[[str], float]) -> list[str]:
    """Let copies take so long; a list of those that were asked for."""
    asked: list[str] = []

    def timer(name: bytes, _: Any) -> float:
        asked.append(name.decode())
        return seconds(name.decode())

    told.kept = TIMER(timer)  # type: ignore[attr-defined]  # C calls it later
    kernels().set_timer(told.kept)  # type: ignore[attr-defined]
    return asked


def step(dtype: str = "int8", group: int = 4, keys: int = 64, tokens: int = 1) -> torch.Tensor:
    cache = KVCache(2, 32, dtype=dtype, exact_first=0, exact_recent=0)
    cache.append(noise(1, 2, keys, 32), noise(1, 2, keys, 32, seed=1))
    out = cache.attend(noise(1, 2 * group, tokens, 32, dtype=torch.bfloat16))
    assert isinstance(out, torch.Tensor)
    return out


def of(isa: str, **kind: Any) -> torch.Tensor:
    with using(isa):
        return step(**kind)


def candidates() -> list[str]:
    """Those that differ for INT8, found by asking."""
    asked = told(lambda _: 1.0)
    step()
    return list(dict.fromkeys(asked))


def test_the_fastest_is_chosen() -> None:
    for best in candidates():
        asked = told(lambda isa, best=best: 1.0 if isa == best else 1.2)  # type: ignore[misc]
        assert torch.equal(step(), of(best))
        assert [choice.isa for choice in kernels().choices()] == [best]
        assert kernels().in_use == best
        assert {asked.count(isa) for isa in asked} == {5}


def test_noise_chooses_the_first() -> None:
    last = candidates()[-1]
    told(lambda isa: 0.96 if isa == last else 1.0)
    step()
    assert kernels().choices()[0].isa == ISAS[0]
    told(lambda isa: 0.94 if isa == last else 1.0)
    step()
    assert kernels().choices()[0].isa == last


def test_the_hopeless_are_tried_twice() -> None:
    asked = told(lambda isa: 1.0 if isa == ISAS[0] else 2.0)
    step()
    assert {isa: asked.count(isa) for isa in set(asked) - {ISAS[0]}} == dict.fromkeys(
        candidates()[1:], 2
    )


def test_copies_of_the_same_code_are_not_tried() -> None:
    """Float32 is multiplied as floats by all: what differs are registers, 8 or 16 numbers wide."""
    asked = told(lambda _: 1.0)
    step("fp32")
    wide = [isa for isa in ISAS if isa.startswith("avx512")]
    assert set(asked) == ({wide[0], "avx2"} if wide else set())


def test_a_choice_stays() -> None:
    other = candidates()[-1]
    asked = told(lambda isa: 1.0 if isa == other or len(asked) > 100 else 1.2)
    first, seen = step(), len(asked)
    assert all(torch.equal(step(), first) for _ in range(3))
    step(keys=70)
    assert len(asked) == seen
    step(group=5)
    assert len(asked) > seen


def test_what_was_asked_for_wins() -> None:
    asked = told(lambda isa: 1.0 if isa == ISAS[0] else 2.0)
    for isa in ISAS:
        with using(isa):
            step()
            assert kernels().isa == kernels().in_use == isa
    assert not asked
    assert not kernels().choices()


def test_kinds_of_calls() -> None:
    """Rows one by one, then in eights; long contexts of few rows, and prompts, by themselves."""
    told(lambda _: 1.0)
    long = (torch.get_num_threads() << 20) // (2 * 2 * 32) + 64
    for group, keys, tokens in ((3, 64, 1), (9, 64, 1), (14, 64, 1), (3, long, 1), (9, long, 1)):
        step(group=group, keys=keys, tokens=tokens)
    step(keys=64, tokens=20)
    kinds = sorted((choice.rows, choice.far) for choice in kernels().choices())
    assert kinds == [(0, False), (3, False), (3, True), (16, False)]
    choice = kernels().choices()[0]
    assert (choice.keys, choice.values, choice.queries) == ("int8", "int8", "bf16")
    assert choice.head_dim == choice.v_head_dim == 32


def test_threads_agree() -> None:
    """Each may try for itself; what the first of them found is used by all, from the first call."""
    names = candidates()
    told(lambda isa: 1.0)
    with ThreadPoolExecutor(8) as pool:
        for group in range(1, 9):
            outs = list(pool.map(lambda _, group=group: step(group=group), range(16)))
            assert all(torch.equal(out, outs[0]) for out in outs)
    assert len(kernels().choices()) == 8
    assert {choice.isa for choice in kernels().choices()} <= set(names)


def test_a_fork_goes_on() -> None:
    expected = step()
    child = os.fork()
    if not child:
        torch.set_num_threads(1)
        os._exit(0 if torch.equal(step(), expected) and step(group=6).isfinite().all() else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("dtype", ["bf16", "int8", "int4", "fp8", "nl4"])
def test_real_trials_end_in_a_candidate(dtype: str) -> None:
    kernels().set_timer()
    for group in (1, 9):
        step(dtype, group)
    assert {choice.isa for choice in kernels().choices()} <= set(ISAS[:-1])
    assert [choice.keys for choice in kernels().choices()] == [dtype] * 2
