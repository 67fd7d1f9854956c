"""`nope prepare`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nope_gpt.cli.options import JSON, argument, configured
from nope_gpt.cli.terminal import result, say, waiting
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

    with waiting(f"preparing {', '.join(sources)}"):
        made = prepare(sources, config)
    for data in made:
        say(summary(data))
    result(
        "\n".join(str(data.path) for data in made),
        {"datasets": [{**vars(data), "path": str(data.path)} for data in made]},
        json,
    )


def summary(data: Prepared) -> str:
    """What a data set holds, in a line."""
    kind = {"text": "documents", "chat": "conversations"}[data.content]
    refused = f", {data.refused:,} refused without an answer" if data.refused else ""
    return (
        f"{data.documents:,} {kind} ({data.holdout_documents:,} held out{refused}), "
        f"{data.tokens:,} tokens of {data.tokenizer}, "
        f"{data.characters / max(data.tokens, 1):.2f} characters per token"
    )
