"""Files fetched ahead, spans encoded by all processes, units finished: in any order of time.

The order of the results is that of the files, whoever is done first.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import (
    FIRST_COMPLETED,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from nope_gpt.data.reading import Span
from nope_gpt.data.sources import File, Source, refuse_changed
from nope_gpt.data.staging import Staging
from nope_gpt.data.units import (
    Recipe,
    Tally,
    Unit,
    documents_file,
    encode_span,
    finish_unit,
    stream_files,
)
from nope_gpt.errors import CapacityError
from nope_gpt.files.writing import sync, writing

FILES_AHEAD = 3
"""Groups of files that are fetched before they are needed."""

MOST_PROCESSES = 61
"""That Windows can wait for at once."""

TICK = 0.2
"""Seconds between two looks at signals and progress."""


@dataclass(frozen=True)
class Group:
    """Files that are fetched and encoded together: one large file, or several small ones."""

    index: int
    source: Source
    files: tuple[File, ...]

    @property
    def name(self) -> str:
        return f"{self.index:05d}"

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


@dataclass
class OpenUnit:
    """A unit that is being encoded."""

    unit: Unit
    works: list[Path]
    tallies: dict[int, Tally] = field(default_factory=dict)


@dataclass
class OpenGroup:
    """A group some of whose units are not finished."""

    group: Group
    units: list[str]
    missing: set[str]


@dataclass
class Progress:
    """How far a preparation is.

    Attributes:
        size: Bytes of all files.
        done: Bytes of the files, or their parts, that are encoded.
        download_size: Bytes to download.
        downloaded: Bytes that are here.
        notes: What has to be said, once each: what is being waited for, and why.
    """

    size: int = 0
    done: int = 0
    download_size: int = 0
    downloaded: int = 0
    files: int = 0
    files_done: int = 0
    documents: int = 0
    tokens: int = 0
    notes: list[str] = field(default_factory=list)


class Serial(Executor):
    """Runs everything at once, in this process: for corpora that are not worth another."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **more: Any) -> Future[Any]:
        """Run a function; its result is there when this returns."""
        future: Future[Any] = Future()
        try:
            future.set_result(function(*arguments, **more))
        except Exception as error:
            future.set_exception(error)
        return future


