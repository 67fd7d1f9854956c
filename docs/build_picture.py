"""Record a conversation in a real terminal as docs/chat.svg.

pip install -e '.[dev]' pyte
python docs/build_picture.py MODEL
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import time
from itertools import groupby
from pathlib import Path

import pexpect
import pyte
from rich.console import Console
from rich.style import Style
from rich.text import Text

LINES = (
    "What does textwrap.dedent do?",
    "/retry temp=0.2",
    "And what is random.choice?",
    "/tokens",
    "/edit What does json.dumps return?",
    "/save chat.jsonl",
)
READY = "\x1b[?2004h"
WIDTH, HEIGHT = 112, 36


def main() -> None:
    """Type the lines, and draw what is on the screen then."""
    screen = pyte.HistoryScreen(WIDTH, HEIGHT)
    stream = pyte.Stream(screen)
    with tempfile.TemporaryDirectory() as home:
        child = pexpect.spawn(
            sys.executable,
            [
                "-m",
                "nope_gpt.cli",
                "chat",
                "--model",
                str(Path(sys.argv[1]).absolute()),
                "--seed=1",
                "--temperature=0.4",
            ],
            env=os.environ | {"TERM": "xterm-256color", "HOME": home, "PROMPT_TOOLKIT_NO_CPR": "1"},
            cwd=home,
            encoding="utf-8",
            timeout=60,
            dimensions=(HEIGHT, WIDTH),
        )
        child.logfile_read = Feed(stream)
        child.expect_exact(READY)
        time.sleep(8)
        for line in LINES:
            child.send(f"{line}\r")
            child.expect_exact(READY)
        time.sleep(0.5)
        child.sendcontrol("d")
        child.expect(pexpect.EOF)
    console = Console(record=True, width=WIDTH, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    rows = [row_of(screen.buffer[number]) for number in range(HEIGHT)]
    while rows and not rows[-1].plain.strip():
        rows.pop()
    for row in rows:
        console.print(row, soft_wrap=False)
    console.save_svg(str(Path(__file__).with_name("chat.svg")), title="nope chat")


class Feed:
    """A file that passes on to a screen what is written to it."""

    def __init__(self, stream: pyte.Stream) -> None:
        self.stream = stream

    def write(self, text: str) -> None:
        self.stream.feed(text)

    def flush(self) -> None: ...


def row_of(cells: dict[int, pyte.screens.Char]) -> Text:
    """A row of the screen with its colours."""
    text = Text()
    columns = [cells[column] for column in range(WIDTH)]
    for style, run in groupby(columns, key=style_of):
        text.append("".join(cell.data for cell in run), style)
    text.rstrip()
    return text


def style_of(cell: pyte.screens.Char) -> Style:
    """The colour and the weight of a cell."""
    names = {"default": None, "brown": "yellow", "brightblack": "bright_black"}
    color = names.get(cell.fg, cell.fg)
    if color and re.fullmatch("[0-9a-f]{6}", color):
        color = f"#{color}"
    return Style(color=color, bold=cell.bold, italic=cell.italics)


if __name__ == "__main__":
    main()
