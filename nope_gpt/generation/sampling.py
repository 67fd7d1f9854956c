"""From logits to a token: pure functions on one row of logits.

Shapes: V vocabulary, K kept candidates.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from nope_gpt.config import SamplingConfig
from nope_gpt.errors import NopeError, UsageError


class Choice(NamedTuple):
    """A token that was drawn.

    Attributes:
        token: Its id [].
        probability: What it was drawn with, after all filters [].
        logits: The model's, before any [V].
    """

    token: Tensor
    probability: Tensor
    logits: Tensor

    def log_probabilities(self, count: int) -> tuple[float, dict[int, float]]:
        """What the model itself thinks, before any filter, in nats.

        Returns:
            The log-probability of the token, and those of the `count` likeliest ones.
        """
        every = torch.log_softmax(self.logits.float(), dim=-1)
        values, tokens = torch.topk(every, min(count, len(every)))
        likeliest = dict(zip(tokens.tolist(), values.tolist(), strict=True))
        return float(every[self.token]), likeliest


class Draws:
    """Draws the tokens of one sequence, one after the other.

    Args:
        sampling: How: penalty, bias, then top-k, temperature, top-p, min-p.
        generator: Where the randomness comes from; None for torch's global one.
    """

    def __init__(self, sampling: SamplingConfig, generator: torch.Generator | None = None) -> None:
        self.sampling = sampling
        self.generator = generator
        self.recent: deque[int] = deque(maxlen=sampling.repeat_window)

    def next(self, logits: Tensor) -> Choice:
        """Draw a token from the logits [V] of its place.

        Raises:
            NopeError: The logits are not numbers.
            UsageError: A token with a bias is not in the vocabulary.
        """
        sampling = self.sampling
        changed = penalize_repeats(logits, self.recent, sampling.repeat_penalty)
        tokens, probabilities = candidates(
            add_bias(changed, sampling.biases),
            top_k=sampling.top_k,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
        )
        token, probability = draw(tokens, probabilities, self.generator)
        self.recent.append(int(token))
        return Choice(token, probability, logits)


def penalize_repeats(logits: Tensor, recent: deque[int], penalty: float) -> Tensor:
    """Take a share of its logit's size from a token for each of its recent uses.

    Args:
        logits: [V].
        recent: Recently generated tokens; each occurrence counts.
        penalty: The share, from 0 to 1.
    """
    if not recent or penalty == 0.0:
        return logits
    counts = Counter(recent)
    tokens = torch.tensor(list(counts), device=logits.device)
    uses = torch.tensor(list(counts.values()), device=logits.device, dtype=logits.dtype)
    chosen = logits[tokens]
    factor = torch.where(chosen > 0, (1.0 - penalty) ** uses, (1.0 + penalty) ** uses)
    return logits.index_put((tokens,), chosen * factor)


def add_bias(logits: Tensor, biases: Mapping[int, float]) -> Tensor:
    """Add to the logits [V] of some tokens.

    Raises:
        UsageError: A token is not in the vocabulary.
    """
    if not biases:
        return logits
    if max(biases) >= len(logits):
        raise UsageError(
            f"--logit-bias names token {max(biases)}, and the vocabulary ends at {len(logits) - 1}"
        )
    tokens = torch.tensor(list(biases), device=logits.device)
    values = torch.tensor(list(biases.values()), device=logits.device, dtype=logits.dtype)
    return logits.index_add(0, tokens, values)


def candidates(
    logits: Tensor, *, top_k: int, temperature: float, top_p: float, min_p: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The tokens that may come next and their probabilities, likeliest first.

    They are looked for where the logits are, and brought to the CPU: there each of the many small
    operations on few numbers takes less time, and a seed draws the same from the same candidates,
    whatever the device. Candidates of equal logits come in any order.

    Args:
        logits: [V].
        top_k: Keep this many, 0 for all.
        temperature: Divide the logits by this; 0 keeps the likeliest alone.
        top_p: Keep the likeliest while their probabilities sum to at most this, and
            always the first; 1 keeps all.
        min_p: Keep those of at least this share of the likeliest one's probability.

    Returns:
        Tokens [K] and probabilities [K], which sum to 1, on the CPU.

    Raises:
        NopeError: The logits are not numbers.
    """
    logits, size = logits.float(), logits.numel()
    count = 1 if temperature == 0.0 else min(top_k or size, size)
    if count < size:
        kept, tokens = (x.cpu() for x in torch.topk(logits, count))
        scaled = (kept - finite(kept[0])) / (temperature or 1.0)
        total = float(scaled.logsumexp(dim=-1))
    else:
        scaled = (logits - finite(logits.max())) / (temperature or 1.0)
        total = float(scaled.logsumexp(dim=-1))
        tokens = (scaled >= least_score(total, size, top_p, min_p)).nonzero()[:, 0]
        scaled, order = scaled[tokens].sort(descending=True)
        scaled, tokens = scaled.cpu(), tokens[order].cpu()
    if len(tokens) == 1:
        return tokens, torch.ones(1)
    if top_p < 1.0:
        inside = (scaled - total).exp().cumsum(dim=-1) <= top_p
        count = max(int(inside.sum()), 1)
        scaled, tokens = scaled[:count], tokens[:count]
    if min_p > 0.0:
        count = int((scaled >= math.log(min_p)).sum())
        scaled, tokens = scaled[:count], tokens[:count]
    return tokens, torch.softmax(scaled, dim=-1)


def finite(best: Tensor) -> float:
    """The largest logit [].

    Raises:
        NopeError: It is no finite number.
    """
    value = float(best)
    if not math.isfinite(value):
        raise NopeError(
            f"the model's largest logit is {value}",
            hint="its weights hold numbers that are not finite: export or download it again",
        )
    return value


def least_score(total: float, size: int, top_p: float, min_p: float) -> float:
    """A score below which no token is kept, so that only those above it need to be sorted.

    All tokens that are less likely than (1 - p) / 2V are less than half of 1 - p together, and so
    beyond the first ones that sum to p.

    Args:
        total: The log-sum-exp of all scores, of which the best is 0.
        size: V.
        top_p, min_p: As those of `candidates`.
    """
    by_sum = total + math.log((1.0 - top_p) / (2 * size)) if top_p < 1.0 else -math.inf
    by_share = math.log(min_p) if min_p > 0.0 else -math.inf
    return max(by_sum, by_share)


def draw(
    tokens: Tensor, probabilities: Tensor, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Draw one candidate; returns a token [] and the probability [] it was drawn with."""
    weights = probabilities.to(generator.device) if generator else probabilities
    choice = int(torch.multinomial(weights, 1, generator=generator))
    return tokens[choice], probabilities[choice]
