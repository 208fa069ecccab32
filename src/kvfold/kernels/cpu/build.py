"""Compiling the CPU kernels. Used by the package's build and by the sanitizer's test; no torch.

The library has a C interface and links to nothing but the C++ runtime, so one build serves every
Python version. Each instruction set is a copy of the same sources; which takes a call is chosen
when it runs (``choice.h``).
"""

import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent
NAME = "libkvfold.so"
_FLAGS = [
    *("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden"),
    *("-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra"),
    # Vectors only pass between inlined functions, and GCC trips over its own headers.
    *("-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized"),
]
_AVX2 = "-mavx2 -mfma -mf16c"
_AVX512 = f"{_AVX2} -mavx512f -mavx512bw -mavx512vl -mavx512dq -mprefer-vector-width=512"
_BF16 = f"{_AVX512} -mavx512vnni -mavx512bf16"
_X86 = {
    "avx512_bf16": _BF16,
    "avx512_amx": f"{_BF16} -mamx-tile -mamx-bf16 -DKVF_AMX",
    "avx512_vnni": f"{_AVX512} -mavx512vnni",
    "avx512": _AVX512,
    "avx2": _AVX2,
    "baseline": "",
}


class BuildError(Exception):
    """No compiler, or it failed; the message says which."""


def compiler() -> str | None:
    """The C++ compiler: ``$CXX``, or GCC or Clang from the path."""
    candidates = [os.environ.get("CXX"), "g++", "clang++", "c++"]
    return next((c for c in candidates if c and shutil.which(c.split()[0])), None)


def build(target: Path, extra: tuple[str, ...] = (), only: tuple[str, ...] = tuple(_X86)) -> None:
    """Compile the kernels into the shared library ``target``.

    Args:
        extra: more flags for the compiler.
        only: instruction sets; those whose flags the compiler does not know are left out.

    Raises:
        BuildError: if it cannot be done.
    """
    cxx = compiler()
    if cxx is None:
        raise BuildError("no C++ compiler found (tried $CXX, g++, clang++, c++)")
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    command = [*cxx.split(), *_FLAGS, *extra]
    isas = {"baseline": ""}
    if x86:
        isas |= {isa: flags for isa, flags in _X86.items() if isa in only and _knows(cxx, flags)}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:

        def compile_isa(isa: str) -> str:
            names = [f"-DKVF_NAMESPACE=kvf_ns_{isa}", f"-DKVF_TABLE=kvf_{isa}"]
            out = str(Path(folder) / f"{isa}.o")
            _run([*command, *isas[isa].split(), *names, "-c", str(SOURCES / "isa.cpp"), "-o", out])
            return out

        objects = list(pool.map(compile_isa, isas))
        main = str(Path(folder) / "library.o")
        have = [f"-DKVF_HAVE_{isa}" for isa in isas]
        _run([*command, *have, "-c", str(SOURCES / "library.cpp"), "-o", main])
        whole = Path(folder) / NAME
        _run([*command, "-shared", *objects, main, "-o", str(whole), "-pthread"])
        # Renamed, not overwritten: a process that runs the old library keeps it.
        fresh = target.with_suffix(".new")
        shutil.copy(whole, fresh)
        fresh.replace(target)


def _knows(cxx: str, flags: str) -> bool:
    """Whether the compiler takes the flags, and its assembler the instructions of AMX."""
    code = 'int main() { asm volatile("tilerelease"); }' if "amx" in flags else ""
    command = [*cxx.split(), *flags.split(), "-x", "c++", "-c", "-o", os.devnull, "-"]
    return not subprocess.run(command, input=code, text=True, capture_output=True).returncode


def _run(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        output = getattr(error, "stderr", "") or str(error)
        lines = [line for line in output.splitlines() if "error" in line] or output.splitlines()
        raise BuildError(f"{command[0]} failed: {lines[0] if lines else error}") from error
