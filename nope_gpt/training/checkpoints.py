"""Checkpoints: `step-N/` directories that are models, with what resuming needs beside.

A checkpoint holds the published files (config.json, model.safetensors, the tokenizer),
`optimizer.safetensors`, for tuning `adapter.safetensors`, and `state.json`. Nothing is
pickled, and nothing depends on the number of ranks.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from nope_gpt.artifacts import FORMAT_VERSION, publish, write_json, write_tensors
from nope_gpt.errors import MissingError, NopeError
from nope_gpt.locating import checkpoints_in, newest_checkpoint, step_of

OPTIMIZER = "optimizer.safetensors"
ADAPTER = "adapter.safetensors"
STATE = "state.json"


@dataclass
class Progress:
    """How far a run has come; with the seed, all that the order of the samples needs."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


def save(
    directory: Path,
    progress: Progress,
    write_model: Callable[[Path], None],
    optimizer_state: dict[str, Tensor],
    keep: int,
) -> Path:
    """Write a checkpoint whole, then prune the others.

    Args:
        directory: Of the checkpoints.
        progress: How far the run has come.
        write_model: Writes the model's files into a directory.
        optimizer_state: By the names of `optimizer_state`.
        keep: Checkpoints to keep, at least 2.

    Raises:
        CapacityError: The disk is full; the older checkpoints are whole.
    """
    path = directory / f"step-{progress.step}"
    manifest: dict[str, Any] = {
        "kind": "checkpoint",
        "format_version": FORMAT_VERSION,
        "step": progress.step,
    }
    with publish(path, manifest=manifest, overwrite=True) as temporary:
        write_model(temporary)
        write_tensors(temporary / OPTIMIZER, optimizer_state)
        write_json(temporary / STATE, asdict(progress))
    prune(directory, progress.step, keep)
    return path


def prune(directory: Path, step: int, keep: int) -> None:
    """Remove all but the newest checkpoints up to a step, and those of an abandoned future.

    What lies beyond the step is damaged, or the run would have gone on from there.
    """
    found = sorted(checkpoints_in(directory), key=step_of)
    past = [path for path in found if step_of(path) <= step]
    for path in (*past[:-keep], *found[len(past) :]):
        shutil.rmtree(path)


def newest(directory: Path) -> Path | None:
    """The newest valid checkpoint, or None where there is none at all.

    Raises:
        MissingError: There are some, and all are damaged.
    """
    if not checkpoints_in(directory):
        return None
    return newest_checkpoint(directory)


def read_progress(checkpoint: Path) -> Progress:
    """How far the run had come."""
    return Progress(**json.loads((checkpoint / STATE).read_text(encoding="utf-8")))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the optimizer or the adapter of a checkpoint."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise MissingError("this checkpoint cannot be resumed from", where=str(path)) from None
    except SafetensorError as error:
        raise NopeError(f"this is not a whole safetensors file: {error}", where=str(path)) from None


def optimizer_state(model: nn.Module, optimizers: list[Optimizer]) -> dict[str, Tensor]:
    """The optimizers' tensors, each by the name of its parameter and its own."""
    names: dict[Tensor, str] = {weight: name for name, weight in model.named_parameters()}
    return {
        f"{names[weight]}/{key}": torch.as_tensor(value).detach().cpu().contiguous()
        for optimizer in optimizers
        for weight, values in optimizer.state.items()
        for key, value in values.items()
        if value is not None
    }


def load_optimizer_state(
    model: nn.Module, optimizers: list[Optimizer], tensors: dict[str, Tensor]
) -> None:
    """Put back what `optimizer_state` gave.

    Raises:
        NopeError: The tensors are another optimizer's or another model's.
    """
    weights = dict(model.named_parameters())
    owners: dict[Tensor, Optimizer] = {
        weight: optimizer
        for optimizer in optimizers
        for group in optimizer.param_groups
        for weight in group["params"]
    }
    # A fused optimizer counts its steps where its weights are, any other on the CPU.
    fused = {
        weight
        for optimizer in optimizers
        for group in optimizer.param_groups
        for weight in group["params"]
        if group.get("fused")
    }
    state: dict[Tensor, dict[str, Tensor]] = {weight: {} for weight in owners}
    for name, tensor in tensors.items():
        parameter, _, key = name.rpartition("/")
        if parameter not in weights or weights[parameter] not in owners:
            raise NopeError(
                f"the optimizer's state has {name}, and this run trains no such parameter",
                hint="resume with the settings the run was started with",
            )
        weight = weights[parameter]
        on_device = tensor.dim() > 0 or weight in fused
        state[weight][key] = tensor.to(weight.device) if on_device else tensor
    if any(not values for values in state.values()):
        raise NopeError("the optimizer's state is of another optimizer or incomplete")
    for tensor, values in state.items():
        owners[tensor].state[tensor] = values
