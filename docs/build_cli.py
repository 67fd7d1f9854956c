"""Write docs/cli.md from what `--help` prints; with --check, fail if it is stale."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from nope_gpt.cli import app

PAGE = Path(__file__).with_name("cli.md")
COMMANDS = ["", *(str(command.name) for command in app.registered_commands)]

HEAD = """# Command line

Written by `make docs` from what the program prints. Every flag may also be spelled with
underscores, as in the old scripts: `--batch_size=2` is `--batch-size 2`.
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


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for command in COMMANDS:
        parts.append(f"## nope {command}".rstrip() + f"\n\n```text\n{help_of(command)}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    text = page()
    if "--check" in sys.argv:
        if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
            sys.exit("docs/cli.md is stale: run `make docs` and commit it")
    else:
        PAGE.write_text(text, encoding="utf-8")
