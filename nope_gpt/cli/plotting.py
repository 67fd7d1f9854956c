"""Charts, where matplotlib is installed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from nope_gpt.config import SizeConfig
from nope_gpt.errors import UsageError
from nope_gpt.files.pictures import as_png, can_draw
from nope_gpt.files.writing import writing
from nope_gpt.sizing.arithmetic import Parts, count_parameters, forward_flops

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from nope_gpt.evaluation.evaluating import Evaluation

SUFFIXES = (".png", ".svg", ".pdf")

WIDE = (13.0, 3.6)
"""Inches, of three charts side by side."""


def figure_for(path: Path, width: float, height: float) -> Figure:
    """An empty figure for a file.

    Raises:
        UsageError: matplotlib is not installed, or the name has another suffix.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(
            f"--plot is {path.name!r}, and must end in one of {', '.join(SUFFIXES)}",
            hint=f"--plot {path.with_suffix('.png').name}",
        )
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError(
            "--plot needs matplotlib, which is not installed",
            hint="pip install 'nope-gpt[plots]'",
        ) from None
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, path: Path) -> None:
    """Write a figure to its file."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def picture_of(found: Evaluation) -> bytes | None:
    """A drawing as PNG, where matplotlib is installed."""
    if not can_draw():
        return None
    figure = figure_for(Path("evaluation.png"), *WIDE)
    draw_evaluation(found, figure)
    return as_png(figure)


def draw_shape(config: SizeConfig, figure: Figure) -> None:
    """Draw parameters and operations by part."""
    left, right = figure.subplots(1, 2)
    charts: list[tuple[Any, str, Parts]] = [
        (left, "Parameters", count_parameters(config)),
        (
            right,
            f"Operations, {config.tokens_per_sample:,} tokens",
            forward_flops(config, config.tokens_per_sample),
        ),
    ]
    for axes, title, parts in charts:
        names = [name.replace("_", " ") for name in parts.as_dict()]
        shares = [amount / parts.total for amount in parts.as_dict().values()]
        bars = axes.barh(names, shares, color="#3b6ea8")
        axes.bar_label(bars, [f"{share:.1%}" for share in shares], padding=3)
        axes.invert_yaxis()
        axes.set_xlim(0, max(shares) * 1.2)
        axes.set_xticks([])
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.set_title(f"{title}: {parts.total:.4g}")


def draw_evaluation(found: Evaluation, figure: Figure) -> None:
    """Draw loss and attention by position, and where hidden numbers are found."""
    by_place, attention, numbers = figure.subplots(1, 3)
    colors = figure_colors(len(found.lengths))
    for each, color in zip(found.lengths, colors, strict=True):
        places = [(bucket.first + bucket.end) / 2 for bucket in each.buckets]
        label = f"{each.length // found.trained_length}x: {each.perplexity:.4g}"
        by_place.plot(places, [bucket.loss for bucket in each.buckets], color=color, label=label)
    by_place.set(xscale="log", title="Loss by position, nats", xlabel="position")
    by_place.legend(title="context: perplexity", frameon=False)
    for axes in (by_place, attention):
        axes.axvline(found.trained_length, color="#999999", linestyle=":")
        axes.spines[["top", "right"]].set_visible(False)
    if found.entropies:
        attention.plot([place + 1 for place, _ in found.entropies], [h for _, h in found.entropies])
    attention.set(xscale="log", title="Entropy of attention, nats", xlabel="position")
    lengths = sorted({each.length for each in found.passkeys})
    shares = [[one.share for one in found.passkeys if one.length == each] for each in lengths]
    if shares:
        numbers.imshow(shares, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        depths = [each.depth for each in found.passkeys if each.length == lengths[0]]
        numbers.set_xticks(range(len(depths)), [f"{depth:.2g}" for depth in depths])
        numbers.set_yticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    numbers.set(title="Hidden numbers found", xlabel="depth", ylabel="context")


def figure_colors(count: int) -> list[str]:
    """Shades of one colour, the first one dark."""
    steps = [round(0x20 + 0xA0 * place / max(count - 1, 1)) for place in range(count)]
    return [f"#{step:02x}{0x40 + step // 2:02x}a8" for step in steps]
