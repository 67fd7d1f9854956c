"""How an answer is shown while it comes: each finished block of Markdown once, or as it is.

What is finished is never drawn again; the end of the block that is being written is a line below.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator

from rich.console import Console
from rich.markdown import Markdown
from rich.text import Text

from nope_gpt.cli.terminal import harmless
from nope_gpt.cli.writing import write_stream
from nope_gpt.generation.streaming import Piece

FENCE = re.compile(r"^ {0,3}(```+|~~~+)")


class Blocks:
    """Cuts Markdown into blocks as it comes: at blank lines, but not within fences."""

    def __init__(self) -> None:
        self.text = ""
        self.fence = ""
        self.block: list[str] = []

    def add(self, text: str) -> Iterator[str]:
        """Take more text; gives the blocks that are finished with it."""
        self.text += text
        *lines, self.text = self.text.split("\n")
        for line in lines:
            yield from self.line(line)

    def line(self, line: str) -> Iterator[str]:
        """Take a whole line."""
        match = FENCE.match(line)
        if self.fence:
            self.block.append(line)
            if line.strip().startswith(self.fence) and not line.strip(f" {self.fence[0]}"):
                self.fence = ""
                yield from self.finish()
        elif match:
            yield from self.finish()
            self.block, self.fence = [line], match[1]
        elif line.strip():
            self.block.append(line)
        else:
            yield from self.finish()

    def finish(self) -> Iterator[str]:
        """The block that has begun, if one has."""
        if self.block:
            yield "\n".join(self.block)
        self.block = []

    def tail(self, size: int) -> str:
        """The end of the block that has begun, on a line."""
        text = " ".join([*self.block[-2:], self.text]).strip()
        return text if len(text) <= size else f"…{text[1 - size :]}"

    def rest(self) -> Iterator[str]:
        """What is left at the end."""
        if self.text:
            self.block.append(self.text)
            self.text = ""
        yield from self.finish()


def show(pieces: Iterable[Piece], *, markdown: bool, colorize: bool) -> None:
    """Write an answer to stdout as it comes, and end its last line."""
    console = Console(highlight=False, emoji=False)
    if not markdown or colorize or not console.is_terminal or console.is_dumb_terminal:
        write_stream(pieces, colorize)
        sys.stdout.write("\n")
        sys.stdout.flush()
        return
    blocks, is_first = Blocks(), True
    with console.status("", spinner="dots") as status:
        try:
            for piece in pieces:
                for block in blocks.add(harmless(piece.text)):
                    show_block(console, block, is_first)
                    is_first = False
                status.update(Text(blocks.tail(console.width - 4), style="dim"))
        finally:
            for block in blocks.rest():
                show_block(console, block, is_first)


def show_block(console: Console, block: str, is_first: bool) -> None:
    """Print one finished block."""
    if not is_first:
        console.print()
    console.print(Markdown(block), soft_wrap=False)
