"""Where the computation runs: device, precision, ranks and seeds."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import math
import mmap
import os
import secrets
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from nope_gpt.amounts import format_bytes
from nope_gpt.errors import CapacityError, UsageError
from nope_gpt.sizing.hardware import dense_bfloat16_peak

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Of mallopt(3)."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun started; alone without it."""

    rank: int
    local_rank: int
    world_size: int

    @classmethod
    def from_environment(cls) -> Ranks:
        return cls(
            rank=int(os.environ.get("RANK", "0")),
            local_rank=int(os.environ.get("LOCAL_RANK", "0")),
            world_size=int(os.environ.get("WORLD_SIZE", "1")),
        )

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def resolve_device(name: str, ranks: Ranks | None = None) -> torch.device:
    """Turn a device's name into a device that is there.

    Args:
        name: auto, cpu, cuda, cuda:N or mps. auto takes the best one there is, and
            with several ranks cuda means the GPU of this rank.
        ranks: This process among its peers.

    Raises:
        UsageError: There is no such device on this machine.
    """
    if name == "auto":
        name = "cuda" if cuda_works() else "mps" if mps_works() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(
            f"--device is {name!r}, which is no device", hint="use auto, cpu, cuda, cuda:1 or mps"
        ) from None
    if device.type == "cuda":
        if not cuda_works():
            raise UsageError("--device is cuda, and no GPU can be used", hint="use --device cpu")
        if device.index is None:
            device = torch.device("cuda", ranks.local_rank if ranks else 0)
        count = torch.cuda.device_count()
        if device.index >= count:
            raise UsageError(f"--device is {device}, and this machine has {count} GPUs")
    elif device.type == "mps" and not mps_works():
        raise UsageError("--device is mps, and no Apple GPU can be used", hint="use --device cpu")
    elif device.type not in ("cpu", "mps"):
        raise UsageError(f"--device is {name}, and must be auto, cpu, cuda, cuda:N or mps")
    return device


def refuse_missing_gpus(count: int, device: str) -> None:
    """Refuse to start more ranks than this machine has GPUs for.

    Args:
        count: Of the ranks.
        device: What was asked for; several ranks can share a CPU, if that is asked for.

    Raises:
        UsageError: With how many there are.
    """
    if device == "cpu":
        return
    found = torch.cuda.device_count() if cuda_works() else 0
    if count > found:
        raise UsageError(
            f"--gpus is {count}, and this machine has {found} that can be used",
            hint=f"--gpus {found}" if found else "leave it out, or add --device cpu to try ranks",
        )


def cuda_works() -> bool:
    """Whether an NVIDIA or AMD GPU can be used."""
    return torch.cuda.is_available()


def mps_works() -> bool:
    """Whether an Apple GPU can be used."""
    return torch.backends.mps.is_available()


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products: float32, bfloat16, or by auto the faster of them."""
    if name == "auto":
        return torch.bfloat16 if has_bfloat16(device) else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


@functools.cache
def has_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 faster than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        found = torch.cpu.get_capabilities()
        return any(found.get(name) is True for name in ("amx_bf16", "avx512_bf16"))
    return False


def reuse_freed_memory() -> None:
    """Have the C library keep freed memory for the next tensor of the same step.

    By default glibc returns every large block to the system, which clears each page anew
    when a tensor of the next step takes it again: a fifth of a training step on a CPU.
    """
    if sys.platform != "linux":
        return
    with contextlib.suppress(AttributeError, OSError):  # Another C library than glibc.
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)  # Never.


def peak_flops(device: torch.device, precision: torch.dtype) -> float | None:
    """Operations a second that matrix products can reach, or None if nobody knows.

    A GPU's is that of its data sheet, a CPU's is measured here, in a fifth of a second.
    """
    if device.type == "cuda" and precision == torch.bfloat16:
        return dense_bfloat16_peak(torch.cuda.get_device_name(device))
    if device.type != "cpu":
        return None
    size = 1024
    one, other = (torch.randn(size, size).to(precision) for _ in range(2))
    best, begun = math.inf, time.perf_counter()
    while (now := time.perf_counter()) < begun + 0.2:
        torch.mm(one, other)
        best = min(best, time.perf_counter() - now)
    return 2 * size**3 / best


def memory_in_use(device: torch.device) -> int | None:
    """Bytes: on a GPU the most that tensors ever took, on a CPU what the process takes now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    try:
        pages = int(Path("/proc/self/statm").read_bytes().split()[1])
    except OSError:
        return None
    return pages * mmap.PAGESIZE


def memory_of(device: torch.device) -> int:
    """Bytes of a device in all, or those of this machine that are free.

    Raises:
        UsageError: They are not known.
    """
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    left = memory_left(device)
    if left is None:
        raise UsageError(
            f"the memory of {device} is not known", hint="say a --batch-size instead of auto"
        )
    return left


def memory_left(device: torch.device) -> int | None:
    """Bytes that new tensors can take, or None if that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    sizes = dict(line.split(":", 1) for line in lines)
    return int(sizes["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in sizes else None


def refuse_small_memory(device: torch.device, size: int, what: str) -> None:
    """Refuse what a device has no room for.

    Raises:
        CapacityError: With both figures.
    """
    left = memory_left(device)
    if left is not None and size > left:
        raise CapacityError(
            f"{what} takes {format_bytes(size)}, and {device} has {format_bytes(left)} left",
            hint="lower --context-length, or --max-tokens",
        )


def autocast(device: torch.device, precision: torch.dtype) -> AbstractContextManager[object]:
    """Run matrix products in a lower precision, keeping the weights as they are."""
    if precision == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=precision, cache_enabled=False)


def seed_of(*parts: int) -> int:
    """A seed that is a pure function of numbers, and unlike that of any others."""
    text = " ".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


def draw_seed() -> int:
    """A fresh seed, for runs that were not given one; it is recorded to be reused."""
    return secrets.randbelow(1 << 31)
