"""Compiling the kernels: into another folder, without a compiler, with the address sanitizer."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvfold.kernels.cpu.build import NAME, BuildError, build, compiler
from kvfold.kernels.cpu.library import Library
from tests.toolbox.attention_cases import FOUND, ISAS

ROOT = Path(__file__).parents[2]
needs_compiler = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@needs_compiler
def test_a_build_loads_and_names_its_instruction_sets(tmp_path: Path) -> None:
    build(tmp_path / NAME)
    found = Library(tmp_path / NAME)
    assert found.isas[-1] == "baseline"
    assert found.isa == found.isas[0]
    if FOUND is not None:
        assert found.isas == FOUND.isas


def test_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/g++")
    monkeypatch.setenv("PATH", "")
    assert compiler() is None
    with pytest.raises(BuildError, match=r"no C\+\+ compiler found \(tried \$CXX, g\+\+"):
        build(tmp_path / NAME)
    assert not list(tmp_path.iterdir())


@needs_compiler
def test_a_failing_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message has the compiler's own first error."""
    real = compiler()
    monkeypatch.setenv("CXX", f"{real} --no-such-option")
    with pytest.raises(BuildError, match=r"failed: .*--?no-such-option"):
        build(tmp_path / NAME)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@needs_compiler
def test_flags_that_a_compiler_does_not_know_cost_their_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = tmp_path / "older"
    older.write_text(f'#!/bin/sh\ncase "$*" in *amx*) exit 1;; esac\nexec {compiler()} "$@"\n')
    older.chmod(0o755)
    monkeypatch.setenv("CXX", str(older))
    build(tmp_path / NAME, ("-O0",), ("avx512_amx", "avx2"))
    assert Library(tmp_path / NAME).isas == [isa for isa in ("avx2", "baseline") if isa in ISAS]


ASK = "from kvfold.kernels.cpu.library import library, why_missing as w; print(library(), w())"


def test_a_missing_library_is_explained(tmp_path: Path) -> None:
    told = python(ASK, KVFOLD_KERNELS=str(tmp_path / NAME))
    assert told.stdout.startswith("None not built; install a C++ compiler"), told.stderr


def test_a_broken_library_is_explained(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b"not a library")
    told = python(ASK, KVFOLD_KERNELS=str(tmp_path / NAME))
    assert told.stdout.startswith("None "), told.stderr
    assert NAME in told.stdout


@needs_compiler
def test_a_library_of_other_sources_is_refused(tmp_path: Path) -> None:
    """Its structures may be others; following pointers through them would be fatal."""
    names = ["isa", "isas", "set_isa", "set_parallel", "attend", "append", "read", "sizeof"]
    source = "\n".join(f'extern "C" long kvf_{name}() {{ return 1; }}' for name in names)
    (tmp_path / "other.cpp").write_text(source)
    command = [*str(compiler()).split(), "-shared", "-fPIC", "-o", NAME, "other.cpp"]
    subprocess.run(command, cwd=tmp_path, check=True)
    told = python(ASK, KVFOLD_KERNELS=str(tmp_path / NAME))
    assert told.stdout.strip() == f"None {NAME} was built from other sources; reinstall kvfold"


@pytest.mark.skipif(FOUND is None, reason="the CPU kernels were not built")
def test_a_library_of_other_formats_is_refused() -> None:
    """A format is a number to it: one that it does not have would be read as another."""
    assert FOUND is not None
    told = python(
        "from kvfold.ops.formats import FORMATS; FORMATS['int3'] = FORMATS['int4'];"
        "from kvfold.kernels.cpu.library import library, why_missing as w; print(library(), w())"
    )
    assert told.stdout.startswith("None "), told.stderr
    assert "was built from other sources" in told.stdout


@pytest.mark.skipif(FOUND is None, reason="the CPU kernels were not built")
def test_the_environment_chooses_the_instruction_set() -> None:
    told = python(
        "from kvfold.kernels.cpu.library import library; print(library().isa)",
        KVFOLD_ISA="baseline",
    )
    assert told.stdout.strip() == "baseline", told.stderr
    told = python("from kvfold.kernels.cpu.library import library; library()", KVFOLD_ISA="mmx")
    assert "no kernels for 'mmx'" in told.stderr


@pytest.mark.slow
@needs_compiler
def test_the_address_sanitizer_is_silent(tmp_path: Path) -> None:
    """Random calls on a library that aborts when it touches memory that is not its own."""
    runtime = subprocess.run(
        ["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    same = shutil.which("g++") == shutil.which(str(compiler()).split()[0])
    if not same or not Path(runtime).is_absolute():
        pytest.skip("needs g++ with its sanitizer's library")
    build(tmp_path / NAME, ("-fsanitize=address", "-fno-omit-frame-pointer", "-O1"))
    environment = {
        "KVFOLD_KERNELS": str(tmp_path / NAME),
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            "tests/kernels/test_kernels_fuzz.py",
        ],
        env=os.environ | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    report = run.stderr[-4000:] + run.stdout[-2000:]
    assert run.returncode == 0, report
    assert "2 passed" in run.stdout, report
