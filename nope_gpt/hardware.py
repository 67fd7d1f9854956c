"""What a machine can do at best: the yardstick of a run's utilization."""

from __future__ import annotations

DENSE_BFLOAT16 = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A40": 150e12,
    "A10G": 70e12,
    "A10": 125e12,
    "RTX A6000": 155e12,
    "RTX 5090": 209e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "MI325X": 1307e12,
    "MI300X": 1307e12,
}
"""Operations a second on dense matrices in bfloat16 with float32 sums, by the vendors' data
sheets; a name comes before those that it contains."""


def dense_bfloat16_peak(name: str) -> float | None:
    """The peak of a GPU by the name its driver gives, or None if it is not in the table."""
    words = set(name.replace("-", " ").split())
    if "Laptop" in words:  # Another chip of the same name.
        return None
    for known, peak in DENSE_BFLOAT16.items():
        if set(known.split()) <= words:
            return peak
    return None
