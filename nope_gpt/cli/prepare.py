"""`nope prepare`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from nope_gpt.cli.datasets import report, show_samples
from nope_gpt.cli.options import JSON, argument, configured, option
from nope_gpt.cli.terminal import result, say
from nope_gpt.config import PrepareConfig

if TYPE_CHECKING:
    from nope_gpt.data.commit import Prepared

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
    from nope_gpt.cli.preparing import PreparationWatcher, estimated
    from nope_gpt.data import prepare as data

    if dry_run:
        needed = data.dry_run(sources, config)
        result(estimated(needed), asdict(needed), json)
        return
    announce(sources, config)
    with PreparationWatcher() as watcher:
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
