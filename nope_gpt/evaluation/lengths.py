"""The loss by position and by length of the context, on the same tokens for every length.

A span of text as long as the longest context is cut into windows of each length, so that
every token of it is predicted once at every length, with more or less text before it. What
differs between lengths is then the length, and not the text; errors of differences are those
of the spans, paired.

Shapes: N spans, M tokens of the longest context, B batch, T tokens of a window.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nope_gpt.errors import UsageError
from nope_gpt.evaluation.scorers import Scorer

TOKENS_AT_A_TIME = 16_384
"""Of all windows of a batch."""

Advance = Callable[[int], None]
"""What hears how many tokens more were scored."""


class Estimate(NamedTuple):
    """A mean over spans, and the standard error of it; nan of a single one."""

    mean: float
    error: float

    @classmethod
    def of(cls, values: Tensor) -> Estimate:
        """Of one value for each span [N]."""
        alone = len(values) == 1
        error = math.nan if alone else float(values.std()) / math.sqrt(len(values))
        return cls(float(values.mean()), error)


class Bucket(NamedTuple):
    """The tokens whose place in the window is `first` or later, and before `end`."""

    first: int
    end: int
    loss: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class LengthLoss:
    """What a model makes of windows of one length.

    Attributes:
        length: T, in tokens.
        loss: Nats for each token.
        added: Loss above that of the shortest length, span by span.
        buckets: By place in the window.
    """

    length: int
    loss: Estimate
    added: Estimate
    buckets: list[Bucket]

    @property
    def perplexity(self) -> float:
        return perplexity(self.loss.mean)

    @property
    def ratio(self) -> float:
        """The perplexity in that of the shortest length."""
        return perplexity(self.added.mean)


def spans_of(tokens: Tensor, length: int, count: int) -> Tensor:
    """Cut text into spans of `length` targets, each with the token before it: [N, length + 1].

    Args:
        tokens: A text [.].
        length: M.
        count: N, at most; they are spread evenly over the text.

    Raises:
        UsageError: The text is shorter than one span.
    """
    available = (len(tokens) - 1) // length
    if available < 1:
        raise UsageError(
            f"the text has {len(tokens):,} tokens, and a stretch that all contexts divide has "
            f"{length:,}, with a token before it",
            hint="a longer text, or a lower --lengths",
        )
    chosen = [i * available // min(count, available) for i in range(min(count, available))]
    return torch.stack([tokens[i * length : (i + 1) * length + 1] for i in chosen])


def windowed_losses(
    scorer: Scorer, spans: Tensor, length: int, advance: Advance = lambda _: None
) -> Tensor:
    """The loss of every target of the spans, each seeing at most the window it is in.

    Args:
        scorer: What predicts.
        spans: [N, M + 1], M a multiple of the length.
        length: T.
        advance: Told of progress.

    Returns:
        Nats [N, M], float32, on the CPU.
    """
    inputs, targets = (part.reshape(-1, length) for part in (spans[:, :-1], spans[:, 1:]))
    size = max(TOKENS_AT_A_TIME // length, 1)
    found = []
    for some, right in zip(torch.split(inputs, size), torch.split(targets, size), strict=True):
        losses = scorer.losses(some.to(scorer.device), right.to(scorer.device))
        found.append(losses.float().cpu())
        advance(some.numel())
    return torch.cat(found).view(len(spans), -1)


def sliding_losses(
    scorer: Scorer,
    spans: Tensor,
    length: int,
    stride: int,
    advance: Advance = lambda _: None,
) -> Tensor:
    """The loss of every target whose window begins at most `stride` tokens later than could be.

    The window moves by a stride at a time, and only the tokens that are new in it count (Press
    et al. 2021, appendix B), but for those of the first one.

    Args:
        scorer: What predicts.
        spans: [N, M + 1].
        length: T.
        stride: Tokens, at most T.
        advance: Told of progress.

    Returns:
        Nats [N, M], float32, on the CPU.
    """
    longest = spans.size(1) - 1
    losses = torch.empty(len(spans), longest)
    size = max(TOKENS_AT_A_TIME // length, 1)
    scored = 0
    for end in [*range(length, longest, stride), longest]:
        window = spans[:, max(end - length, 0) : end + 1]
        for rows in torch.split(torch.arange(len(spans)), size):
            some = window[rows].to(scorer.device)
            own = scorer.losses(some[:, :-1], some[:, 1:]).float().cpu()
            losses[rows, scored:end] = own[:, scored - end :]
            advance(some.size(0) * (end - scored))
        scored = end
    return losses


def by_length(losses: dict[int, Tensor]) -> list[LengthLoss]:
    """Sum up the losses [N, M] of each length, the shortest first."""
    shortest = losses[min(losses)].mean(dim=1)
    result = []
    for length in sorted(losses):
        places = losses[length].view(-1, length).mean(dim=0)
        means = losses[length].mean(dim=1)
        edges = bucket_edges(length, min(losses))
        buckets = [
            Bucket(first, end, float(places[first:end].mean()))
            for first, end in itertools.pairwise(edges)
        ]
        result.append(
            LengthLoss(
                length=length,
                loss=Estimate.of(means),
                added=Estimate.of(means - shortest),
                buckets=buckets,
            )
        )
    return result


def bucket_edges(length: int, trained: int) -> Sequence[int]:
    """Where buckets begin and end: eighths of the trained length, then its halves."""
    eighth, half = max(trained // 8, 1), max(trained // 2, 1)
    inside = range(0, min(trained, length), eighth)
    return [*inside, *range(trained, length, half), length]


def perplexity(nats: float) -> float:
    """Of a loss for each token, as far as a number can hold it."""
    return math.exp(min(nats, 700.0))


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """Bits for each byte of text, which compares models of different tokenizers."""
    return nats / math.log(2) / num_bytes
