"""A request and the command that repeats it are the same, whatever was asked."""

import shlex
import sys
from collections.abc import Callable
from dataclasses import MISSING, fields
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

import kvfold
from kvfold.bench.cases import AttentionRequest
from kvfold.bench.model_cases import ModelRequest
from kvfold.cli.parse import read_request
from kvfold.engines.request import VerifyRequest
from kvfold.errors import InputError
from kvfold.fold.request import ConvertRequest
from kvfold.healing.request import OPTIONS, HealRequest
from kvfold.numbers import Real, Whole, Wholes
from kvfold.plan.request import PlanRequest
from kvfold.quality.request import EvalRequest
from kvfold.quality.run import find_needles
from kvfold.record import command_line
from kvfold.report.request import LookRequest
from kvfold.requests import (
    Choice,
    Flag,
    Kind,
    Listed,
    Made,
    Model,
    Option,
    Place,
    Request,
    Several,
    options_of,
)
from tests.toolbox.commands import command_of

REQUESTS: list[type[Request]] = [
    AttentionRequest,
    ConvertRequest,
    EvalRequest,
    HealRequest,
    LookRequest,
    PlanRequest,
    VerifyRequest,
]
EACH = [(kind, name) for kind in REQUESTS for name in options_of(kind)]
# No surrogates, which a terminal does not send; no NUL, which no path holds.
WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)
PATHS = st.one_of(WORDS, st.sampled_from(["-x", "--", "--debug=1", "a b", "it's", "$HOME", "a=2"]))
TEXTS = PATHS | st.builds("{}={!r}".format, PATHS, st.floats(1e-3, 1e3))  # NAME, NAME=WEIGHT


def some(*values: Any, least: int = 1) -> st.SearchStrategy[Any]:
    return st.lists(st.sampled_from(values), min_size=least, max_size=3, unique=True)


LATENTS = st.builds("{}+{}".format, st.integers(2, 512), st.integers(1, 64))

# What random values of a kind would seldom be: right, and right together.
RIGHT: dict[str, st.SearchStrategy[Any]] = {
    "method": st.sampled_from(["auto", "mean", "pca"]),
    "num_heads": st.sampled_from([8, 16, 64]),
    "kv_heads": some(1, 2, 8),
    "head_dims": some(8, 128),
    "contexts": some(16, 1000, 1024),
    "batches": some(1, 2),
    "dtypes": some("bf16", "int8", "int8/int4", least=0),
    "against": some("sdpa", "matmul", least=0),
    "pythons": some(f"vllm={sys.executable}", f"mistral.rs={sys.executable}"),
    "working_set": st.integers(1, 1 << 16),
    "grouped": st.integers(1, 64),
    "latent": LATENTS,
    "kv_bytes": st.integers(1, 99).map("{}%".format),
    "pad": LATENTS,
}
_TARGETS = ("grouped", "latent", "kv_bytes", "pad", "max_ppl_ratio", "max_kl")
# What excludes each other, and what needs the other.
TOGETHER: dict[type[Request], st.SearchStrategy[dict[str, Any]]] = {
    ConvertRequest: st.one_of(
        st.fixed_dictionaries({"grouped": RIGHT["grouped"]}),
        st.fixed_dictionaries({"latent": LATENTS, "pad": st.none() | LATENTS}),
        st.fixed_dictionaries({"kv_bytes": RIGHT["kv_bytes"], "calibration": st.just(())}),
        st.fixed_dictionaries(
            {
                "max_ppl_ratio": st.none() | st.floats(0, 1e9),
                "max_kl": st.floats(0, 1e9),
                "calibration": st.just(()),
            }
        ),
    ).map(lambda given: dict.fromkeys(_TARGETS) | given),
}


def values(kind: Kind, name: str = "") -> st.SearchStrategy[Any]:
    """Values of a kind, of every size."""
    match kind:
        case Whole():
            return st.integers(kind.least, kind.most)
        case Real():
            return st.floats(kind.least, kind.most, exclude_min=kind.above)
        case Wholes():
            return st.lists(values(kind.each), min_size=1, max_size=4)
        case Made() if name == "texts":
            return TEXTS
        case Made():
            return values(kind.of)
        case Choice():
            return st.sampled_from(list(kind.known))
        case Flag():
            return st.booleans()
        case Place() | Model():
            return PATHS
        case Several():
            return st.lists(values(kind.each, name), min_size=1, max_size=3)
        case Listed():
            return st.lists(values(kind.each), min_size=not kind.none, max_size=3)
        case _:
            return WORDS


