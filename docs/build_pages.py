"""Write the pages that say what the program says; with --check, fail if one is stale."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import nope_gpt
from nope_gpt.cli import app

PAGES = Path(__file__).parent
ROOT = PAGES.parent
PACKAGE = Path(nope_gpt.__file__).parent
COMMANDS = ["", *(str(command.name) for command in app.registered_commands)]

COMMAND_LINE = """# Command line

Written by `make docs` from what the program prints. Every flag may also be spelled with
underscores, as in the old scripts: `--batch_size=2` is `--batch-size 2`.
"""

MODULES = """# Module by module

Written by `make docs` from the first words of each. [architecture.md](architecture.md) says how
they work together.
"""


def help_of(command: str) -> str:
    """What `nope COMMAND --help` prints, at a fixed width and without colour."""
    environment = os.environ | {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    done = subprocess.run(
        [sys.executable, "-m", "nope_gpt.cli", *command.split(), "--help"],
        capture_output=True,
        encoding="utf-8",
        env=environment | {"PYTHONIOENCODING": "utf-8"},
        check=True,
    )
    return "\n".join(line.rstrip() for line in done.stdout.strip().splitlines())


def command_line() -> str:
    """What every command can be told."""
    parts = [COMMAND_LINE]
    for command in COMMANDS:
        parts.append(f"## nope {command}".rstrip() + f"\n\n```text\n{help_of(command)}\n```\n")
    return "\n".join(parts)


def purpose_of(path: Path) -> str:
    """The first paragraph of what a module says of itself, on one line."""
    told = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(told.partition("\n\n")[0].split()).replace("|", "\\|")


def modules() -> str:
    """Every module, room by room, the ones without a room first."""
    rooms = [PACKAGE, *sorted(path.parent for path in PACKAGE.rglob("*/__init__.py"))]
    parts = [MODULES]
    for room in rooms:
        name = room.relative_to(PACKAGE.parent).as_posix()
        purpose = purpose_of(room / "__init__.py")
        lines = [f"## {name}/", "", purpose, "", "| module | |", "|---|---|"]
        for path in sorted(room.glob("*.py")):
            if not path.stem.startswith("__"):
                lines.append(f"| `{path.name}` | {purpose_of(path)} |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def measured(page: str) -> str:
    """A page with each table that names the output of a benchmark as it stands in that output."""
    marked = r"^(<!-- (benchmarks/results/[\w-]+\.md)(?:, table (\d+))? -->\n)(?:\|.*\n)*"

    def table(mark: re.Match[str]) -> str:
        output, number = ROOT / mark[2], int(mark[3] or 1)
        text = output.read_text(encoding="utf-8") if output.is_file() else ""
        tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
        if number > len(tables):
            sys.exit(f"{mark[2]} has no table {number}: python benchmarks/all.py writes it")
        return mark[1] + str(tables[number - 1])

    return re.sub(marked, table, page, flags=re.MULTILINE)


def main() -> None:
    """Write them, or say which one is stale."""
    texts = {page: measured(page.read_text(encoding="utf-8")) for page in PAGES.rglob("*.md")}
    texts |= {PAGES / "cli.md": command_line(), PAGES / "modules.md": modules()}
    for page, text in texts.items():
        if "--check" not in sys.argv:
            page.write_text(text, encoding="utf-8")
        elif not page.is_file() or page.read_text(encoding="utf-8") != text:
            sys.exit(f"{page.relative_to(ROOT)} is stale: run `make docs` and commit it")


if __name__ == "__main__":
    main()
