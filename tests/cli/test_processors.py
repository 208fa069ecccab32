"""Threads that wait for one another leave the processors to others, but where time is measured."""

import os

import pytest

from tests.conftest import Kvfold

SPINS, POLICY = "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"


@pytest.mark.parametrize(
    ("command", "given", "wanted"),
    [
        (("methods",), {}, "10000"),
        (("--debug", "methods"), {}, "10000"),
        (("methods",), {SPINS: "7"}, "7"),
        (("methods",), {POLICY: "ACTIVE"}, None),
        (("bench", "--help"), {}, None),
        (("plan", "--help"), {}, None),
        ((), {}, "10000"),
    ],
)
def test_how_long_they_spin(
    kvfold: Kvfold,
    command: tuple[str, ...],
    given: dict[str, str],
    wanted: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in (SPINS, POLICY):
        monkeypatch.setenv(name, "")  # so that it is put back, whatever the command sets
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    kvfold(*command)
    assert os.environ.get(SPINS) == wanted
