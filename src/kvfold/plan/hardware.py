"""What machines can do at best, by their makers.

Bandwidth and memory are those of data sheets, decimal; FLOPs are dense bfloat16 with float32
accumulation, without sparsity. None where the maker publishes no number.
"""

from dataclasses import dataclass

from kvfold.arguments import choice
from kvfold.errors import InputError
from kvfold.numbers import BANDWIDTH, FLOPS, GIGABYTES

GB, TERA = 10**9, 10**12


@dataclass(frozen=True)
class Hardware:
    """One accelerator or CPU socket.

    Attributes:
        memory, bandwidth: bytes, bytes per second. flops: per second, or None if unpublished.
        source: where the numbers are from.
    """

    name: str
    memory: float
    bandwidth: float
    flops: float | None
    source: str


def _of(name: str, memory: float, bandwidth: float, flops: float | None, source: str) -> Hardware:
    return Hardware(name, memory * GB, bandwidth * GB, flops and flops * TERA, source)


_A100 = "NVIDIA A100 Tensor Core GPU data sheet, 2022"
_H100 = "NVIDIA H100 Tensor Core GPU data sheet, 2023 (half of the number with sparsity)"
_ADA = "NVIDIA Ada GPU architecture white paper, v2.1, appendix A"

TABLE = {
    hardware.name: hardware
    for hardware in (
        _of("a100-40gb", 40, 1555, 312, _A100),
        _of("a100", 80, 2039, 312, _A100),
        _of("a10", 24, 600, 125, "NVIDIA A10 data sheet, 2021"),
        _of("l4", 24, 300, 121, "NVIDIA L4 data sheet, 2023 (half of the number with sparsity)"),
        _of("l40s", 48, 864, 362, "NVIDIA L40S data sheet, 2023"),
        _of("rtx3090", 24, 936, 71, "NVIDIA Ampere GA102 architecture white paper, v2.1"),
        _of("rtx4090", 24, 1008, 165.2, _ADA),
        _of("rtx5090", 32, 1792, 209.5, "NVIDIA RTX Blackwell GPU architecture white paper, v1.1"),
        _of("h100", 80, 3350, 989, _H100),
        _of("h100-pcie", 80, 2000, 756, _H100),
        _of("h200", 141, 4800, 989, "NVIDIA H200 data sheet, 2024 (half of that with sparsity)"),
        _of("b200", 180, 7700, 2250, "NVIDIA DGX B200 data sheet, 2024, an eighth of the system"),
        _of("mi250", 128, 3277, 362.1, "AMD Instinct MI250 data sheet, 2022 (both dies)"),
        _of("mi300x", 192, 5300, 1307.4, "AMD Instinct MI300X data sheet, 2023"),
        _of("gaudi2", 96, 2460, 432, "Intel Gaudi 2 white paper, 2024"),
        _of("gaudi3", 128, 3700, 1835, "Intel Gaudi 3 white paper, 2024"),
        _of("m1-max", 64, 400, None, "Apple press release, October 2021; no FLOPs published"),
        _of("m2-ultra", 192, 800, None, "Apple press release, June 2023; no FLOPs published"),
        _of("m3-max", 128, 400, None, "Apple press release, October 2023; no FLOPs published"),
        _of("m4-max", 128, 546, None, "Apple press release, October 2024; no FLOPs published"),
        _of("epyc-9654", 6144, 460.8, None, "AMD: 12 channels of DDR5-4800, one socket"),
        _of("xeon-8480", 4096, 307.2, None, "Intel: 8 channels of DDR5-4800, one socket"),
        _of("desktop-ddr5", 96, 89.6, None, "two channels of DDR5-5600"),
    )
}


def hardware_of(
    name: str | None,
    *,
    memory: float | None = None,
    bandwidth: float | None = None,
    flops: float | None = None,
) -> Hardware:
    """A machine of the table, or one given by its numbers, or one corrected by them.

    Args:
        memory: GB. bandwidth: GB/s. flops: TFLOP/s.

    Raises:
        InputError: for an unknown name, or without a name if memory or bandwidth is missing.

    >>> hardware_of("h100").bandwidth
    3350000000000
    """
    memory = None if memory is None else GIGABYTES.check(memory, "--memory")
    bandwidth = None if bandwidth is None else BANDWIDTH.check(bandwidth, "--bandwidth")
    flops = None if flops is None else FLOPS.check(flops, "--flops")
    if name is None:
        if memory is None or bandwidth is None:
            raise InputError(
                "which machine? give --gpu, or both --memory and --bandwidth",
                f"--gpu is one of {', '.join(TABLE)}, or here",
            )
        return _of("custom", memory, bandwidth, flops, "given")
    known = TABLE[choice(name.lower() if isinstance(name, str) else name, "--gpu", TABLE)]
    return corrected(known, memory=memory, bandwidth=bandwidth, flops=flops)


def corrected(
    known: Hardware,
    *,
    memory: float | None = None,
    bandwidth: float | None = None,
    flops: float | None = None,
) -> Hardware:
    """A machine with some of its numbers replaced; see :func:`hardware_of`."""
    return Hardware(
        known.name,
        known.memory if memory is None else memory * GB,
        known.bandwidth if bandwidth is None else bandwidth * GB,
        known.flops if flops is None else flops * TERA,
        known.source,
    )
