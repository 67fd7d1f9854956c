"""Weights that several ranks hold a part of, seen by their part and as a whole.

FSDP2 gives every rank some rows of each weight. What an optimizer needs of a whole matrix
goes through here; a weight that is whole already passes unchanged.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor


def part(tensor: Tensor) -> Tensor:
    """The rows that this rank holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All rows, on every rank; all ranks must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """Of a whole tensor, the rows that this rank holds of a weight."""
    if not isinstance(like, DTensor):
        return tensor
    sharded = distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
    return sharded.to_local()


def as_part(rows: Tensor, like: Tensor) -> Tensor:
    """Mark rows as the part of a tensor that has as many as a weight."""
    if not isinstance(like, DTensor):
        return rows
    return DTensor.from_local(
        rows,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=torch.Size((like.size(0), *rows.shape[1:])),
        stride=rows.stride(),
    )


def total(partial: Tensor, like: Tensor) -> Tensor:
    """The sum, over the ranks that share a weight, of what each computed from its rows."""
    if isinstance(like, DTensor):
        for dimension, placement in enumerate(like.placements):
            if isinstance(placement, Shard):
                dist.all_reduce(partial, group=like.device_mesh.get_group(dimension))
    return partial
