"""Sections of names, values and bars, for people and for documents."""

from __future__ import annotations

from dataclasses import dataclass

BAR = 24
"""Characters of the whole."""


@dataclass(frozen=True)
class Section:
    """A table: a row is a name, a value, and perhaps a share of the whole to draw."""

    title: str
    rows: list[tuple[str, str, float | None]]


def text(tables: list[Section]) -> str:
    """Sections with columns and bars."""
    lines: list[str] = []
    for table in tables:
        names = max(len(name) for name, _, _ in table.rows)
        values = max((len(value) for _, value, share in table.rows if share is not None), default=0)
        lines.append(table.title)
        for name, value, share in table.rows:
            bar = "" if share is None else f"{value:<{values}}  {'█' * round(share * BAR)}"
            lines.append(f"  {name:<{names}}  {bar or value}".rstrip())
        lines.append("")
    return "\n".join(lines).rstrip()


def markdown(tables: list[Section]) -> str:
    """Sections as tables of a document."""
    lines: list[str] = []
    for table in tables:
        lines += [f"**{table.title}**", "", "| | |", "|---|---|"]
        for name, value, share in table.rows:
            shown = f"`{value}`" if name == "run" else value
            lines.append(f"| {name} | {shown}{'' if share is None else f' ({share:.0%})'} |")
        lines.append("")
    return "\n".join(lines).rstrip()
