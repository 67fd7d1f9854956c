"""The state of a run as plain tensors by name, whatever the ranks share, and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from nope_gpt.errors import NopeError
from nope_gpt.model import NoPEGPT

WHOLE = StateDictOptions(full_state_dict=True)
PARTLY = StateDictOptions(full_state_dict=True, strict=False)
GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)

Tensors = dict[str, Tensor]


def gathered(model: NoPEGPT, optimizers: list[Optimizer]) -> tuple[Tensors, Tensors]:
    """Copy the trained weights and the optimizers' tensors into the first rank's memory.

    All ranks must ask. The optimizers' tensors are named by their weight and their own
    name; on the other ranks both are empty.
    """
    weights = get_model_state_dict(model, options=GATHERED)
    states: Any = get_optimizer_state_dict(model, optimizers, options=GATHERED)
    return copied(weights), copied(flattened(states.get("state", {})))


def put_back_weights(model: NoPEGPT, weights: dict[str, Any]) -> None:
    """Give a model some of the weights that `gathered` took; all ranks must, and have them."""
    set_model_state_dict(model, weights, options=PARTLY)


def put_back_optimizers(model: NoPEGPT, optimizers: list[Optimizer], tensors: Tensors) -> None:
    """Give the optimizers what `gathered` took of them; all ranks must, and have it all.

    Raises:
        NopeError: The tensors are another optimizer's or another model's.
    """
    now: Any = get_optimizer_state_dict(model, optimizers, options=WHOLE)
    expected = {name: value.shape for name, value in flattened(now["state"]).items()}
    if expected and expected != {name: value.shape for name, value in tensors.items()}:
        differing = sorted(expected.keys() ^ tensors.keys()) or sorted(expected)
        raise NopeError(
            f"the optimizer's state is not of this run: they differ in {differing[0]}",
            hint="resume with the settings the run was started with",
        )
    states: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        weight, _, key = name.rpartition("/")
        states.setdefault(weight, {})[key] = tensor
    state: Any = {"state": states, "param_groups": now["param_groups"]}
    set_optimizer_state_dict(model, optimizers, state, options=WHOLE)


def flattened(states: dict[str, Any]) -> dict[str, Any]:
    """One name for each tensor, WEIGHT/KEY."""
    return {
        f"{weight}/{key}": torch.as_tensor(value)
        for weight, values in states.items()
        for key, value in values.items()
        if value is not None
    }


def copied(tensors: dict[str, Any]) -> Tensors:
    """Copies that training does not write to."""
    return {name: value.detach().clone().contiguous() for name, value in tensors.items()}
