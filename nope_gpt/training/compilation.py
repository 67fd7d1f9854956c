"""Compiling the network, or saying why not."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from nope_gpt.config import TrainingConfig
from nope_gpt.device import autocast
from nope_gpt.errors import Interrupted, NopeError, UsageError, first_line
from nope_gpt.model import NoPEGPT
from nope_gpt.network.cross_entropy import num_columns, to_gradient
from nope_gpt.signals import StopRequest, exit_code_of

WORTHWHILE_FLOPS = 1e14
"""Of a run on a CPU: some minutes of work, next to some seconds of compiling."""


def compile_network(
    model: NoPEGPT,
    config: TrainingConfig,
    *,
    precision: torch.dtype,
    shape: tuple[int, int],
    flops: float,
) -> str:
    """Compile a model in place, if that is asked for, possible and worthwhile.

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
            begin(model)
            try_compiled(model, precision, shape)
            return "compiled"
        except Exception as error:  # Whatever a compiler can fail with is no reason to fail.
            undo(model)
            torch._dynamo.reset()
            reason = f"the compiler failed ({type(error).__name__}: {first_line(error)})"
    if config.compile == "on":
        raise UsageError(f"--compile is on, and {reason}", hint="leave it out, or --compile off")
    return f"eager: {reason}"


@contextmanager
def compiling(stop: StopRequest) -> Iterator[None]:
    """Say what to do when the compiler fails in the middle of a run, at samples of a new length.

    Ctrl-C in a terminal ends it too, and can leave a cut file in its cache.

    Raises:
        Interrupted: It failed, and a signal was sent.
        NopeError: It failed by itself.
    """
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        from torch._inductor.runtime.cache_dir_utils import cache_dir

        cache = cache_dir()
        if stop.signal:
            raise Interrupted(
                "stopped by a signal while torch compiled; the last checkpoint is sound",
                exit_code=exit_code_of(stop.signal),
                hint="the same command with --resume goes on from it; should the compiler then "
                f"fail, remove {cache}",
            ) from error
        raise NopeError(
            f"the compiler failed in the middle of the run: {first_line(error)}",
            where=cache,
            hint="remove that directory, or add --compile off; --resume goes on from a checkpoint",
        ) from error


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


def begin(model: NoPEGPT) -> None:
    """Have the blocks compiled when they are first used, and on a GPU the gradient of the scores.

    A CPU takes the scores some rows at a time, while its cache holds them.
    """
    model.decoder.compile_blocks()
    if model.device.type == "cuda":
        model.to_gradient = torch.compile(to_gradient)


def undo(model: NoPEGPT) -> None:
    """Undo `begin`."""
    model.decoder.uncompile_blocks()
    model.to_gradient = to_gradient


def try_compiled(model: NoPEGPT, precision: torch.dtype, shape: tuple[int, int]) -> None:
    """Run what is compiled once, a block forward and back, as the first step would."""
    tokens = min(shape[0] * shape[1], model.loss_chunk)
    targets = torch.zeros(tokens, dtype=torch.long, device=model.device)
    width = num_columns(model.vocabulary_size, model.device, precision)
    scores = targets.new_zeros(tokens, width, dtype=precision)
    with torch.no_grad():
        model.to_gradient(scores, targets, None)
    block = next(iter(model.decoder.layers))
    size = (*shape, model.embedding_dimensions)
    hidden = torch.zeros(size, device=model.device, requires_grad=True)
    with autocast(model.device, precision):
        result = block(hidden)
    torch.autograd.backward(result.sum())
    block.zero_grad(set_to_none=True)
