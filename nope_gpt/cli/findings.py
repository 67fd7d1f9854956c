"""What `nope eval` found, in tables for people."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nope_gpt.evaluation.evaluating import Evaluation
    from nope_gpt.evaluation.lengths import Estimate


def shown(found: Evaluation) -> str:
    """The tables, for people."""
    parts = [
        f"{found.num_tokens:,} tokens, the same at every length",
        columns(
            ["context", "", "loss", "perplexity", "of 1x", "bits per byte"],
            [
                [
                    f"{each.length:,}",
                    times(each.length, found),
                    estimate(each.loss),
                    f"{each.perplexity:.3f}",
                    f"{each.ratio:.3f}",
                    f"{found.bits_per_byte(each.loss.mean):.4f}",
                ]
                for each in found.lengths
            ],
        ),
        f"in a window that slides: loss {estimate(found.sliding)}, "
        f"{found.bits_per_byte(found.sliding.mean):.4f} bits per byte",
        "loss by position",
        buckets(found),
    ]
    if found.sharpenings:
        told = (
            f"{times(length, found)} by {each.told}" for length, each in found.sharpenings.items()
        )
        parts.append(f"attention is scaled as it was calibrated: {', '.join(told)}")
    if found.passkeys:
        parts += ["hidden numbers found, by depth", passkeys(found)]
    return "\n".join(parts)


def estimate(value: Estimate) -> str:
    """A mean and its standard error, if it has one."""
    return f"{value.mean:.4f}" + ("" if math.isnan(value.error) else f" ± {value.error:.4f}")


def times(length: int, found: Evaluation) -> str:
    """A length in that which was trained."""
    return f"{length // found.trained_length}x"


def buckets(found: Evaluation) -> str:
    """A row for each stretch of positions, a column for each length."""
    losses: dict[tuple[int, int], dict[int, float]] = {}
    for each in found.lengths:
        for bucket in each.buckets:
            losses.setdefault((bucket.first, bucket.end), {})[each.length] = bucket.loss
    lengths = [each.length for each in found.lengths]
    rows = [
        [f"{first:,} to {end:,}", *(cell(own.get(length)) for length in lengths)]
        for (first, end), own in losses.items()
    ]
    return columns(["", *(times(length, found) for length in lengths)], rows)


def cell(value: float | None) -> str:
    """A number, or nothing."""
    return "" if value is None else f"{value:.4f}"


def passkeys(found: Evaluation) -> str:
    """A row for each length, a column for each depth."""
    depths = list(dict.fromkeys(each.depth for each in found.passkeys))
    rows: dict[int, list[str]] = {}
    for each in found.passkeys:
        rows.setdefault(each.length, [times(each.length, found)]).append(f"{each.share:.0%}")
    return columns(["", *(f"{depth:.0%}" for depth in depths)], list(rows.values()))


def columns(header: list[str], rows: list[list[str]]) -> str:
    """Cells below each other, to the right."""
    lines = [header, *rows]
    widths = [max(len(line[place]) for line in lines) for place in range(len(header))]
    return "\n".join(
        "  ".join(["", *(f"{word:>{width}}" for word, width in zip(line, widths, strict=True))])
        for line in lines
    )
