"""Several processes as one run: PyTorch's own distribution, started by torchrun."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from nope_gpt.config import TrainingConfig
from nope_gpt.device import Ranks
from nope_gpt.errors import CapacityError, UsageError
from nope_gpt.model import NoPEGPT
from nope_gpt.training.watchdog import Watchdog

T = TypeVar("T")

GATHERED_PARAMETERS = 2_000_000_000
"""Beyond this the first rank's memory is too small for the weights and the optimizer of all."""


@contextmanager
def process_group(ranks: Ranks, device: torch.device, timeout: float) -> Iterator[Watchdog]:
    """Join the other ranks, if there are any: nccl on GPUs, gloo elsewhere.

    Args:
        ranks: This process among its peers.
        device: Of this rank.
        timeout: Seconds that a rank may stand still.

    Raises:
        NopeError: A rank is gone; names it.
    """
    if ranks.world_size == 1:
        yield Watchdog.idle()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, rank, world_size = next(rendezvous("env://"))
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=PrefixStore("group", store),
        rank=rank,
        world_size=world_size,
        # The watchdog is to speak first, since it can name the rank.
        timeout=timedelta(seconds=2 * timeout + 60),
    )
    with Watchdog(PrefixStore("watchdog", store), ranks, timeout) as watchdog:
        yield watchdog
        dist.barrier()  # No rank takes the group down while another still works in it.
    dist.destroy_process_group()


def refuse_impossible(config: TrainingConfig, ranks: Ranks) -> None:
    """Refuse what this number of ranks cannot do.

    Raises:
        UsageError: Sharding needs more ranks, or they cannot share a step's micro-batches
            evenly; gives the nearest numbers that they can.
    """
    level = config.ddp_sharding_level
    if ranks.world_size == 1 and (level or config.hybrid_sharding):
        flag = f"--ddp-sharding-level is {level}, which" if level else "--hybrid-sharding"
        raise UsageError(
            f"{flag} needs more than one rank",
            hint=f"nope {config.command} --gpus 2, or leave the flag out",
        )
    if config.hybrid_sharding and level == 0:
        raise UsageError("--hybrid-sharding shards, and --ddp-sharding-level 0 does not")
    micro_batches = config.gradient_accumulation_steps
    if micro_batches % ranks.world_size:
        flag, size, what = "--gradient-accumulation-steps", 1, f"{micro_batches}, which"
        if tokens := getattr(config, "tokens_per_step", None):
            flag, size = "--tokens-per-step", tokens // micro_batches
            what = f"{tokens:,}, or {micro_batches} batches, which"
        below = micro_batches // ranks.world_size * ranks.world_size
        near = [str(size * count) for count in (below, below + ranks.world_size) if count]
        raise UsageError(
            f"{flag} is {what} {ranks.world_size} ranks cannot share evenly",
            hint=f"{flag} {' or '.join(near)}",
        )


def distribute(
    model: NoPEGPT, config: TrainingConfig, ranks: Ranks, device: torch.device
) -> nn.Module:
    """Have the ranks share a model and average its gradients: by DDP, or by FSDP2.

    Returns:
        What to call for a forward pass. The model itself keeps its names.

    Raises:
        CapacityError: The model is too large for the first rank to gather.
    """
    if ranks.world_size == 1:
        return model
    if config.sharding == 0:
        return DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
        )
    count = sum(weight.numel() for weight in model.parameters())
    if count > GATHERED_PARAMETERS:
        raise CapacityError(
            f"the model has {count:,} parameters, and a checkpoint is gathered on the first "
            f"rank, which is meant for {GATHERED_PARAMETERS:,} at most",
            hint="choose a smaller --embedding-dimensions or --num-hidden-layers",
        )
    mesh = device_mesh(ranks, device, hybrid=config.hybrid_sharding)
    for layer in model.decoder.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=config.sharding == 3)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    return model


def described(config: TrainingConfig, world_size: int) -> str:
    """How the ranks share the model, in words."""
    shared = {
        0: "each with the whole model (DDP)",
        2: "sharing the optimizer (FSDP2)",
        3: "sharing weights, gradients and optimizer (FSDP2)",
    }[config.sharding]
    return f"{world_size}, {shared}{', within each node' if config.hybrid_sharding else ''}"


def device_mesh(ranks: Ranks, device: torch.device, *, hybrid: bool) -> DeviceMesh:
    """All ranks in a row, or for hybrid sharding the nodes by the ranks of each."""
    if not hybrid:
        return init_device_mesh(device.type, (ranks.world_size,), mesh_dim_names=("shard",))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world_size))
    shape = (ranks.world_size // local, local)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


def synchronizing(
    network: nn.Module, config: TrainingConfig, is_last: bool
) -> AbstractContextManager[None]:
    """Leave the gradients unaveraged until the last micro-batch of a step.

    At level 3 no rank has the memory for all of them, so they are shared at once.
    """
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(is_last or config.sharding == 3)
    if isinstance(network, DistributedDataParallel) and not is_last:
        return network.no_sync()
    return nullcontext()


def shared(value: T) -> T:
    """Rank 0's value, on every rank."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def total(value: Tensor) -> Tensor:
    """The sum of a tensor over all ranks."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def total_of(number: float, device: torch.device) -> float:
    """The sum of a number over all ranks."""
    if not dist.is_initialized():
        return number
    return float(total(torch.tensor(number, dtype=torch.float64, device=device)))


def largest(numbers: list[int], device: torch.device) -> list[int]:
    """The largest of each number of all ranks, so that all act alike."""
    if not dist.is_initialized():
        return numbers
    values = torch.tensor(numbers, device=device)
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return [int(value) for value in values]
