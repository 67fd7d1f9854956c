"""What machines can do at best: the yardstick of a run's utilization, and of its plan."""

from __future__ import annotations

from typing import NamedTuple


class Gpu(NamedTuple):
    """A GPU by its vendor's data sheet.

    Attributes:
        flops: Operations a second on dense matrices in bfloat16 with float32 sums. Data sheets
            like to print twice as many, for matrices that are half zeros.
        memory: Bytes, where its gigabytes are taken for 10^9 of them, which is not too many.
        watts: Power of the whole board, at most.
    """

    flops: float
    memory: int
    watts: int


def _gpu(teraflops: float, gigabytes: int, watts: int) -> Gpu:
    return Gpu(teraflops * 1e12, gigabytes * 10**9, watts)


GPUS: dict[str, Gpu] = {
    "B200": _gpu(2250, 180, 1000),
    "GH200": _gpu(989, 96, 1000),
    "H200": _gpu(989, 141, 700),
    "H100 NVL": _gpu(835, 94, 400),
    "H100 PCIe": _gpu(756, 80, 350),
    "H100": _gpu(989, 80, 700),
    "H800": _gpu(989, 80, 700),
    "A100": _gpu(312, 80, 400),
    "A800": _gpu(312, 80, 400),
    "L40S": _gpu(362, 48, 350),
    "L4": _gpu(121, 24, 72),
    "A40": _gpu(150, 48, 300),
    "A10G": _gpu(70, 24, 300),
    "A10": _gpu(125, 24, 150),
    "RTX A6000": _gpu(155, 48, 300),
    "RTX 5090": _gpu(209, 32, 575),
    "RTX 5080": _gpu(112, 16, 360),
    "RTX 4090": _gpu(165, 24, 450),
    "RTX 4080": _gpu(97, 16, 320),
    "RTX 3090": _gpu(71, 24, 350),
    "RTX 3080": _gpu(59, 10, 320),
    "MI325X": _gpu(1307, 256, 1000),
    "MI300X": _gpu(1307, 192, 750),
}
"""A name comes before those that it contains."""


def known_gpu(name: str) -> Gpu | None:
    """A GPU by the name that its driver gives, or that people type; None if it is not known."""
    words = set(name.upper().replace("-", " ").replace("_", " ").split())
    if "LAPTOP" in words:  # Another chip of the same name.
        return None
    typed = "".join(sorted(words)) if len(words) > 1 else next(iter(words), "")
    for known, gpu in GPUS.items():
        own = known.upper().split()
        if set(own) <= words or typed in ("".join(own), own[-1]):
            return gpu
    return None


def dense_bfloat16_peak(name: str) -> float | None:
    """Operations a second of a GPU by the name its driver gives, or None if it is not known."""
    gpu = known_gpu(name)
    return gpu.flops if gpu else None
