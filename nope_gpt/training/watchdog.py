"""Ends a run of several ranks when one of them is gone or stands still, and says which.

A collective operation waits for all ranks, so one that is gone stops the others without a
word. Each rank therefore counts in the store that the ranks met in: a thread counts that
the process lives, the training loop counts what it has done.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from torch._C._distributed_c10d import Store
from torch.distributed import DistError

from nope_gpt.device import Ranks
from nope_gpt.errors import NopeError


class Watchdog:
    """Counts for this rank, and reads what the others count.

    Args:
        store: That all ranks can reach.
        ranks: This process among its peers.
        timeout: Seconds without progress before the run ends.
    """

    def __init__(self, store: Store | None, ranks: Ranks, timeout: float) -> None:
        self.store = store
        self.ranks = ranks
        self.timeout = timeout
        self.interval = min(timeout / 5, 1.0)
        self.last = time.monotonic()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.give_up: Callable[[NopeError], None] = lambda _: None
        """What to do with the error before this process ends."""

    @classmethod
    def idle(cls) -> Self:
        """For a run of one rank: there is nobody to watch."""
        return cls(None, Ranks(0, 0, 1), 0.0)

    def __enter__(self) -> Self:
        self.beat()
        self.thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None and self.store is not None and not self.done.is_set():
            self.store.add(f"left/{self.ranks.rank}", 1)
        self.done.set()

    def beat(self) -> None:
        """Count that the training loop has done something."""
        self.last = time.monotonic()
        if self.store is not None:
            self.store.add(f"done/{self.ranks.rank}", 1)

    def watch(self) -> None:
        """Count that this process lives; end it when the training loop stands still."""
        assert self.store is not None
        while not self.done.wait(self.interval):
            self.store.add(f"alive/{self.ranks.rank}", 1)
            if time.monotonic() - self.last > self.timeout:
                self.give_up(self.verdict(f"nothing has moved for {self.timeout:g} seconds"))
                os._exit(1)

    def verdict(self, what: str) -> NopeError:
        """Name the ranks that are gone or stand still."""
        names = ", ".join(map(str, self.missing()))
        return NopeError(
            f"{what}: rank {names} of {self.ranks.world_size} is gone or stands still"
            if names
            else f"{what}, and no rank stands out",
            where=f"rank {self.ranks.rank}",
            hint="the same command with --resume goes on from the last checkpoint",
        )

    def missing(self) -> list[int]:
        """The ranks whose process has stopped, or else those whose loop has done least."""
        others = [rank for rank in range(self.ranks.world_size) if rank != self.ranks.rank]
        before = {rank: self.count("alive", rank) for rank in others}
        time.sleep(4 * self.interval)
        stopped = [
            rank
            for rank in others
            if self.count("alive", rank) == before[rank] and not self.count("left", rank)
        ]
        if stopped:
            return stopped
        work = {rank: self.count("done", rank) for rank in (*others, self.ranks.rank)}
        least = min(work.values())
        behind = [rank for rank, count in work.items() if count == least]
        return behind if len(behind) < len(work) else []

    def count(self, name: str, rank: int) -> int:
        assert self.store is not None
        return int(self.store.add(f"{name}/{rank}", 0))

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Say which rank is gone when an operation with all of them fails.

        Raises:
            NopeError: Names the rank.
        """
        try:
            yield
        except RuntimeError as error:
            if self.store is None or not is_broken_connection(error):
                raise
            raise self.verdict("the connection to another rank broke") from error


def is_broken_connection(error: RuntimeError) -> bool:
    """Whether an error is of a collective operation that lost a peer."""
    text = str(error)
    return isinstance(error, DistError) or "gloo" in text.lower() or "NCCL" in text
