"""All that is measured of a model, in the order in which it costs more."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nope_gpt.config import EvaluateConfig
from nope_gpt.errors import UsageError
from nope_gpt.evaluation.entropy import attention_entropies
from nope_gpt.evaluation.lengths import (
    Estimate,
    LengthLoss,
    bits_per_byte,
    by_length,
    perplexity,
    sliding_losses,
    spans_of,
    windowed_losses,
)
from nope_gpt.evaluation.passkey import Found, found_by_depth, probe
from nope_gpt.evaluation.scorers import OwnScorer, Scorer, Vocabulary
from nope_gpt.network.sharpening import NONE, Sharpening, as_setting

ENTROPY_POINTS = 24
"""Positions at which attention is looked at, spread by their logarithm."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a model knows of a text.

    Attributes:
        trained_length: Of the context, in tokens.
        num_tokens: That were predicted, the same at every length.
        num_bytes: Of their text.
        lengths: The loss at each length, the shortest first.
        sliding: The loss in a window of the trained length that slides.
        passkeys: How often a hidden number was found.
        entropies: Of attention: a position, and the mean over layers and heads, in nats.
        sharpenings: What attention was scaled by, at the lengths where it was calibrated.
    """

    trained_length: int
    num_tokens: int
    num_bytes: int
    lengths: list[LengthLoss]
    sliding: Estimate
    passkeys: list[Found]
    entropies: list[tuple[int, float]]
    sharpenings: dict[int, Sharpening]

    def bits_per_byte(self, loss: float) -> float:
        """Of a loss in nats for each token."""
        return bits_per_byte(loss * self.num_tokens, self.num_bytes)

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return {
            "trained_length": self.trained_length,
            "tokens": self.num_tokens,
            "bytes": self.num_bytes,
            "lengths": [
                {
                    "length": each.length,
                    "multiple": each.length / self.trained_length,
                    "loss": each.loss.mean,
                    "loss_error": none_if_nan(each.loss.error),
                    "perplexity": each.perplexity,
                    "perplexity_ratio": each.ratio,
                    "added_loss": each.added.mean,
                    "added_loss_error": none_if_nan(each.added.error),
                    "bits_per_byte": self.bits_per_byte(each.loss.mean),
                    "buckets": [bucket._asdict() for bucket in each.buckets],
                }
                for each in self.lengths
            ],
            "sliding": {
                "loss": self.sliding.mean,
                "loss_error": none_if_nan(self.sliding.error),
                "perplexity": perplexity(self.sliding.mean),
                "bits_per_byte": self.bits_per_byte(self.sliding.mean),
            },
            "passkeys": [found._asdict() for found in self.passkeys],
            "attention_scales": as_setting(self.sharpenings),
            "attention_entropy": [
                {"position": position, "nats": entropy} for position, entropy in self.entropies
            ],
        }


def none_if_nan(value: float) -> float | None:
    """A number as JSON has it."""
    return None if math.isnan(value) else value


class Plan:
    """What an evaluation reads.

    Args:
        config: What is asked for.
        text: Its tokens [.].
        trained_length: Of the context, in tokens.

    Raises:
        UsageError: The text is too short, or the stride too long.
    """

    def __init__(self, config: EvaluateConfig, text: Tensor, trained_length: int) -> None:
        self.lengths = [multiple * trained_length for multiple in config.multiples]
        longest = math.lcm(*self.lengths)
        self.spans = spans_of(text, longest, max(config.num_tokens // longest, 1))
        self.stride = config.stride or max(trained_length // 4, 1)
        if self.stride > trained_length:
            raise UsageError(
                f"--stride is {self.stride:,}, and the window has {trained_length:,} tokens"
            )
        self.probes = config.passkey_depths * config.passkey_keys

    @property
    def num_tokens(self) -> int:
        """That are predicted at each length."""
        return self.spans.size(0) * (self.spans.size(1) - 1)

    @property
    def work(self) -> int:
        """Tokens that progress counts up to."""
        return (len(self.lengths) + 1) * self.num_tokens + self.probes * sum(self.lengths)


def evaluate(
    scorer: Scorer,
    tokenizer: Vocabulary,
    text: Tensor,
    trained_length: int,
    config: EvaluateConfig,
    started: Callable[[int], Callable[[int], None]] = lambda _: lambda _: None,
) -> Evaluation:
    """Measure a model on a text.

    Args:
        scorer: The model.
        tokenizer: Of the model.
        text: Tokens [.].
        trained_length: Of the context, in tokens.
        config: What is asked for.
        started: Told how many tokens there are to read; returns what is told of progress.

    Raises:
        UsageError: The text is too short for what is asked.
    """
    plan = Plan(config, text, trained_length)
    if config.passkey_keys:  # Rather now than after all the rest.
        probe(tokenizer, plan.spans[0, 1:].tolist(), min(plan.lengths), 0.0, "0")
    advance = started(plan.work)
    losses, sharpenings = {}, {}
    for length in plan.lengths:
        with scorer.planned(length) as found:
            losses[length] = windowed_losses(scorer, plan.spans, length, advance)
        if found != NONE:
            sharpenings[length] = found
    sliding = sliding_losses(scorer, plan.spans, trained_length, plan.stride, advance)
    passkeys = []
    if config.passkey_keys:
        passkeys = found_by_depth(
            scorer,
            tokenizer,
            plan.spans[0, 1:].tolist(),
            plan.lengths,
            num_depths=config.passkey_depths,
            num_keys=config.passkey_keys,
            seed=config.seed,
            advance=advance,
        )
    targets = plan.spans[:, 1:].flatten().tolist()
    return Evaluation(
        trained_length=trained_length,
        num_tokens=plan.num_tokens,
        num_bytes=tokenizer.num_bytes(targets),
        lengths=by_length(losses),
        sliding=Estimate.of(sliding.mean(dim=1)),
        passkeys=passkeys,
        entropies=entropies(scorer, plan.spans[:1, : max(plan.lengths)]),
        sharpenings=sharpenings,
    )


def entropies(scorer: Scorer, tokens: Tensor) -> list[tuple[int, float]]:
    """Of our own models, how spread out attention is at some positions."""
    if not isinstance(scorer, OwnScorer):
        return []
    positions = log_spaced(tokens.size(1))
    places = torch.tensor(positions, device=scorer.device)
    tokens = scorer.begun(tokens.to(scorer.device))
    with scorer.planned(tokens.size(1)):
        found = attention_entropies(scorer.model, tokens, places)
    return list(zip(positions, found.mean(dim=(0, 1)).tolist(), strict=True))


def log_spaced(length: int) -> Sequence[int]:
    """Positions from the first to the last, closer at the beginning."""
    ratios = (place / (ENTROPY_POINTS - 1) for place in range(ENTROPY_POINTS))
    return sorted({round(length**ratio) - 1 for ratio in ratios})