@contextmanager
def workers(count: int) -> Iterator[Executor]:
    """Processes that encode; with one, this one does.

    Raises:
        CapacityError: The system ended one of them.
    """
    if count == 1:
        yield Serial()
        return
    if sys.platform == "win32":
        count = min(count, MOST_PROCESSES)
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=start_worker)
    try:
        yield pool
    except BrokenProcessPool:
        raise CapacityError(
            "the system ended a worker process, probably for want of memory",
            hint=f"run the same command again with --num-dataset-processes {max(count // 2, 1)}; "
            "finished units are kept",
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def start_worker() -> None:
    """Leave interrupts to the parent, and end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


class Schedule:
    """Encodes groups of files into shards.

    Args:
        staging: Where everything is kept.
        recipe: How to encode.
        executor: Who does it.
        width: How many processes it has.
        fetch: Returns where a file lies, downloading it if need be.
        discard: Called with a file that is not needed any more.
        cancel: Called to end all downloads.
        plan: Makes the units of a group whose files are here.
        progress: Kept up to date.
        tick: Called several times a second; may raise to end the work.
        finish: Whether a unit becomes a shard at once, or when all are encoded.
    """

    def __init__(
        self,
        staging: Staging,
        recipe: Recipe,
        executor: Executor,
        width: int,
        *,
        fetch: Callable[[File], Path],
        discard: Callable[[File], None],
        cancel: Callable[[], None],
        plan: Callable[[Group, list[Path]], list[Unit]],
        progress: Progress,
        tick: Callable[[], None],
        finish: bool,
    ) -> None:
        self.staging = staging
        self.recipe = recipe
        self.executor = executor
        self.width = width
        self.fetch = fetch
        self.discard = discard
        self.cancel = cancel
        self.plan = plan
        self.progress = progress
        self.tick = tick
        self.finish = finish
        self.waiting: deque[Callable[[], None]] = deque()
        self.running: dict[Future[Any], Callable[[Any], None]] = {}

    def run(self, groups: list[Group]) -> None:
        """Encode groups; what is recorded is not done again.

        Raises:
            NopeError: A file is missing or damaged, or cannot be fetched.
        """
        ahead = deque(groups)
        fetching: deque[tuple[Group, list[Future[Path]]]] = deque()
        with ThreadPoolExecutor(max_workers=FILES_AHEAD) as fetchers:
            try:
                while ahead or fetching or self.waiting or self.running:
                    while ahead and len(fetching) < FILES_AHEAD:
                        group = ahead.popleft()
                        files = [fetchers.submit(self.fetch, file) for file in group.files]
                        fetching.append((group, files))
                    has_room = len(self.waiting) < self.width
                    if fetching and has_room and all(f.done() for f in fetching[0][1]):
                        group, files = fetching.popleft()
                        self.open_group(group, [file.result() for file in files])
                    self.advance({file for _, files in fetching for file in files})
            except BaseException:
                self.cancel()
                for _, files in fetching:
                    for file in files:
                        file.cancel()
                raise

    def advance(self, others: set[Future[Path]]) -> None:
        """Hand out work, and see to what is done; `others` may also end a wait."""
        while self.waiting and len(self.running) < 2 * self.width:
            self.waiting.popleft()()
        pending = {file for file in others if not file.done()}
        if not self.waiting or self.running or pending:
            done, _ = wait(pending | set(self.running), TICK, FIRST_COMPLETED)
            for future in done & set(self.running):
                self.running.pop(future)(future.result())
        self.tick()

    def submit(
        self, then: Callable[[Any], None], function: Callable[..., Any], *arguments: Any
    ) -> None:
        """Have something done when a process is free."""
        self.waiting.append(
            lambda: self.running.__setitem__(self.executor.submit(function, *arguments), then)
        )

    def open_group(self, group: Group, paths: list[Path]) -> None:
        """Begin the units of a group that are not finished."""
        units = self.plan(group, paths)
        todo = [unit for unit in units if not self.staging.has_unit(unit.record_name)]
        names = [unit.record_name for unit in units]
        opened = OpenGroup(group, names, {unit.record_name for unit in todo})
        total = sum(span.size for unit in units for span in unit.spans) or 1
        left = sum(span.size for unit in todo for span in unit.spans)
        self.progress.done += group.size * (total - left) // total
        for unit in todo:
            self.open_unit(unit, opened, group.size / total)
        if not opened.missing:
            self.close_group(opened)

    def open_unit(self, unit: Unit, group: OpenGroup, weight: float) -> None:
        """Begin a unit: hand out its spans."""
        directory = self.staging.work_of(unit.record_name)
        works = [directory / f"{index:04d}" for index in range(len(unit.spans))]
        opened = OpenUnit(unit, works)
        for index, span in enumerate(unit.spans):

            def encoded(tally: Tally, index: int = index, span: Span = span) -> None:
                opened.tallies[index] = tally
                self.progress.documents += tally.documents
                self.progress.tokens += tally.tokens
                self.progress.done += int(span.size * weight)
                if len(opened.tallies) == len(works):
                    self.encoded(opened, group)

            self.submit(encoded, encode_span, span, works[index], self.recipe)

    def encoded(self, opened: OpenUnit, group: OpenGroup) -> None:
        """See to a unit all of whose spans are encoded.

        Raises:
            NopeError: A file has changed, so that the unit is not what its name says.
        """
        refuse_changed(group.group.files)
        total = Tally()
        for index in range(len(opened.works)):
            total.add(opened.tallies[index])
        counts = {"text_bytes": total.text_bytes, "cut": total.cut, "refused": total.refused}
        record = {
            "unit": opened.unit.record_name,
            "source": opened.unit.source,
            "content": opened.unit.content,
            "works": [str(work.relative_to(self.staging.work)) for work in opened.works],
            "documents": total.documents,
            "tokens": total.tokens,
            **counts,
        }
        if self.finish:
            self.finish_unit(opened.unit, record, lambda: self.close_unit(record, group))
        else:
            self.keep_works(opened.works, opened.unit.content)
            self.staging.keep_unit(record)
            self.close_unit(record, group)

    def keep_works(self, works: list[Path], content: str) -> None:
        """Flush work files to the disk, since they are what is left of the work."""
        with writing(works[0].parent):
            for work in works:
                for file in (documents_file(work), *chain(*stream_files(work, content))):
                    sync(file)
            sync(works[0].parent)

    def finish_unit(
        self,
        unit: Unit,
        record: dict[str, Any],
        then: Callable[[], None],
        dropped: Any = None,
    ) -> None:
        """Turn a unit's work files into its shard, and record it."""
        works = [self.staging.work / work for work in record["works"]]
        directory = self.staging.dataset(unit.content)

        def finished(result: dict[str, Any]) -> None:
            self.staging.keep_unit(record | result)
            if self.finish:
                shutil.rmtree(works[0].parent)
            else:  # The list of documents stays, for the units that are not finished yet.
                for file in chain(*(chain(*stream_files(work, unit.content)) for work in works)):
                    file.unlink()
            then()

        dropped = np.empty(0, np.int64) if dropped is None else dropped
        self.submit(finished, finish_unit, unit, works, directory, self.recipe, dropped)
        self.waiting.rotate(1)  # Ahead of the next spans, so that units do not pile up.

    def close_unit(self, record: dict[str, Any], group: OpenGroup) -> None:
        """See to a group one more unit of which is finished."""
        group.missing.discard(record["unit"])
        if not group.missing:
            self.close_group(group)

    def close_group(self, opened: OpenGroup) -> None:
        """Record a group, after which its files are not needed."""
        self.staging.keep_group(opened.group.name, opened.units)
        self.progress.files_done += len(opened.group.files)
        for file in opened.group.files:
            self.discard(file)

    def drain(self) -> None:
        """See to everything that was handed out."""
        while self.waiting or self.running:
            self.advance(set())
