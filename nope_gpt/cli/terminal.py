"""What people see: messages and progress on stderr, results on stdout."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from rich.console import Console

from nope_gpt.errors import NopeError

if TYPE_CHECKING:
    from rich.progress import Progress

QUIET_SECONDS = 10.0
"""Between two lines of progress where there is no terminal."""


STEERING = dict.fromkeys((*range(32), *range(127, 160)), "�")


def harmless(text: str) -> str:
    """A text in which nothing steers a terminal but new lines and tabs."""
    return text.translate({key: value for key, value in STEERING.items() if key not in (9, 10)})


def talk() -> Console:
    """The console on stderr, for everything that is not a result."""
    return Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)


def say(text: str, style: str | None = None) -> None:
    """Print a line on stderr, without markup."""
    talk().print(harmless(text), style=style, markup=False)


def say_of_ranks(text: str) -> None:
    """The same for what every one of several ranks would say: the first one says it."""
    if os.environ.get("RANK", "0") == "0":
        say(text)


def result(text: str, value: dict[str, Any], as_json: bool) -> None:
    """Print a result on stdout, as text or as one JSON object."""
    typer.echo(json.dumps(value, ensure_ascii=False) if as_json else text)


def result_of_ranks(text: str, value: dict[str, Any], as_json: bool) -> None:
    """The same for what several ranks have made: the first one prints it."""
    if os.environ.get("RANK", "0") == "0":
        result(text, value, as_json)


def fail(error: NopeError) -> NoReturn:
    """Print an error in its three parts and exit with its code, quickly and quietly.

    Of several ranks the first prints it all, any other a line, as most errors are of all.
    """
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        hint = f"; next: {error.hint}" if error.hint else ""
        say(f"rank {rank}: {error.what}{hint}", style="dim")
        sys.exit(error.exit_code)
    talk().print("[bold red]error:[/] ", end="")
    say(error.what)
    if error.where:
        say(f"  where: {error.where}", style="dim")
    if error.hint:
        say(f"  next:  {error.hint}")
    sys.exit(error.exit_code)


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """Show that something is going on; one plain line where there is no terminal."""
    console = talk()
    if console.is_terminal:
        with console.status(text):
            yield
    else:
        console.print(text, markup=False)
        yield


class Pace:
    """Says when it is time for another plain line."""

    def __init__(self, seconds: float = QUIET_SECONDS) -> None:
        self.seconds = seconds
        self.last = time.monotonic()

    def is_due(self) -> bool:
        """Whether enough time has passed since the last time."""
        now = time.monotonic()
        if now - self.last < self.seconds:
            return False
        self.last = now
        return True


def progress_bar(console: Console) -> Progress:
    """A bar with room for a line of figures, and the time that is left."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(compact=True),
        console=console,
        transient=True,
    )


def is_interactive() -> bool:
    """Whether a person is typing and reading."""
    return sys.stdin.isatty() and sys.stdout.isatty()
