"""Writing a model's stream to stdout as it comes, coloured by probability if asked."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from rich.color import Color
from rich.console import Console
from rich.style import Style

from nope_gpt.chat import Piece


def write_stream(pieces: Iterable[Piece], colorize: bool) -> str:
    """Print pieces as they come; returns the whole text."""
    console = Console(highlight=False, soft_wrap=True) if colorize else None
    text = ""
    for piece in pieces:
        text += piece.text
        if console:
            console.print(piece.text, style=color_of(piece.probability), end="", markup=False)
        else:
            sys.stdout.write(piece.text)
        sys.stdout.flush()
    return text


def color_of(probability: float) -> Style:
    """Red for an unlikely token, green for a likely one."""
    return Style(color=Color.from_rgb(220 * (1 - probability), 200 * probability, 60))
