"""Wrong arguments to every public function: only a KVFoldError with a hint comes out, quickly.

Functions and parameters are those of ``kvfold.__all__``, so a new one is tested when it is added.
"""

import inspect
import math
import os
import time
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kvfold
from kvfold.errors import KVFoldError, RunError
from kvfold.healing.request import OPTIONS
from tests.toolbox import tiny

# Results, made by kvfold and not by callers.
RESULTS = {"FoldedModel", "Quality", "Verification", "KVFoldError", "__version__"}
# Whose arguments have tests of their own beside them.
ELSEWHERE = {"attention", "attention_varlen", "explain", "merge", "KVCache", "FixedKVCache",
             "LatentCache"}  # fmt: skip
NAMES = sorted(set(kvfold.__all__) - RESULTS - ELSEWHERE)
MODEL = tiny.make("llama", num_key_value_heads=6)

ANYTHING: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 64, 10**6, 10**12, 2**63, 2**64, -(10**30), 0.5, 1.0,
    math.nan, math.inf, -math.inf, 1j, Decimal("0.5"), Fraction(1, 2), np.int64(2), np.float32(0.5),
    np.array([1, 2]), "", " ", "x", "auto", "mean", "none", "local", "cpu", "meta", "cuda:99",
    "bfloat16", "\x00", "\udc80", "a" * 5000, "~nouser/x", "/dev/null", b"bytes", Path(), Path("x"),
    Path("/nowhere/x"), [], [None], ["x"], [1], [[]], (), ("a", "b"), {}, {"a": 1}, set(), object(),
    object, int, len, range(3), iter(()), torch.tensor(2), torch.zeros(0), torch.zeros(2, 3),
    torch.zeros(2, 3, dtype=torch.int64), torch.full((2, 32), 10**6), torch.full((2, 32), -1),
    torch.zeros(2, 3, 4, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.bool),
    torch.zeros(2, 32, dtype=torch.int64, device="meta"), torch.zeros(1, 1, dtype=torch.int32),
    torch.device("cpu"), torch.float32, MODEL, [MODEL], [("a", MODEL)], [("a", 1)], [(1, MODEL)],
    torch.nn.Linear(2, 2), MODEL.config, type(MODEL), MODEL.to_empty,
]  # fmt: skip


def endless() -> Any:
    """Endless, as only code can be."""
    while True:
        yield "x"


def _enough(*arguments: Any, **options: Any) -> Any:
    raise RunError("enough: all checks are passed", "none")


