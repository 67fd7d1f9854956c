"""Several processes as one run: PyTorch's own distribution, started by torchrun."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nope_gpt.device import Ranks
from nope_gpt.errors import UsageError

T = TypeVar("T")


@contextmanager
def process_group(ranks: Ranks, device: torch.device) -> Iterator[None]:
    """Join the other ranks, if there are any: nccl on GPUs, gloo elsewhere."""
    if ranks.world_size == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
        dist.barrier()  # No rank takes the group down while another still works in it.
    finally:
        dist.destroy_process_group()


def refuse_uneven(micro_batches: int, ranks: Ranks) -> None:
    """Refuse a step whose micro-batches the ranks cannot share evenly.

    Raises:
        UsageError: Gives the nearest numbers that they can.
    """
    if micro_batches % ranks.world_size:
        below = micro_batches // ranks.world_size * ranks.world_size
        near = [str(count) for count in (below, below + ranks.world_size) if count]
        raise UsageError(
            f"--gradient-accumulation-steps is {micro_batches}, which {ranks.world_size} ranks "
            f"cannot share evenly",
            hint=f"--gradient-accumulation-steps {' or '.join(near)}",
        )


def distribute(model: nn.Module, ranks: Ranks, device: torch.device) -> nn.Module:
    """Have every rank hold the model and average the gradients (DDP)."""
    if ranks.world_size == 1:
        return model
    return DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
    )


def without_sync(network: nn.Module, is_last: bool) -> AbstractContextManager[None]:
    """Leave the gradients unaveraged until the last micro-batch of a step."""
    if is_last or not isinstance(network, DistributedDataParallel):
        return nullcontext()
    return network.no_sync()


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


def anywhere(flag: int, device: torch.device) -> int:
    """The largest flag of any rank, so that all act alike."""
    if not dist.is_initialized():
        return flag
    value = torch.tensor(flag, device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return int(value)
