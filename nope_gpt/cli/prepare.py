"""`nope prepare`."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Self

from nope_gpt.amounts import format_bytes, format_seconds
from nope_gpt.cli.datasets import report, show_samples
from nope_gpt.cli.options import JSON, argument, configured, option
from nope_gpt.cli.terminal import (
    QUIET_SECONDS,
    Pace,
    progress_bar,
    result,
    say,
    talk,
)
from nope_gpt.config import PrepareConfig

if TYPE_CHECKING:
    from nope_gpt.data.commit import Prepared
    from nope_gpt.data.planning import Estimate
    from nope_gpt.data.schedule import Progress

SOURCES = argument(
    "sources",
    list[str],
    "Files (.txt, .md, .jsonl, .parquet), directories of them, `-` for standard input, "
    "`python-docs`, which needs no network, or data sets of the Hub: `fineweb`, `smoltalk`, "
    "`ultrafeedback`, or an id such as ORG/NAME.",
    default=...,
    metavar="SOURCE...",
)
MERGE = option("merge", bool, "Join what every --shard I/N has encoded.", default=False)
DRY_RUN = option("dry_run", bool, "Only say what it takes: download, disk, time.", default=False)
PREVIEW = option(
    "preview",
    int,
    "Only show the first N documents of each source as they would be trained on: what the "
    "model writes in green.",
    default=0,
    metavar="N",
    minimum=0,
)


@configured(PrepareConfig, SOURCES, MERGE, DRY_RUN, PREVIEW, JSON)
def command(
    config: PrepareConfig,
    sources: list[str],
    merge: bool,
    dry_run: bool,
    preview: int,
    json: bool,
) -> None:
    """Encode text or conversations into a data set to train on.

    A table holds conversations if it has `messages`, or `prompt` and `completion`; pairs of
    answers if it has `chosen` and `rejected`; else text. Whatever ends the command, the same
    command goes on where it stopped, and the bytes are the same as if nothing had happened.

    Examples:

    - `nope prepare fineweb`

    - `nope prepare smoltalk --dataset-subset smol-magpie-ultra:0.5,smol-summarize@20000`

    - `nope prepare python-docs --token-encoding bpe:4096`

    - `nope prepare chats.jsonl --token-encoding runs/pretrain --preview 3`

    - `zcat corpus.gz | nope prepare - --name corpus`
    """
    from nope_gpt.data import prepare as data

    if dry_run:
        needed = data.dry_run(sources, config)
        result(estimated(needed), asdict(needed), json)
        return
    announce(sources, config)
    with Watcher() as watcher:
        if preview:
            samples = data.preview(sources, config, preview, watcher)
        else:
            made = data.prepare(sources, config, watcher, merge=merge)
    if preview:
        show_samples(samples, json)
        return
    for item in made:
        say(f"\n{item.path}{': already prepared, of the same' if item.existed else ''}")
        say(report(item.manifest))
    if not made:
        say(
            "this part is encoded; when every part is: the same command with --merge and "
            "without --shard"
        )
    result(
        "\n".join(str(item.path) for item in made),
        {"datasets": [described(item) for item in made]},
        json,
    )


def announce(sources: list[str], config: PrepareConfig) -> None:
    """Say what is about to be read, plainly where it is a lot."""
    from nope_gpt.data import catalog

    say(f"reading {', '.join(sources)}")
    subsets = (config.dataset_subset or "").lower().split(",")
    fineweb = catalog.KNOWN["fineweb"]
    if "none" in subsets and any(catalog.known_collection(name) is fineweb for name in sources):
        say(f"--dataset-subset none: {catalog.FULL_FINEWEB}", style="bold yellow")


def described(item: Prepared) -> dict[str, Any]:
    """A data set for programs."""
    keys = ("content", "tokenizer", "token_dtype", "statistics")
    facts = {key: item.manifest[key] for key in keys}
    return {"path": str(item.path), "existed": item.existed, **facts}


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


class Watcher:
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
