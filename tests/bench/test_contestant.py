"""When a model's logits are right: at most twice as far from the truth as transformers' own."""

from typing import Any

import pytest
import torch

from kvfold.bench.contestant import Contestant, Walk, judge, wide
from tests.toolbox import tiny

BASE = torch.tensor([[4.0, 1.0, -2.0, 0.5]]).expand(5, 4)  # of five tokens


class Fixed:
    """A model whose logits of a prompt's five tokens and of every later one are given."""

    def __init__(self, prompt: torch.Tensor, step: torch.Tensor) -> None:
        self.prompt, self.step = prompt, step

    def __call__(self, tokens: torch.Tensor, past_key_values: Any, **options: Any) -> Any:
        logits = self.step[:1] if tokens.shape[1] == 1 else self.prompt
        return type("Output", (), {"logits": logits[None]})()


class Cache:
    """Forgets nothing, as there is nothing to keep."""

    def crop(self, count: int) -> None:
        assert count == -1


def moved(by: float) -> torch.Tensor:
    """Logits off by such a share."""
    return BASE * (1 + by)


def verdict(own: Fixed, native: Fixed, plain: Fixed) -> Any:
    """And whether the prompt was read in float32 for it. The truth is ``BASE``."""
    prompt, asked = torch.zeros(1, 5, dtype=torch.int64), list[bool]()
    truth = Fixed(BASE, BASE)

    def again() -> torch.Tensor:
        asked.append(True)
        return truth.prompt[None]

    contestant = Contestant(own, Cache)
    first = contestant.prefill(prompt)
    path = Walk([native.prompt[None], *[native.step[None, :1]] * 2], [prompt[:, :1]] * 2)
    return judge(contestant, first, path, [truth, native, plain], again), bool(asked)


@pytest.mark.parametrize(
    ("own", "native", "passed", "asked"),
    [
        (0.003, 0.0, True, False),  # within a number's rounding
        (0.21, 0.2, True, True),  # a tenth from sdpa's, which is as far from the truth
        (-0.2, 0.2, True, True),
        (0.5, 0.2, False, True),
        (0.2, 0.01, False, True),
        (float("nan"), 0.2, False, True),
    ],
)
def test_a_prompt_may_be_as_far_from_the_truth_as_right_ones_are(
    own: float, native: float, passed: bool, asked: bool
) -> None:
    found = verdict(Fixed(moved(own), BASE), Fixed(moved(native), BASE), Fixed(BASE, BASE))
    assert (found[0].passed, found[1]) == (passed, asked), found


@pytest.mark.parametrize(
    ("own", "native", "plain", "passed"),
    [
        (0.003, 0.0, 0.0, True),
        (0.01, 0.0, 0.0, False),
        (0.04, 0.02, 0.02, True),  # which agree with each other, but not with the truth
        (0.05, 0.02, 0.02, False),
        (0.05, 0.0, -0.03, True),
        (float("nan"), 0.02, 0.02, False),
    ],
)
def test_steps_too(own: float, native: float, plain: float, passed: bool) -> None:
    steps = (Fixed(BASE, moved(each)) for each in (own, native, plain))
    found, _ = verdict(*steps)
    assert found.passed == passed, found


@pytest.mark.parametrize(("hit", "passed"), [(1, True), (2, True), (3, False), (5, False)])
def test_a_few_tokens_may_be_far_off(hit: int, passed: bool) -> None:
    """What roundings do to some of a prompt's tokens, a wrong kernel does to most."""
    logits = BASE.clone()
    logits[:hit] *= 1.5
    found, _ = verdict(Fixed(logits, BASE), Fixed(BASE, BASE), Fixed(BASE, BASE))
    assert found.passed == passed, found


@pytest.mark.parametrize("case", ["llama", "gemma3_text", "qwen3"])
def test_a_wide_model_is_the_one_in_float32(case: str) -> None:
    """Bit for bit, and the one that it shares weights with stays as it is."""
    narrow, tokens = tiny.make(case).to(torch.bfloat16), tiny.tokens(2, 9, seed=1)
    before = {name: tensor.clone() for name, tensor in narrow.state_dict().items()}
    with torch.no_grad():
        lower, found = narrow(tokens).logits, wide(narrow)(tokens).logits
        again = narrow(tokens).logits
        wanted = narrow.float()(tokens).logits
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted)
    assert torch.equal(lower, again)
    assert not torch.equal(lower.float(), wanted)
    assert all(torch.equal(before[name].float(), t) for name, t in narrow.state_dict().items())
