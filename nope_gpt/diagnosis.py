"""What this machine has for the work and what is missing, with the line that mends it."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from nope_gpt import __version__
from nope_gpt.amounts import format_bytes
from nope_gpt.config import PRESETS, SHAPE_TINY, ModelConfig, PretrainConfig, SizeConfig
from nope_gpt.device import (
    has_bfloat16,
    memory_left,
    peak_flops,
    resolve_precision,
)
from nope_gpt.errors import first_line
from nope_gpt.files.writing import nearest_directory
from nope_gpt.model import NoPEGPT
from nope_gpt.network import native
from nope_gpt.sizing.arithmetic import training_flops_per_token
from nope_gpt.sizing.measurements import own_cpu
from nope_gpt.sizing.memory import training_memory
from nope_gpt.training import compilation, measuring

GOOD, LESS, BAD = "good", "less", "bad"
"""All is well; it works, but less well than it could; it does not work."""

LITTLE_MEMORY = 2 << 30
LITTLE_DISK = 5 << 30
"""Bytes: the quick start takes a fifth of either; a model of 400M parameters takes more."""

SPEED_SECONDS = 5.0

HUB_SECONDS = 5.0
"""To wait for an answer."""

EXTRAS = {
    "transformers": ("transformers", "comparing exports for transformers with their source"),
    "matplotlib": ("plots", "pictures: nope size --plot, nope eval --plot, model cards"),
    "gguf": ("gguf", "exports for llama.cpp and Ollama"),
}
"""Libraries that some commands use: the extra that installs each, and what it is for."""


@dataclass(frozen=True)
class Finding:
    """What one look at the machine has found.

    Attributes:
        name: Of what was looked at.
        state: `good`, `less` or `bad`.
        told: What was seen.
        remedy: What to type or to do about it.
    """

    name: str
    state: str
    told: str
    remedy: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def versions(_: torch.device) -> Iterator[Finding]:
    """What runs here."""
    told = f"nope-gpt {__version__}, Python {platform.python_version()}, torch {torch.__version__}"
    yield Finding("versions", GOOD, f"{told}, {platform.system()} {platform.machine()}")


def computing(device: torch.device) -> Iterator[Finding]:
    """What computes, and whether something better is here and lies idle."""
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        count = torch.cuda.device_count()
        name = f"{count} x {torch.cuda.get_device_name(device)}"
        yield Finding("device", GOOD, f"{name}, {format_bytes(memory)} each")
        return
    if device.type == "mps":
        yield Finding("device", GOOD, "an Apple GPU")
        return
    told = f"{own_cpu()}, {torch.get_num_threads()} threads"
    if shutil.which("nvidia-smi"):
        remedy = "pip install torch, as https://pytorch.org/get-started/locally says for CUDA"
        told += f"; there is an NVIDIA driver, and torch {torch.__version__} sees no GPU"
        yield Finding("device", LESS, told, remedy)
    else:
        yield Finding("device", GOOD, f"{told}; no GPU")


def bfloat16(device: torch.device) -> Iterator[Finding]:
    """Whether half as many bytes are as good."""
    if has_bfloat16(device):
        yield Finding("bfloat16", GOOD, "in hardware: training and generating use it")
    else:
        yield Finding("bfloat16", GOOD, "not in hardware: training and generating use float32")


def compiling(device: torch.device) -> Iterator[Finding]:
    """Compiling a block with torch."""
    reason = compilation.obstacle(device)
    if reason is None:
        try:
            with torch.device(device):
                model = NoPEGPT.from_config(ModelConfig(**SHAPE_TINY, vocabulary_size=256))
            compilation.begin(model)
            begun = time.perf_counter()
            compilation.try_compiled(model, resolve_precision("auto", device), (1, 64))
            seconds = time.perf_counter() - begun
            yield Finding("torch.compile", GOOD, f"compiles a block in {seconds:.0f} s")
            return
        except Exception as error:  # Whatever a compiler can fail with.
            reason = f"{type(error).__name__}: {first_line(error)}"
            torch._dynamo.reset()
    yield Finding("torch.compile", LESS, reason, "train without it: --compile off")


def decoding(device: torch.device) -> Iterator[Finding]:
    """Compiling what generates at the speed of the memory."""
    if device.type != "cpu":
        return
    if native.compiled(begin=True, wait=True):
        yield Finding("native decoding", GOOD, f"compiled, in {native.place()}")
    else:
        yield Finding("native decoding", LESS, native.complaint(), "apt install g++")


def flash(device: torch.device) -> Iterator[Finding]:
    """Whether attention has a kernel that keeps no scores."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    query = torch.zeros(1, 2, 128, 64, dtype=dtype, device=device)
    try:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
            scaled_dot_product_attention(query, query, query, is_causal=True)
    except RuntimeError:
        told = f"torch has none for {device.type}: attention keeps its scores"
        yield Finding("flash attention", LESS, told, "a smaller --batch-size, if memory is short")
    else:
        yield Finding("flash attention", GOOD, f"on {device.type}")


