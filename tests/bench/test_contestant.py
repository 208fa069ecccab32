"""When a model's logits are right: what two right implementations differ by is the measure."""

from typing import Any

import pytest
import torch

from kvfold.bench.contestant import Contestant, Walk, judge

BASE = torch.tensor([[4.0, 1.0, -2.0, 0.5]])


class Fixed:
    """A model whose logits after the prompt and after every later token are given."""

    def __init__(self, prompt: torch.Tensor, step: torch.Tensor) -> None:
        self.prompt, self.step = prompt, step
        self.read: list[int] = []

    def __call__(self, tokens: torch.Tensor, past_key_values: Any, **options: Any) -> Any:
        self.read.append(tokens.shape[1])
        logits = self.step if tokens.shape[1] == 1 else self.prompt
        return type("Output", (), {"logits": logits[:, None]})()


class Cache:
    """Forgets nothing, as there is nothing to keep."""

    def crop(self, count: int) -> None:
        assert count == -1


def moved(by: float) -> torch.Tensor:
    """Logits off by such a share."""
    return BASE * (1 + by)


def verdict(own: Fixed, native: Fixed, plain: Fixed) -> Any:
    """And whether the plainest implementation read the prompt for it."""
    prompt, asked = torch.zeros(1, 5, dtype=torch.int64), list[bool]()

    def again() -> torch.Tensor:
        asked.append(True)
        return plain.prompt

    contestant = Contestant(own, Cache)
    first = contestant.prefill(prompt)
    path = Walk([native.prompt, *[native.step] * 2], [prompt[:, :1]] * 2)
    return judge(contestant, first, path, [native, plain], again), asked


@pytest.mark.parametrize(
    ("own", "plain", "passed", "asked"),
    [
        (0.003, 0.0, True, False),  # within a number's rounding
        (0.2, 0.01, False, True),
        (0.2, 0.3, True, True),  # the prompt moves both: nearer to eager than it is to sdpa
        (1.2, 0.3, False, True),
        (float("nan"), 0.3, False, True),
    ],
)
def test_a_prompt_may_differ_as_right_ones_do(
    own: float, plain: float, passed: bool, asked: bool
) -> None:
    still = moved(0.0)
    found, was_asked = verdict(
        Fixed(moved(own), still), Fixed(still, still), Fixed(moved(plain), still)
    )
    assert (found.passed, bool(was_asked)) == (passed, asked), found


@pytest.mark.parametrize(
    ("own", "plain", "passed"),
    [(0.003, 0.0, True), (0.01, 0.0, False), (0.05, 0.02, False), (0.06, 0.02, True)],
)
def test_steps_too(own: float, plain: float, passed: bool) -> None:
    """At 0.06 from sdpa, 0.04 from eager, which is 0.02 from sdpa: 2 × 0.02 and a rounding."""
    still = moved(0.0)
    if own == 0.05:
        plain = -plain  # on the other side of sdpa
    found, _ = verdict(Fixed(still, moved(own)), Fixed(still, still), Fixed(still, moved(plain)))
    assert found.passed == passed, found


def test_a_prompt_can_be_read_by_pieces() -> None:
    model = Fixed(BASE, BASE)
    logits = Contestant(model, Cache).prefill(torch.zeros(1, 11, dtype=torch.int64), 4)
    assert model.read == [4, 4, 3]
    assert torch.equal(logits, BASE)
