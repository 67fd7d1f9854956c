"""The command line: one thin file for each command, and the only place that knows a terminal."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time

import typer

from nope_gpt import __version__
from nope_gpt.cli import (
    chat,
    doctor,
    evaluate,
    export,
    generate,
    inspect,
    prepare,
    pretrain,
    quickstart,
    size,
    tune,
)
from nope_gpt.cli.options import friendly, normalize

app = typer.Typer(
    name="nope",
    help="Train, tune, understand and run NoPE GPT, a small language model without "
    "positional embeddings.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

SPINS = "1000"
"""How often a thread of torch's on Linux looks whether the others have come before it sleeps.
By default it looks for milliseconds, and where another program wants its core as well, the
one that all wait for does not get it: ten times as slow, hundreds of times a token."""

MAKE = "Make a model"
USE = "Use a model"

app.command("quickstart", rich_help_panel=MAKE)(quickstart.command)
app.command("prepare", rich_help_panel=MAKE)(prepare.command)
app.command("inspect", rich_help_panel=USE)(inspect.command)
app.command("pretrain", rich_help_panel=MAKE)(pretrain.command)
app.command("tune", rich_help_panel=MAKE)(tune.command)
app.command("export", rich_help_panel=MAKE)(export.command)
app.command("generate", rich_help_panel=USE)(generate.command)
app.command("chat", rich_help_panel=USE)(chat.command)
app.command("eval", rich_help_panel=USE)(evaluate.command)
app.command("size", rich_help_panel=USE)(size.command)
app.command("doctor", rich_help_panel=USE)(doctor.command)


def show_version(wanted: bool) -> None:
    """Print the version and leave."""
    if wanted:
        typer.echo(f"nope-gpt {__version__}")
        raise typer.Exit


@app.callback()
def nope(
    version: bool = typer.Option(
        False, "--version", callback=show_version, is_eager=True, help="Show the version and exit."
    ),
) -> None:
    """Text to shards to a base model to an assistant, and out into other tools."""


def main(arguments: list[str] | None = None) -> None:
    """Run `nope` with the arguments of the process, old spellings included."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            settle(stream)
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # Read when torch is imported.
    with friendly():
        arguments = normalize(sys.argv[1:] if arguments is None else arguments)
    try:
        app(args=arguments, prog_name="nope")
    except SystemExit as ended:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and type(ended.code) is int:
            leave(ended.code)
        raise


def settle(stream: io.TextIOWrapper) -> None:
    """Write to files and pipes the same bytes on every system, in UTF-8 as all that is read."""
    if not stream.isatty() and "PYTHONIOENCODING" not in os.environ:
        stream.reconfigure(encoding="utf-8", errors=stream.errors, newline="\n")
    elif stream.encoding.lower() != "utf-8":
        stream.reconfigure(errors="replace")  # No character is worth an end half-way.


GRACE = 1.0
"""Seconds in which the first rank, which speaks to people, can say what is wrong: torchrun ends all
others once one has failed."""


def leave(code: int) -> None:
    """End a rank, whose work is done and written, at once.

    On Python's own way out the threads of torch's process groups can abort it, and torchrun
    would take a run that ended well, or with a code of its own, for one that crashed.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # Whoever read it is gone.
            stream.flush()
    if code and os.environ.get("RANK") != "0":
        time.sleep(GRACE)
    os._exit(code)
