"""The Triton kernels compile for real GPUs, none of which need be here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvfold.ops.formats import FORMATS

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("backend", "arch"),
    [
        ("cuda", "90"),
        pytest.param("cuda", "80", marks=pytest.mark.slow),
        pytest.param("cuda", "100", marks=pytest.mark.slow),
        pytest.param("hip", "gfx942", marks=pytest.mark.slow),
    ],
)
def test_kernels_compile(backend: str, arch: str, tmp_path: Path) -> None:
    """For NVIDIA also: rows come 16 bytes at a time, and ahead of their use.

    Latents get no more memory than a program may have.
    """
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.toolbox.compile_triton", backend, arch],
        cwd=ROOT, env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    encoded = [name for name, fmt in FORMATS.items() if not fmt.plain]
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    formats = [row for row in lines if "format" in row]
    latents = [row for row in lines if "latent" in row]
    assert {row["latent"] for row in latents} == {"bf16", "int8"}
    for row in latents:
        assert row["shared"] <= row["allowed"], row
    assert [row["format"] for row in formats] == ["bf16", *encoded]
    if backend == "cuda":
        for row in formats:
            assert row["wide"] >= 4, row
            assert row["ahead"] >= 8, row