def value_of(name: str, option: Option) -> st.SearchStrategy[Any]:
    """Values of an option; nothing for its default, as people leave it out."""
    found = RIGHT[name] if name in RIGHT else values(option.kind, name)
    if option.off is not None:
        found |= st.just(option.off.value)
    return found if option.is_required else st.just(option.default) | found


@st.composite
def requests(draw: Any, /, kind: type[Request], **fixed: Any) -> Request:
    given = {name: draw(value_of(name, option)) for name, option in options_of(kind).items()}
    given |= draw(TOGETHER[kind]) if kind in TOGETHER else {}
    given |= fixed
    try:
        return kind.asked(**given)
    except InputError:  # what contradicts itself, or a path that cannot be
        reject()


def parsed(kind: type[Request], line: str) -> Request:
    """What the command line's own parser makes of a command."""
    words = shlex.split(line)[1:]
    names = tuple(kind.command.split())
    assert tuple(words[: len(names)]) == names
    context = command_of(names).make_context(names[-1], words[len(names) :])
    own = {name: value for name, value in context.params.items() if _is_of(kind, name)}
    return read_request(kind, own)


def _is_of(kind: type[Request], name: str) -> bool:
    return name.removesuffix("_off") in options_of(kind)


@pytest.mark.parametrize("kind", REQUESTS, ids=lambda kind: kind.command)
@pytest.mark.parametrize("brief", [False, True])
@given(data=st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.filter_too_much])
def test_the_command_of_a_request_makes_it_again(
    kind: type[Request], brief: bool, data: Any
) -> None:
    request = data.draw(requests(kind))
    assert parsed(kind, command_line(request, brief=brief)) == request


@given(data=st.data())
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_command_of_timing_models_makes_its_request_again(
    llama_folder: Path, text_file: Path, data: Any
) -> None:
    """Apart, as it opens what it is to time."""
    fixed = {"paths": [str(llama_folder)], "contexts": [16], "batches": [1], "working_set": 1 << 10}
    text = data.draw(st.none() | st.just(str(text_file)))
    request = data.draw(requests(ModelRequest, **fixed, text=text))
    assert parsed(ModelRequest, command_line(request, brief=True)) == request


@pytest.mark.parametrize(("kind", "name"), EACH, ids=lambda each: str(each))
@given(data=st.data())
@settings(max_examples=10, suppress_health_check=[HealthCheck.filter_too_much])
def test_no_option_is_dropped(kind: type[Request], name: str, data: Any) -> None:
    """Two requests that differ in one of them have commands that differ."""
    first, value = data.draw(requests(kind)), data.draw(value_of(name, options_of(kind)[name]))
    try:
        second = kind.asked(**{**vars(first), name: value})
    except InputError:
        reject()
    lines = command_line(first), command_line(second)
    assert (lines[0] == lines[1]) == (first == second)


@pytest.mark.parametrize("kind", REQUESTS, ids=lambda kind: kind.command)
@given(data=st.data())
@settings(max_examples=10, suppress_health_check=[HealthCheck.filter_too_much])
def test_defaults_are_the_requests_own(kind: type[Request], data: Any) -> None:
    """A command with nothing but what it needs asks what a call with nothing more asks."""
    needed = {
        name: each
        for name, each in options_of(kind).items()
        if each.is_required or name in ("source", "texts", "grouped")
    }
    given = {name: data.draw(values(each.kind, name)) for name, each in needed.items()}
    try:
        request = kind.asked(**given)
    except InputError:
        reject()
    assert parsed(kind, command_line(request, brief=True)) == request


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        (kvfold.convert, ConvertRequest),
        (kvfold.evaluate, EvalRequest),
        (find_needles, EvalRequest),
        (kvfold.heal, HealRequest),
        (kvfold.verify, VerifyRequest),
    ],
)
def test_defaults_of_calls_are_the_requests_own(
    call: Callable[..., Any], kind: type[Request]
) -> None:
    """And every option can be given to a call."""
    found, declared = signature(call).parameters, options_of(kind)
    for name, parameter in found.items():
        if parameter.kind is Parameter.KEYWORD_ONLY and name in declared and name != "calibration":
            assert parameter.default == declared[name].default, name
    if call in (kvfold.convert, kvfold.heal):
        known = {*found, *(OPTIONS if call is kvfold.heal else ()), "grouped"}
        assert declared.keys() <= known


def test_every_field_of_a_request_is_an_option() -> None:
    for kind in REQUESTS:
        for each in fields(kind):
            assert "option" in each.metadata, (kind, each.name)
            assert each.default is options_of(kind)[each.name].default or each.default is MISSING
