"""Devices, tried before they are relied on."""

from pathlib import Path
from typing import TYPE_CHECKING

from kvfold.errors import InputError
from kvfold.names import shown

if TYPE_CHECKING:
    import torch

# What whole layers are multiplied in; weights, sums and what is solved are float32 and more.
COMPUTED_IN = ("float32", "bfloat16")


def pick_device(name: "str | torch.device | None") -> "torch.device":
    """The device of a name; without one a GPU if there is one, else the CPU.

    Raises:
        InputError: for a device that there is not, or that holds no numbers.

    >>> pick_device("cpu")
    device(type='cpu')
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if not isinstance(name, str | torch.device) or len(str(name)) > 64:
            raise ValueError("it is no device's name")
        device = torch.device(name)
        if device.type == "meta":
            raise ValueError("it holds no numbers")
        torch.zeros(1, device=device).item()
    except Exception as error:  # every backend fails in its own way
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"--device {shown(name if isinstance(name, str) else str(name))} cannot be used "
            f"({why[:100]})",
            "--device cpu always works",
        ) from error
    return device


def pick_dtype(name: str | None, device: "torch.device") -> "torch.dtype":
    """The dtype of a name; without one what the device multiplies fastest: see :func:`has_bf16`.

    >>> import torch
    >>> pick_dtype("float32", torch.device("cpu"))
    torch.float32
    """
    import torch

    dtype: torch.dtype = getattr(torch, name or ("bfloat16" if has_bf16(device) else "float32"))
    return dtype


def has_bf16(device: "torch.device") -> bool:
    """Whether it multiplies bfloat16 in hardware: GPUs since 2020, AVX-512 BF16, AMX."""
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def free_memory(device: str) -> int | None:
    """Bytes that are free on a device; None where nobody says.

    >>> free_memory("meta") is None
    True
    """
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    if device != "cpu":
        return None
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None


def check_memory(needed: int, hint: str, device: str = "cpu") -> None:
    """Refuse what does not fit into a device's free memory, where the system tells.

    Raises:
        InputError: with both sizes.
    """
    free = free_memory(device)
    if free is not None and needed > free:
        gib = 1 << 30
        raise InputError(
            f"this needs about {needed / gib:.1f} GiB of memory, {free / gib:.1f} GiB are free"
            + ("" if device == "cpu" else f" on {device}"),
            hint,
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch says so of a device, or of the machine (known by name: no torch).

    >>> is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: ..."))
    True
    """
    said = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return said or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def let_go(device: "torch.device") -> None:
    """Give memory back that PyTorch keeps for later."""
    import torch

    if device.type == "cuda":
        torch.cuda.empty_cache()