def memory(device: torch.device) -> Iterator[Finding]:
    """What is free of the memory of the device."""
    left = memory_left(device)
    if left is None:
        return
    told = f"{format_bytes(left)} free"
    if left < LITTLE_MEMORY:
        remedy = f"end other programs, or see what fits: nope size --memory {left >> 20}MB"
        yield Finding("memory", LESS, told, remedy)
    else:
        yield Finding("memory", GOOD, told)


def disk(_: torch.device) -> Iterator[Finding]:
    """What is free where artefacts and downloads go, and whether it can be written."""
    from huggingface_hub.constants import HF_HUB_CACHE

    for name, place in {"disk": Path.cwd(), "downloads": Path(HF_HUB_CACHE)}.items():
        existing = nearest_directory(place)
        told = f"{format_bytes(shutil.disk_usage(existing).free)} free for {place}"
        try:
            with tempfile.TemporaryFile(dir=existing):
                pass
        except OSError as error:
            remedy = "cd to a place that you may write to" if name == "disk" else "export HF_HOME="
            yield Finding(name, BAD, f"{place} cannot be written: {error.strerror}", remedy)
            continue
        if shutil.disk_usage(existing).free < LITTLE_DISK:
            yield Finding(name, LESS, told, "free some space: hf cache prune, or old runs")
        else:
            yield Finding(name, GOOD, told)


def hub(_: torch.device) -> Iterator[Finding]:
    """Whether the Hub answers, and who it takes us for."""
    from huggingface_hub import constants, get_session, get_token
    from huggingface_hub.errors import HTTPError

    without = "models and data sets of the Hub cannot be had; what is on this machine can be used"
    if constants.is_offline_mode():
        yield Finding("Hub", LESS, f"HF_HUB_OFFLINE is set: {without}", "unset HF_HUB_OFFLINE")
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
    except (HTTPError, OSError) as error:
        told = f"{constants.ENDPOINT} does not answer ({type(error).__name__}): {without}"
        yield Finding("Hub", LESS, told, "mend the network, HTTPS_PROXY or HF_ENDPOINT")
        return
    if get_token():
        yield Finding("Hub", GOOD, f"{constants.ENDPOINT} answers; there is a token")
    else:
        told = f"{constants.ENDPOINT} answers; no token, which private models and uploads need"
        yield Finding("Hub", GOOD, told, "hf auth login")


def extras(_: torch.device) -> Iterator[Finding]:
    """Libraries that some commands use."""
    for library, (extra, purpose) in EXTRAS.items():
        if importlib.util.find_spec(library) is None:
            yield Finding(library, LESS, f"not here: {purpose}", f"pip install 'nope-gpt[{extra}]'")
        else:
            yield Finding(library, GOOD, purpose)


def speed(device: torch.device) -> Iterator[Finding]:
    """Training a preset for five seconds."""
    precision = resolve_precision("auto", device)

    def work_of(name: str) -> SizeConfig:
        preset = PRESETS[PretrainConfig][name]
        return SizeConfig(
            **{name: value for name, value in preset.items() if name != "max_steps"},
            vocabulary_size=4096,
            precision=str(precision).removeprefix("torch."),
            device="cpu" if device.type == "cpu" else "cuda",
        )

    name, work = "tiny", work_of("tiny")
    if device.type == "cuda":  # A larger one keeps it busy, if it fits.
        larger = work_of("125m")
        if training_memory(larger).peak < (memory_left(device) or 0):
            name, work = "125m", larger
    rate = measuring.tokens_per_second(work, device, SPEED_SECONDS)
    told = f"trains the {name} preset at {rate:,.0f} tokens/s"
    peak = peak_flops(device, precision)
    if peak:
        reached = rate * training_flops_per_token(work, work.tokens_per_sample, causal=False)
        told += f", {reached / peak:.0%} of what matrix products reach ({peak / 1e12:.2f} Tflop/s)"
    yield Finding("speed", GOOD, told)


Check = Callable[[torch.device], Iterator[Finding]]

QUICK: tuple[Check, ...] = (versions, computing, bfloat16, flash, memory, disk, hub, extras)
SLOW: tuple[Check, ...] = (decoding, compiling, speed)
"""What takes seconds, as it does the work itself."""
