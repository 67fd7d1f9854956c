"""The learning rate, and the length of the samples, as functions of the step."""

from __future__ import annotations

import math

from nope_gpt.config import SHORTEST_PIECE, TrainingConfig

COSINE_FLOOR = 0.1
"""Where the cosine schedule ends, as a fraction of the peak (Hoffmann et al., 2022, App. B)."""


def sample_length(step: int, num_steps: int, length: int, growth: float) -> int:
    """How long the pieces are that a step cuts its samples into, steps counted from 0.

    They double from the shortest of at least `SHORTEST_PIECE` tokens, as often in equal times as it
    takes, so that they are whole from the share `growth` of the steps on.
    """
    lengths = [length]
    while lengths[0] % 2 == 0 and lengths[0] // 2 >= SHORTEST_PIECE:
        lengths.insert(0, lengths[0] // 2)
    growing = growth * num_steps
    if step >= growing:
        return length
    return lengths[int(step / growing * (len(lengths) - 1))]


def rate_fraction(step: int, num_steps: int, config: TrainingConfig) -> float:
    """The learning rate of a step, counted from 0, as a fraction of its peak.

    1. While warming up it rises linearly, to reach the peak at the end.
    2. Constant: it stays there. WSD: until the decay begins.
    3. Linear and the decay of WSD (Hu et al., 2024): it falls to zero just after the last
       step. Cosine: to a tenth.
    """
    warmup = round(config.warmup_fraction * num_steps)
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "wsd":
        decay = max(round(config.decay_fraction * num_steps), 1)
        return min(1.0, (num_steps - step) / decay)
    progress = (step - warmup) / max(num_steps - warmup, 1)
    if config.schedule == "linear":
        return 1.0 - progress
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return COSINE_FLOOR + (1.0 - COSINE_FLOOR) * cosine
