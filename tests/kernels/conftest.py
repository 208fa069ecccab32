"""Fixtures of the tests of kernels."""

import pytest


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's kernels, under its interpreter where there is no GPU."""
    pytest.importorskip("triton")
    monkeypatch.setenv("KVFOLD_BACKEND", "triton")
