"""What keeps a bad step from spoiling the weights."""

from __future__ import annotations

import math
import statistics
from enum import IntEnum

from nope_gpt.config import TrainingConfig

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
    STOP = 5


class Guard:
    """Judges each step before its update.

    Args:
        config: The run's settings.
    """

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config
        self.not_finite = 0

    def judge(self, loss: float, norm: float, recent: list[float]) -> Verdict:
        """Say what a step's loss and gradient norm deserve.

        Args:
            loss, norm: Of the step, over all ranks.
            recent: Losses of the steps before; kept up to date.
        """
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.not_finite += 1
            is_last = self.not_finite >= self.config.max_non_finite_steps
            return Verdict.STOP if is_last else Verdict.NOT_FINITE
        self.not_finite = 0
        spike = is_spike(loss, recent)
        if not spike or self.config.loss_spike in ("ignore", "warn"):
            recent.append(loss)
            del recent[:-WINDOW]
        if not spike or self.config.loss_spike == "ignore":
            return Verdict.UPDATE
        return Verdict[self.config.loss_spike.upper()]


def is_spike(loss: float, recent: list[float]) -> bool:
    """Whether a loss is far above those of the steps before."""
    if len(recent) < FEWEST:
        return False
    jump = loss - statistics.fmean(recent)
    return jump > max(SMALLEST_JUMP, DEVIATIONS * statistics.stdev(recent))
