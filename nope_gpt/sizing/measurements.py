"""What was measured on a machine, for later answers about it."""

from __future__ import annotations

import dataclasses
import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import Any

from nope_gpt.files.json_files import DAMAGE, read_json
from nope_gpt.files.places import cache_directory
from nope_gpt.files.writing import write_json


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Some real steps on a device.

    Attributes:
        device: Its name.
        peak: The most bytes that its allocator gave out.
        calculated: What the closed form says of the same steps.
        tokens_per_second: Trained.
        flops: Operations a second that training got, as PaLM counts them.
        precision: Of the matrix products.
        torch: Its version.
    """

    device: str
    peak: int
    calculated: int
    tokens_per_second: float
    flops: float
    precision: str
    torch: str

    @property
    def memory_ratio(self) -> float:
        """Measured to calculated."""
        return self.peak / self.calculated

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def own_cpu() -> str:
    """The name of this machine's processor."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()} x {os.cpu_count()}"
    return f"{platform.processor() or platform.machine()} x {os.cpu_count()}"


def store() -> Path:
    """The file of all that this user measured."""
    return cache_directory() / "calibrations.json"


def known() -> dict[str, Measurement]:
    """What was measured, by device; what a damaged file had is gone."""
    with suppress(*DAMAGE, RuntimeError):  # The last where there is no home.
        found = read_json(store())
        return {name: Measurement(**values) for name, values in found.items()}
    return {}


def keep(found: Measurement) -> None:
    """Remember what was measured, instead of what was known of that device.

    Raises:
        NopeError: It cannot be written.
    """
    every = known() | {found.device: found}
    write_json(store(), {name: each.as_dict() for name, each in every.items()})
