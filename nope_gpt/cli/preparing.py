"""A preparation as people see it: what it will take, and how far it has come."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Self

from nope_gpt.amounts import format_bytes, format_seconds
from nope_gpt.cli.terminal import QUIET_SECONDS, Pace, progress_bar, say, talk

if TYPE_CHECKING:
    from nope_gpt.data.planning import Estimate
    from nope_gpt.data.schedule import Progress


def estimated(needed: Estimate) -> str:
    """An estimate in lines."""
    lines = [
        f"files      {needed.files:,}",
        f"download   {format_bytes(needed.download_bytes)}",
        f"text       about {format_bytes(needed.text_bytes)}, {needed.tokens:,} tokens",
        f"disk       about {format_bytes(needed.disk_bytes)}",
        f"time       about {format_seconds(needed.seconds)} of encoding, beside the download",
    ]
    return "\n".join(lines)


class PreparationWatcher:
    """Shows how far the encoding is: a bar on a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        self.console = talk()
        self.pace = Pace(0.1 if self.console.is_terminal else QUIET_SECONDS)
        self.bar = progress_bar(self.console)
        self.task = self.bar.add_task("prepare", total=None, figures="")
        self.started = 0.0
        self.first_done = 0
        self.num_said = 0

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def __call__(self, progress: Progress) -> None:
        for note in progress.notes[self.num_said :]:
            self.bar.console.print(note, style="yellow", markup=False)
        self.num_said = len(progress.notes)
        if not self.started:
            self.started, self.first_done = time.perf_counter(), progress.done
        if not self.pace.is_due():
            return
        if self.console.is_terminal:
            total = progress.size or None
            figures = self.figures(progress)
            self.bar.update(self.task, completed=progress.done, total=total, figures=figures)
        else:
            say(f"{self.figures(progress)}{self.left(progress)}")

    def figures(self, progress: Progress) -> str:
        """Files, documents, tokens and speeds."""
        seconds = time.perf_counter() - self.started
        parts = [f"{progress.files_done:,}/{progress.files:,} files"]
        if progress.downloaded < progress.download_size:
            got, size = format_bytes(progress.downloaded), format_bytes(progress.download_size)
            parts.append(f"{got} of {size} downloaded")
        parts.append(f"{progress.documents:,} documents")
        parts.append(f"{progress.tokens:,} tokens")
        parts.append(f"{progress.tokens / max(seconds, 1e-9):,.0f} tok/s")
        return " · ".join(parts)

    def left(self, progress: Progress) -> str:
        """The share that is done and the time that is left."""
        done = progress.done - self.first_done
        if not progress.size or done <= 0:
            return ""
        seconds = (time.perf_counter() - self.started) * (progress.size - progress.done) / done
        return f" · {progress.done / progress.size:.0%} · {format_seconds(seconds)} left"
