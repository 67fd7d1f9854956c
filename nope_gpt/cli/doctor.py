"""`nope doctor`."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated

import typer

from nope_gpt.cli.options import friendly
from nope_gpt.cli.terminal import result, waiting

if TYPE_CHECKING:
    from nope_gpt.diagnosis import Finding

MARKS = {"good": "✓", "less": "–", "bad": "✗"}
COLORS = {"good": typer.colors.GREEN, "less": typer.colors.YELLOW, "bad": typer.colors.RED}


def command(
    speed: Annotated[
        bool,
        typer.Option(
            "--speed/--no-speed", help="Compile and train for some seconds, to see that it works."
        ),
    ] = True,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on stdout, for programs.")
    ] = False,
) -> None:
    """Look at this machine: what it has for training and generating, and what is missing.

    Each thing that is missing is told with the line that mends it. Ends with code 1 if
    something does not work.

    Examples:

    - `nope doctor`

    - `nope doctor --no-speed --json`
    """
    with friendly():
        look(speed, json)


def look(speed: bool, json: bool) -> None:
    """Print what each check finds, as it finds it."""
    from nope_gpt import diagnosis
    from nope_gpt.device import resolve_device

    device = resolve_device("auto")
    found = []
    for check in diagnosis.QUICK + (diagnosis.SLOW if speed else ()):
        with waiting(check.__doc__ or "") if check in diagnosis.SLOW else nullcontext():
            findings = list(check(device))
        for finding in findings:
            found.append(finding)
            if not json:
                show(finding)
    if json:
        result("", {"findings": [finding.as_dict() for finding in found]}, True)
    if any(finding.state == diagnosis.BAD for finding in found):
        raise typer.Exit(1)


def show(finding: Finding) -> None:
    """Print a finding, and under it what mends it."""
    mark = typer.style(MARKS[finding.state], fg=COLORS[finding.state])
    typer.echo(f"{mark} {finding.name:<15}  {finding.told}")
    if finding.remedy:
        typer.echo(f"{'next:':>17}  {finding.remedy}")
