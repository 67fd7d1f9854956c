"""How much sharper attention should be in contexts that are longer than was trained.

Among more tokens the same scores spread attention wider. A scale on all of them makes up for
some of that, by how much differs from model to model (Wang et al. 2024, appendix B), and for a
model whose attention is not sharp anywhere by nothing. So a scale, and one that grows with the
keys that are seen, are searched on one half of a text and judged on the other, and only a gain
beyond its own uncertainty counts.

Shapes: N spans, M tokens of the longest context.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from nope_gpt.adaptation.reach import sharpened
from nope_gpt.config import EvaluateConfig
from nope_gpt.errors import UsageError
from nope_gpt.evaluation.evaluating import Plan
from nope_gpt.evaluation.lengths import Estimate, windowed_losses
from nope_gpt.evaluation.scorers import OwnScorer
from nope_gpt.hub import storage
from nope_gpt.model import NoPEGPT
from nope_gpt.network.sharpening import NONE, Sharpening

SCALES = (1.0, 1.03, 1.06, 1.1, 1.15, 1.2, 1.25, 1.3, 1.4, 1.5, 1.65, 1.8)
GROWTHS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6)
CANDIDATES = (
    *(Sharpening(scale=scale) for scale in SCALES),
    *(Sharpening(growth=growth) for growth in GROWTHS),
)

FEWEST = 8
"""Spans, half of them to judge on."""


def certain(num_spans: int) -> float:
    """Standard errors that a gain must exceed: the 97.5% point of Student's t, to 4% from 4 spans.

    Abramowitz and Stegun, 26.7.5, its first two terms.
    """
    z, freedom = 1.96, num_spans - 1
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """What is best for one length of the context.

    Attributes:
        length: In tokens.
        best: Of what was tried.
        searched: The loss with each that was tried, on the half that it was chosen on.
        gain: What the loss falls by on the other half.
        cost: What the loss in contexts of the trained length rises by there.
        num_spans: That it was judged on.
    """

    length: int
    best: Sharpening
    searched: dict[Sharpening, float]
    gain: Estimate
    cost: Estimate
    num_spans: int

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return {
            "length": self.length,
            **self.best._asdict(),
            "helps": self.helps,
            "gain": self.gain._asdict(),
            "cost": self.cost._asdict(),
            "searched": [each._asdict() | {"loss": loss} for each, loss in self.searched.items()],
        }

    @property
    def helps(self) -> bool:
        """Whether the gain is beyond chance."""
        return self.gain.mean > certain(self.num_spans) * self.gain.error


def calibrate_model(
    model: NoPEGPT,
    directory: Path,
    text: Tensor,
    trained_length: int,
    config: EvaluateConfig,
    started: Callable[[int], Callable[[int], None]] = lambda _: lambda _: None,
) -> list[Choice]:
    """Find what sharpens attention best for each length, and write what helps into config.json.

    What was written before for one of these lengths and does not help is turned off.

    Args:
        model: In eval mode, in float32.
        directory: With its files.
        text: Tokens [.].
        trained_length: Of the context, in tokens.
        config: Which lengths, and how much of the text.
        started: Told how many tokens there are to read; returns what is told of progress.

    Raises:
        UsageError: No length is longer than what was trained, the text is too short, the model was
            trained on another length, or its files are not to be changed.
    """
    plan = Plan(config, text, trained_length)
    lengths = [length for length in plan.lengths if length > trained_length]
    if not lengths:
        raise UsageError("there is no longer context to calibrate for", hint="--lengths 2,4")
    storage.refuse_to_change(directory)
    if model.trained_context_length not in (None, trained_length):
        raise UsageError(
            f"this model was trained on {model.trained_context_length:,} tokens of context, and "
            f"not on {trained_length:,}",
            where=str(directory),
            hint="leave --context-length out",
        )
    advance = started(len(lengths) * (len(CANDIDATES) + 4) * plan.num_tokens // 2)
    choices = calibrate(model, plan.spans, trained_length, lengths, advance)
    found = {choice.length: choice.best for choice in choices if choice.helps}
    if found or model.sharpenings:
        off = {choice.length: NONE for choice in choices if not choice.helps}
        storage.write_sharpenings(directory, model.sharpenings | off | found, trained_length)
    return choices


def calibrate(
    model: NoPEGPT,
    spans: Tensor,
    trained_length: int,
    lengths: Sequence[int],
    advance: Callable[[int], None] = lambda _: None,
) -> list[Choice]:
    """Find what sharpens attention best for each length.

    Args:
        model: In eval mode, in float32.
        spans: Of text [N, M + 1], N at least `FEWEST`.
        trained_length: Of the context, in tokens.
        lengths: To plan for, each a divisor of M.
        advance: Told how many tokens more were read.

    Raises:
        UsageError: There are too few spans to choose on some and judge on others.
    """
    if len(spans) < FEWEST:
        raise UsageError(
            f"the text has {len(spans)} stretches as long as the longest context, and "
            f"{FEWEST} are needed to choose on some and judge on others",
            hint="a longer text, more --num-tokens, or a lower --lengths",
        )
    scorer = OwnScorer(model)
    chosen_on, judged_on = spans[::2], spans[1::2]

    def means(some: Tensor, length: int, how: Sharpening) -> Tensor:
        with sharpened(model, how, trained_length):
            return windowed_losses(scorer, some, length, advance).mean(dim=1)

    choices = []
    for length in lengths:
        searched = {how: float(means(chosen_on, length, how).mean()) for how in CANDIDATES}
        best = min(searched, key=lambda how: searched[how])
        gain = means(judged_on, length, NONE) - means(judged_on, length, best)
        cost = means(judged_on, trained_length, best) - means(judged_on, trained_length, NONE)
        choices.append(
            Choice(
                length=length,
                best=best,
                searched=searched,
                gain=Estimate.of(gain),
                cost=Estimate.of(cost),
                num_spans=len(judged_on),
            )
        )
    return choices
