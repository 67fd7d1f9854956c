"""Reading the next step's samples while this one computes."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from nope_gpt.data.batches import Batch, Batches
from nope_gpt.device import Ranks

T = TypeVar("T")


class Prefetcher:
    """Reads one step ahead, in a thread.

    Args:
        batches: Where micro-batches come from.
        ranks: This process among its peers.
        device: What the batches are for; for a GPU they go into pinned memory.
    """

    def __init__(self, batches: Batches, ranks: Ranks, device: torch.device) -> None:
        self.batches = batches
        self.ranks = ranks
        self.pinned = device.type == "cuda"
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="samples")
        self.ahead: tuple[int, Future[list[Batch]]] | None = None

    def micro_batches(self, step: int) -> list[Batch]:
        """The micro-batches of this rank in a step; begins to read those of the next."""
        now = self.ahead[1] if self.ahead and self.ahead[0] == step else None
        batches = now.result() if now else self.read(step)
        self.ahead = (step + 1, self.thread.submit(self.read, step + 1))
        return batches

    def holdout(self, limit: int) -> Iterator[Batch]:
        """The hold-out, each micro-batch read while the one before is evaluated."""
        source = self.batches.holdout(limit, self.ranks.rank, self.ranks.world_size)
        ahead = self.thread.submit(next, source, None)
        while batch := ahead.result():
            ahead = self.thread.submit(next, source, None)
            yield self.placed(batch)

    def read(self, step: int) -> list[Batch]:
        """Read and place the micro-batches of a step."""
        found = self.batches.micro_batches(step, self.ranks.rank, self.ranks.world_size)
        return [self.placed(batch) for batch in found]

    def placed(self, batch: Batch) -> Batch:
        """A batch in memory that a GPU can copy from while it computes."""
        return batch.pinned() if self.pinned else batch
