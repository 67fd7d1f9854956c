"""Writing a model's stream to stdout as it comes, coloured by probability if asked."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from rich.color import Color, ColorSystem
from rich.console import Console
from rich.style import Style

from nope_gpt.cli.terminal import harmless
from nope_gpt.generation.streaming import Piece

COLOR_SYSTEMS = {
    "standard": ColorSystem.STANDARD,
    "256": ColorSystem.EIGHT_BIT,
    "truecolor": ColorSystem.TRUECOLOR,
    "windows": ColorSystem.WINDOWS,
}


def write_stream(pieces: Iterable[Piece], colorize: bool) -> str:
    """Print pieces as they come; returns the whole text.

    Every character is printed as it is, but on a terminal none that would steer it.
    """
    console = Console()
    can_color = colorize and not console.no_color
    colors = COLOR_SYSTEMS.get(console.color_system or "") if can_color else None
    steers = sys.stdout.isatty()
    text = ""
    for piece in pieces:
        text += piece.text
        shown = harmless(piece.text) if steers else piece.text
        style = color_of(piece.probability)
        sys.stdout.write(style.render(shown, color_system=colors) if colors else shown)
        sys.stdout.flush()
    return text


def color_of(probability: float) -> Style:
    """Red for an unlikely token, green for a likely one."""
    return Style(color=Color.from_rgb(220 * (1 - probability), 200 * probability, 60))
