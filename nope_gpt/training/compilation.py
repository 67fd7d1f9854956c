"""Compiling the blocks, or saying why not."""

from __future__ import annotations

import os
import shutil
import sys

import torch

from nope_gpt.config import TrainingConfig
from nope_gpt.device import autocast
from nope_gpt.errors import UsageError, first_line
from nope_gpt.model import NoPEGPT

WORTHWHILE_FLOPS = 1e14
"""Of a run on a CPU: some minutes of work, next to some seconds of compiling."""


def compile_blocks(
    model: NoPEGPT,
    config: TrainingConfig,
    *,
    precision: torch.dtype,
    shape: tuple[int, int],
    flops: float,
) -> str:
    """Compile the blocks of a model in place, if that is asked for, possible and worthwhile.

    Args:
        model: On its device.
        config: The run's settings.
        precision: Of the matrix products.
        shape: Of a micro-batch [B, T], to try the compiler on.
        flops: Of the whole run.

    Returns:
        What happened, for people.

    Raises:
        UsageError: --compile is on, and it cannot be done.
    """
    if config.compile == "off":
        return "eager"
    if config.compile == "auto" and model.device.type == "cpu" and flops < WORTHWHILE_FLOPS:
        return "eager, the run being short"
    reason = obstacle(model.device)
    if reason is None:
        try:
            model.decoder.compile_blocks()
            try_blocks(model, precision, shape)
            return "compiled"
        except Exception as error:  # Whatever a compiler can fail with is no reason to fail.
            model.decoder.uncompile_blocks()
            torch._dynamo.reset()
            reason = f"the compiler failed ({type(error).__name__}: {first_line(error)})"
    if config.compile == "on":
        raise UsageError(f"--compile is on, and {reason}", hint="leave it out, or --compile off")
    return f"eager: {reason}"


def obstacle(device: torch.device) -> str | None:
    """Why torch.compile cannot work here, or None."""
    if sys.platform == "win32":
        return "torch.compile is not used on Windows"
    if device.type == "mps":
        return "torch.compile is not used on Apple GPUs"
    compilers = (os.environ.get("CXX"), "g++", "clang++", "c++")
    if not any(name and shutil.which(name) for name in compilers):
        return "there is no C++ compiler (apt install g++)"
    return None


def try_blocks(model: NoPEGPT, precision: torch.dtype, shape: tuple[int, int]) -> None:
    """Run a compiled block once, forward and back, as the first step would."""
    block = next(iter(model.decoder.layers))
    size = (*shape, model.embedding_dimensions)
    hidden = torch.zeros(size, device=model.device, requires_grad=True)
    with autocast(model.device, precision):
        result = block(hidden)
    torch.autograd.backward(result.sum())
    block.zero_grad(set_to_none=True)
