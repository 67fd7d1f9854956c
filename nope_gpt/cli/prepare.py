"""`nope prepare`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Self

from nope_gpt.cli.options import JSON, argument, configured
from nope_gpt.cli.terminal import QUIET_SECONDS, Pace, progress_bar, result, say, talk
from nope_gpt.config import PrepareConfig

if TYPE_CHECKING:
    from nope_gpt.data.prepare import Prepared

SOURCES = argument(
    "sources",
    list[str],
    "Files (.txt, .md, .jsonl, .parquet), directories of them, `-` for standard input, or "
    "`python-docs`, which needs no network.",
    default=...,
    metavar="SOURCE...",
)


@configured(PrepareConfig, SOURCES, JSON)
def command(
    config: PrepareConfig,
    sources: list[str],
    json: bool,
) -> None:
    """Encode text or conversations into a data set to train on.

    A .jsonl or .parquet file holds conversations if it has `messages`, else text.

    Examples:

    - `nope prepare python-docs --token-encoding bpe:4096`

    - `nope prepare ~/books`

    - `nope prepare chats.jsonl --token-encoding runs/pretrain`

    - `zcat corpus.gz | nope prepare - --name corpus`
    """
    from nope_gpt.data.prepare import prepare

    say(f"reading {', '.join(sources)}")
    with Watcher() as watcher:
        made = prepare(sources, config, watcher)
    for data in made:
        say(summary(data))
    result(
        "\n".join(str(data.path) for data in made),
        {"datasets": [{**vars(data), "path": str(data.path)} for data in made]},
        json,
    )


class Watcher:
    """Shows how far the encoding is: a bar on a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        self.console = talk()
        self.pace = Pace(0.1 if self.console.is_terminal else QUIET_SECONDS)
        self.bar = progress_bar(self.console)
        self.task = self.bar.add_task("prepare", total=None, figures="")
        self.started = time.perf_counter()

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def __call__(self, data: Prepared) -> None:
        if not self.pace.is_due():
            return
        speed = data.tokens / (time.perf_counter() - self.started)
        figures = f"{data.documents:,} documents · {data.tokens:,} tokens · {speed:,.0f} tok/s"
        if self.console.is_terminal:
            done, total = data.characters, data.size or None
            self.bar.update(self.task, completed=done, total=total, figures=figures)
        else:
            share = f" · {data.characters / data.size:.0%}" if data.size else ""
            say(figures + share)


def summary(data: Prepared) -> str:
    """What a data set holds, in a line."""
    kind = {"text": "documents", "chat": "conversations"}[data.content]
    refused = f", {data.refused:,} refused without an answer" if data.refused else ""
    return (
        f"{data.documents:,} {kind} ({data.holdout_documents:,} held out{refused}), "
        f"{data.tokens:,} tokens of {data.tokenizer}, "
        f"{data.characters / max(data.tokens, 1):.2f} characters per token"
    )