@pytest.fixture
def calls(
    llama_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, tuple[list[Any], dict[str, Any]]]:
    """Arguments with which every function works."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("kvfold.healing.run._Run.local", _enough)
    monkeypatch.setattr("kvfold.fold.convert.fold_layers", _enough)
    monkeypatch.setattr("kvfold.engines.run.ask", _enough)
    return {
        "AttentionGeometry": ([2, 6, 2, 8, 8, 48], {}),
        "convert": ([llama_folder, "out", 2], {"calibrate": False}),
        "heal": ([llama_folder, "out", llama_folder, [text_file]], {"tokens": 2048}),
        "evaluate": ([[llama_folder], [text_file]], {"context": 32, "max_tokens": 64}),
        "inspect": ([llama_folder], {}),
        "verify": ([llama_folder], {"prompts": ["w3 w4"], "tokens": 2}),
        "fold_model": ([MODEL, 2, "mean", "none"], {}),
        "Select": ([], {}),
        "Evict": ([], {}),
        "compare": ([[("a", MODEL)], tiny.tokens(2, 8)], {}),
    }


def parameters(name: str) -> list[str]:
    found = list(inspect.signature(getattr(kvfold, name)).parameters)
    return [each for each in found if each != "options"] + (list(OPTIONS) if name == "heal" else [])


def attempt(call: Callable[[], object], told: object) -> None:
    started = time.monotonic()
    try:
        call()
    except KVFoldError as error:
        assert error.hint, told  # noqa: PT017
        assert error.message, told  # noqa: PT017
        assert len(error.message) < 10_000, told  # noqa: PT017
    assert time.monotonic() - started < 30, told


def test_every_public_function_is_tried() -> None:
    assert set(NAMES) | RESULTS | ELSEWHERE == set(kvfold.__all__)


@pytest.mark.parametrize("name", NAMES)
@settings(
    max_examples=int(os.environ.get("KVFOLD_FUZZ", "40")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
)
@given(data=st.data())
def test_any_arguments(
    name: str, data: Any, calls: dict[str, tuple[list[Any], dict[str, Any]]], tmp_path: Path
) -> None:
    own, options = calls[name]
    own, options = list(own), dict(options)
    names = parameters(name)
    for parameter in data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=2)):
        value = data.draw(st.sampled_from(ANYTHING) | st.integers() | st.floats() | st.text())
        if parameter in ("progress", "watch") and callable(value):
            continue  # what callers' own functions raise is theirs
        place = names.index(parameter)
        if place < len(own):
            own[place] = value
        else:
            options[parameter] = value
    attempt(lambda: getattr(kvfold, name)(*own, **options), (name, own, options))
    left = {path.name for path in tmp_path.iterdir()} - {"out"}
    assert not {each for each in left if "kvfold-partial" in each}, (name, own, options)


@pytest.mark.parametrize("name", NAMES)
def test_every_argument_of_every_type(
    name: str, calls: dict[str, tuple[list[Any], dict[str, Any]]]
) -> None:
    """Types that no parameter takes are refused for each parameter, by name."""
    own, options = calls[name]
    names = parameters(name)
    for place, parameter in enumerate(names):
        for value in (object(), 1j, b"bytes", {"a": object()}):
            given, more = list(own), dict(options)
            if place < len(own):
                given[place] = value
            else:
                more[parameter] = value
            with pytest.raises(KVFoldError) as caught:
                getattr(kvfold, name)(*given, **more)
            assert "enough" not in caught.value.message, (name, parameter, value)


def test_endless_sequences_end(calls: dict[str, tuple[list[Any], dict[str, Any]]]) -> None:
    (folder, out, teacher, _), options = calls["heal"]
    attempt(lambda: kvfold.evaluate(endless(), ["x"]), "evaluate")
    attempt(lambda: kvfold.evaluate([folder], endless()), "evaluate")
    attempt(lambda: kvfold.heal(folder, out, teacher, endless(), **options), "heal")
    attempt(lambda: kvfold.convert(folder, out, 2, calibration=endless()), "convert")


def test_paths_strings_and_generators_are_all_fine(llama_folder: Path, text_file: Path) -> None:
    texts: Any = (str(path) for path in [text_file])
    folders: Any = (path for path in [llama_folder])
    first = kvfold.evaluate(folders, texts, context=32, max_tokens=64)
    second = kvfold.evaluate([str(llama_folder)], [text_file], context=32, max_tokens=64)
    assert [each.nll for each in first] == [each.nll for each in second]


def test_an_unknown_option_of_heal_is_named(llama_folder: Path) -> None:
    with pytest.raises(kvfold.KVFoldError, match="warmup") as caught:
        kvfold.heal(llama_folder, "out", llama_folder, ["x"], warmup=0.1)
    assert "warm_up" in caught.value.hint


def test_callbacks_that_take_something_else(llama_folder: Path) -> None:
    wrongs: list[Any] = [object, lambda: None, lambda label, done: None, "x", 3]
    for wrong in wrongs:
        with pytest.raises(KVFoldError, match="function of 3 arguments"):
            kvfold.inspect(llama_folder, progress=wrong)


def test_geometry_counts_only_numbers() -> None:
    geometry = kvfold.AttentionGeometry(2, 6, 2, 8, 8, 48)
    for method in (
        geometry.kv_bytes_per_token, geometry.decode_flops, geometry.forward_flops,
        geometry.projection_flops, geometry.with_kv_heads,
    ):  # fmt: skip
        for value in ("4", 1.5, None, -1, [4], math.nan, 10**30):
            with pytest.raises(KVFoldError, match=r"\w"):
                assert method(value) is None, (method, value)  # type: ignore[arg-type]
