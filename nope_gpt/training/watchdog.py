"""Ends a run of several ranks when one of them is gone or stands still, and says which.

A collective operation waits for all ranks, so one that is gone stops the others without a
word. A thread of each rank therefore counts, in the store that the ranks met in, that its
process lives, and what the training loop has done.
"""

from __future__ import annotations

import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Self

from torch._C._distributed_c10d import Store
from torch.distributed import DistError

from nope_gpt.device import Ranks
from nope_gpt.errors import NopeError

LONGEST_CALL = 10.0
"""Seconds to wait for the store when a run is over."""


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
        self.beats = self.told = 0
        self.is_over = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)

    @classmethod
    def idle(cls) -> Self:
        """For a run of one rank: there is nobody to watch."""
        return cls(None, Ranks(0, 0, 1), 0.0)

    def __enter__(self) -> Self:
        assert self.store is not None
        self.store.set(f"place/{self.ranks.rank}", f"{platform.node()} {os.getpid()}")
        self.beat()
        self.thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.is_over.set()
        if kind is not None and self.store is not None:
            with suppress(RuntimeError):  # The store is gone with the process that held it.
                self.store.add(f"failed/{self.ranks.rank}", 1)
        if self.thread.is_alive():  # A thread that is in the store as Python ends aborts it.
            self.thread.join(LONGEST_CALL)

    def beat(self) -> None:
        """Note that the training loop has done something."""
        self.last = time.monotonic()
        self.beats += 1

    def tell(self) -> None:
        """Let the others know that this process lives, and what it has done."""
        assert self.store is not None
        beats = self.beats
        self.store.add(f"alive/{self.ranks.rank}", 1)
        self.store.add(f"done/{self.ranks.rank}", beats - self.told)
        self.told = beats

    def watch(self) -> None:
        """Count for this process; end it when the training loop stands still, or its launcher
        is gone.
        """
        try:
            while not self.is_over.wait(self.interval):
                self.tell()
                if time.monotonic() - self.last > self.timeout:
                    self.end(self.verdict(f"nothing has moved for {self.timeout:g} seconds"))
        except RuntimeError:
            if self.is_over.is_set():
                return
            lost = NopeError("the process that started the ranks is gone", where=self.name)
            print(f"error: {lost}", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGTERM)  # The training loop ends in a checkpoint.
            if not self.is_over.wait(self.timeout):
                self.end(lost)

    def end(self, error: NopeError) -> None:
        """End the process: the training loop waits in an operation that no exception reaches."""
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(error.exit_code)

    @property
    def name(self) -> str:
        return f"rank {self.ranks.rank}"

    def verdict(self, what: str) -> NopeError:
        """Name the ranks that failed, are gone or stand still."""
        others = [rank for rank in range(self.ranks.world_size) if rank != self.ranks.rank]
        before = {rank: self.count("alive", rank) for rank in others}
        for _ in range(4):
            self.tell()
            time.sleep(self.interval)
        failed = [rank for rank in others if self.count("failed", rank)]
        silent = [rank for rank in others if self.count("alive", rank) == before[rank]]
        work = {rank: self.count("done", rank) for rank in (*others, self.ranks.rank)}
        behind = [rank for rank, count in work.items() if count < max(work.values())]
        self.end_silent([rank for rank in silent if rank not in failed])
        for ranks, state in (
            (failed, "failed"),
            (silent, "is gone or stopped"),
            (behind, "stands still"),
        ):
            if ranks:
                names = ", ".join(map(str, ranks))
                what = f"{what}: rank {names} of {self.ranks.world_size} {state}"
                break
        return NopeError(
            what,
            where=self.name,
            hint="the same command with --resume goes on from the last checkpoint",
        )

    def end_silent(self, ranks: list[int]) -> None:
        """End those of this machine that are stopped, since they hear no other signal: what
        started them would wait for them in vain.
        """
        assert self.store is not None
        for rank in ranks:
            host, _, process = self.store.get(f"place/{rank}").decode().rpartition(" ")
            if host == platform.node() and hasattr(signal, "SIGKILL"):
                with suppress(OSError):
                    os.kill(int(process), signal.SIGKILL)

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
