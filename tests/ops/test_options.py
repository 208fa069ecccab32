"""The declaration of attention's options, and what follows from it."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

import kvfold
from kvfold.errors import InputError
from kvfold.kernels.cpu.rows import attend_rows
from kvfold.ops.options import (
    ATTENTION,
    FIELDS,
    AttentionOptions,
    CacheOptions,
    FixedOptions,
    Options,
    Scoring,
    VarlenOptions,
    Visibility,
    check_options,
    declared,
    unflattened,
)
from tests.toolbox.attention_cases import qkv

TAKEN: dict[Callable[..., Any], type] = {
    kvfold.attention: AttentionOptions,
    kvfold.explain: AttentionOptions,
    kvfold.attention_varlen: VarlenOptions,
    kvfold.KVCache.attend: CacheOptions,
    kvfold.FixedKVCache.attend: FixedOptions,
}


def test_what_is_declared_is_carried() -> None:
    """``causal`` and ``window`` as limits on both sides, everything else by its own name."""
    given = set(ATTENTION.options) - {"causal", "window"} | {"left", "right"}
    assert given == set(FIELDS) == {*Visibility._fields, *Scoring._fields}
    assert Options() == unflattened(Options().flat())


@pytest.mark.parametrize("function", TAKEN, ids=lambda f: f.__qualname__)
def test_signatures_and_documentation_name_every_option(function: Callable[..., Any]) -> None:
    parameters = inspect.signature(function).parameters
    assert "options" not in parameters
    for name, option in declared(TAKEN[function]).items():
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[name].default == option.default
        assert f"{name}: " in inspect.getdoc(function)  # type: ignore[operator]
        assert option.says.endswith(".")


def test_operators_take_every_option() -> None:
    arguments = [a.name for a in attend_rows._opoverload._schema.arguments]
    assert arguments == ["q", "k", "v", *FIELDS]


@pytest.mark.parametrize("function", TAKEN, ids=lambda f: f.__qualname__)
def test_other_names_are_refused(function: Callable[..., Any]) -> None:
    """As Python refuses them; ``explain`` says what attention lacks."""
    q, k, v = qkv()
    begins = torch.tensor([0, 2])
    ragged = [x[0].transpose(0, 1) for x in (q, k, v)]
    given: dict[Any, tuple[Any, ...]] = {
        kvfold.attention: (q, k, v),
        kvfold.explain: (q, k, v),
        kvfold.attention_varlen: (*ragged, begins, begins),
        kvfold.KVCache.attend: (kvfold.KVCache(2, 32), q[:1]),
    }
    if function not in given:
        pytest.skip("made only where there are Triton's kernels")
    needed = {"causal": True} if function is kvfold.attention_varlen else {}
    for name in {"windw", *ATTENTION.options} - set(inspect.signature(function).parameters):
        with pytest.raises((TypeError, InputError), match=f"{name!r}"):
            function(*given[function], **needed, **{name: None})


def test_a_call_without_options_is_checked_already() -> None:
    """One step of decoding waits for this."""
    shape = (2, 4, 1, 9)
    assert check_options(shape, {}) is check_options(shape, {})
    given = {name: option.default for name, option in ATTENTION.options.items()}
    assert check_options(shape, given) == check_options(shape, {}) == Options(Visibility(right=0))


def test_what_somebody_does_not_know() -> None:
    asked = check_options((1, 2, 1, 9), {"window": 4, "softcap": 2.0, "scale": None})
    assert asked.beyond(frozenset(FIELDS)) == []
    assert asked.beyond(frozenset({"left", "right"})) == ["softcap"]
    assert check_options((1, 2, 1, 9), {}).beyond(frozenset()) == ["right"]


def test_no_option_is_none() -> None:
    with pytest.raises(InputError, match="sinks=None"):
        check_options((1, 2, 1, 9), {"sinks": None})
    with pytest.raises(InputError, match="causal=None"):
        check_options((1, 2, 1, 9), {"causal": None})
