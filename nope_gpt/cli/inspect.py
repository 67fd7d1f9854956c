"""`nope inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nope_gpt.cli.options import friendly
from nope_gpt.cli.terminal import result, waiting
from nope_gpt.errors import UsageError


def command(
    path: Annotated[
        str,
        typer.Argument(
            help="Directory of a data set, a run, a checkpoint, an export or another model, or "
            "one that holds several of them.",
            metavar="PATH",
        ),
    ],
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare every file with its sha256.")
    ] = False,
    preview: Annotated[
        int,
        typer.Option(
            help="Of a data set, only show the first N documents of each source, what the model "
            "writes in green.",
            metavar="N",
            min=0,
        ),
    ] = 0,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on stdout, for programs.")
    ] = False,
) -> None:
    """Explain what lies in a directory: what it is, what it holds, how it came to be.

    Examples:

    - `nope inspect datasets/fineweb-sample-10BT-r50k_base`

    - `nope inspect datasets/chats-r50k_base --preview 2`

    - `nope inspect runs/pretrain`

    - `nope inspect exports/my-model --verify`

    - `nope inspect runs`
    """
    with friendly():
        show(Path(path).expanduser(), verify, preview, json)


def show(path: Path, verify: bool, preview: int, json: bool) -> None:
    """Print what is known of a directory."""
    from nope_gpt.cli import artefacts, datasets
    from nope_gpt.inspection import facts_of

    with waiting("comparing every file with its sha256" if verify else f"reading {path}"):
        facts = facts_of(path, verify=verify)
    if facts["kind"] != "dataset":
        if preview:
            raise UsageError(
                f"this is a {facts['kind']}, and --preview shows documents of a data set",
                where=str(path),
                hint=f"nope inspect {path}",
            )
        result(artefacts.described(facts), facts, json)
        return
    if preview:
        from nope_gpt.data.samples import samples_of
        from nope_gpt.data.shards import Dataset

        datasets.show_samples(samples_of(Dataset.open(path), preview), json)
        return
    result(datasets.report(facts), facts, json)
