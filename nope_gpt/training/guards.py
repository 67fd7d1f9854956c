"""What keeps a bad step from spoiling the weights."""

from __future__ import annotations

import math
import statistics
from enum import IntEnum

WINDOW = 128
"""Steps that a loss is compared with."""

FEWEST = 16
"""Steps to have seen before a loss can be called a spike."""

DEVIATIONS = 6.0
SMALLEST_JUMP = 0.1
"""A spike lies so many standard deviations, and so many nats, above the mean of the window."""

MOST_REWINDS = 3


class Verdict(IntEnum):
    """What to do with a step's gradients; of several ranks' verdicts the largest counts."""

    UPDATE = 0
    WARN = 1
    SKIP = 2
    REWIND = 3
    NOT_FINITE = 4


def judge(loss: float, norm: float, recent: list[float], on_spike: str) -> Verdict:
    """Say what a step deserves before its update.

    Args:
        loss, norm: Of the step, over all ranks.
        recent: Losses of the steps before; kept up to date.
        on_spike: ignore, warn, skip or rewind.
    """
    if not (math.isfinite(loss) and math.isfinite(norm)):
        return Verdict.NOT_FINITE
    spike = is_spike(loss, recent)
    if not spike or on_spike in ("ignore", "warn"):
        recent.append(loss)
        del recent[:-WINDOW]
    if not spike or on_spike == "ignore":
        return Verdict.UPDATE
    return Verdict[on_spike.upper()]


def is_spike(loss: float, recent: list[float]) -> bool:
    """Whether a loss is far above those of the steps before."""
    if len(recent) < FEWEST:
        return False
    jump = loss - statistics.fmean(recent)
    return jump > max(SMALLEST_JUMP, DEVIATIONS * statistics.stdev(recent))
