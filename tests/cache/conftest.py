"""Fixtures of the tests of caches."""

import pytest

from tests.toolbox.attention_cases import (
    skip_without_kernels,
    without_kernels,
)


@pytest.fixture(params=["kernels", "plain PyTorch"])
def _backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "kernels":
        skip_without_kernels()
    else:
        without_kernels(monkeypatch)
