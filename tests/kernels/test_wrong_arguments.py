"""attention, explain and merge refuse what they cannot use: InputError, whatever it is."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvfold
from kvfold.errors import InputError
from tests.toolbox.attention_cases import noise, qkv

Q, K, V = qkv(2, (4, 2), 3, 16, (8, 8))
OUT, LSE = noise(2, 4, 3, 8), noise(2, 4, 3)
JUNK: list[Any] = [
    "", "no", b"1", object(), {}, {"a": 1}, [], [1, 2, 3], (), set(), 1j, lambda: 1, int, torch,
    slice(1), range(3),
]  # fmt: skip
NOT_NUMBERS: list[Any] = [*JUNK, True, torch.ones(1), torch.ones(2), math.nan, math.inf, -math.inf]


def _one(x: object) -> bool:
    """A model may compute its scale: a tensor of one number is one."""
    return isinstance(x, torch.Tensor) and x.numel() == 1


NOT_WHOLE: list[Any] = [*NOT_NUMBERS, 1.0, 2.5, 1e300]
NOT_TENSORS: list[Any] = [*JUNK, 1, 2.0, True]
NOT_RANGES: list[Any] = [
    *NOT_TENSORS, torch.tensor(3), torch.tensor([1, 2, 3]), torch.tensor([[1, 2]]),
    torch.tensor([1.0, 2.0]), torch.tensor([True, False]), torch.tensor([-1, 3]),
    torch.tensor([1, 17]), torch.tensor([1, 2], device="meta"), torch.tensor([1, 2]).to_sparse(),
    torch.tensor([2**40, 1]), torch.tensor([1j, 1]),
]  # fmt: skip
NOT_HEADS: list[Any] = [
    *NOT_TENSORS, torch.ones(3), torch.ones(4, 1), torch.tensor(1.0), torch.ones(4) > 0,
    torch.ones(4, device="meta"), torch.ones(4) * 1j, torch.ones(4).to_sparse(),
]  # fmt: skip
WRONG: dict[str, list[Any]] = {
    **{
        name: [
            *NOT_TENSORS, None, x[0], x[..., 0], x[None], x.double(), x.long(), x > 0, x * 1j,
            x.to("meta"), x.to_sparse(), x[:1], x[:, :0] if name == "k" else x[:, :1, :2, :5],
            torch.tensor(1.0), torch.zeros(0), x[..., :0],
        ]
        for name, x in (("q", Q), ("k", K), ("v", V))
    },
    "causal": [*NOT_NUMBERS, None, 0, 1, 1.0],
    "return_lse": [*NOT_NUMBERS[:-4], None, 0, 1, 1.0],
    "window": [*NOT_WHOLE, 0, -1, -5, (1,), (1, 2, 3), (1.5, 0), ("a", 0), (-2, 0), (3, 2), [1]],
    "sinks": [*NOT_WHOLE, None, -1, 2**31, 10**30],
    "start": NOT_RANGES,
    "lengths": NOT_RANGES,
    "mask": [
        *NOT_TENSORS, torch.ones(15) > 0, torch.ones(2, 4, 3, 17), torch.ones(1, 2, 4, 3, 16),
        torch.ones(16).long(), torch.ones(16) * 1j, torch.ones(16, device="meta"),
        torch.ones(16).to_sparse(), torch.ones(5, 1, 1, 1),
    ],
    "scale": [*(x for x in NOT_NUMBERS if not _one(x)), 1e300, -1e300, 1e-320],
    "softcap": [*(x for x in NOT_NUMBERS if not _one(x)), 0, 0.0, -1, -0.5, 1e300, 1e-50],
    "alibi_slopes": NOT_HEADS,
    "sink_logits": NOT_HEADS,
    "dropout": [*NOT_NUMBERS, None, 1, 1.0, -0.1, 7],
}  # fmt: skip
# () and [] are pairs of nothing, True is a flag.
WRONG["causal"] = [x for x in WRONG["causal"] if x is not True]
WRONG["return_lse"] = [x for x in WRONG["return_lse"] if x is not True]
wrong = st.sampled_from([(name, x) for name, values in WRONG.items() for x in values])


@pytest.mark.parametrize("name", list(WRONG))
def test_every_wrong_argument_is_refused(name: str) -> None:
    for value in WRONG[name]:
        given: dict[str, Any] = {"q": Q, "k": K, "v": V, name: value}
        for call in (kvfold.attention, kvfold.explain):
            with pytest.raises(InputError) as error:
                call(**given)
            assert "\n" not in error.value.message
            assert len(error.value.message) < 300


@settings(max_examples=200, deadline=None)
@given(st.lists(wrong, min_size=2, max_size=6))
def test_several_wrong_arguments_are_refused(several: list[tuple[str, Any]]) -> None:
    given: dict[str, Any] = {"q": Q, "k": K, "v": V, **dict(several)}
    for call in (kvfold.attention, kvfold.explain):
        with pytest.raises(InputError):
            call(**given)


@settings(max_examples=300, deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "window": st.one_of(st.integers(), st.tuples(st.integers(), st.integers())),
            "sinks": st.integers(),
            "scale": st.floats(),
            "softcap": st.floats(),
            "dropout": st.floats(),
            "causal": st.booleans(),
            "return_lse": st.booleans(),
        },
    )
)
def test_any_numbers_are_refused_or_used(given: dict[str, Any]) -> None:
    """Nothing else happens, and what is used is what was said: numbers do not wrap around."""
    try:
        out: Any = kvfold.attention(Q, K, V, **given)
    except InputError:
        return
    found = out[0] if isinstance(out, tuple) else out
    assert found.shape == Q.shape
    if abs(given.get("scale", 1.0)) < 1e6 and not given.get("dropout"):
        exact: Any = kvfold.attention(Q.double(), K.double(), V.double(), **given)
        exact = exact[0] if isinstance(exact, tuple) else exact
        # scores of float32, at most |q| |k| = 60, times the scale
        size = 60 * abs(given.get("scale", 1.0)) * 2**-20
        assert float((found - exact).abs().max()) <= 1e-5 + 8 * math.expm1(min(size, 5))


PARTS: list[Any] = [
    *JUNK, None, 3, OUT, (OUT, LSE), [[]], [OUT], [(OUT,)], [(OUT, LSE, LSE)], [(OUT, None)],
    [("a", LSE)], [(OUT, LSE[0])], [(OUT, OUT)], [(OUT[:, :, :2], LSE)],
    [(OUT, LSE), (OUT[..., :5], LSE)], [(OUT, LSE), (OUT[:1], LSE[:1])],
    [(OUT, LSE), (OUT.to("meta"), LSE.to("meta"))], [(OUT, LSE), (OUT, LSE.to("meta"))],
    [(OUT.long(), LSE)], [(OUT, LSE.long())], [(OUT, LSE), (OUT, LSE.double())],
    [(torch.tensor(1.0), torch.tensor(1.0))],
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(PARTS)))
def test_parts_that_cannot_be_merged_are_refused(number: int) -> None:
    with pytest.raises(InputError) as error:
        kvfold.merge(PARTS[number])
    assert "\n" not in error.value.message


def test_one_part_is_the_whole() -> None:
    out, lse = kvfold.merge([(OUT, LSE)])
    torch.testing.assert_close(out, OUT)
    assert torch.equal(lse, LSE)
