"""From logits to tokens: pure functions on one row of logits, and the loop over them.

Shapes: V vocabulary, K kept candidates.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Generator

import torch
from torch import Tensor

from nope_gpt.config import SamplingConfig

Predict = Callable[[Tensor], Tensor]
"""Reads new tokens [T] and returns the logits [V] of the one that follows."""


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


def candidates(
    logits: Tensor, *, top_k: int, temperature: float, top_p: float
) -> tuple[Tensor, Tensor]:
    """The tokens that may come next and their probabilities, likeliest first.

    Args:
        logits: [V].
        top_k: Keep this many, 0 for all.
        temperature: Divide the logits by this; 0 keeps the likeliest alone.
        top_p: Keep the likeliest while their probabilities sum to at most this, and
            always the first; 1 keeps all.

    Returns:
        Tokens [K] and probabilities [K], which sum to 1.
    """
    size = logits.numel()
    count = 1 if temperature == 0.0 else min(top_k or size, size)
    kept, tokens = torch.topk(logits.float(), count, sorted=True)
    if count == 1:
        return tokens, torch.ones_like(kept)
    scaled = (kept - kept[0]) / temperature
    if top_p < 1.0:
        inside = torch.softmax(scaled, dim=-1).cumsum(dim=-1) <= top_p
        inside[0] = True
        scaled, tokens = scaled[inside], tokens[inside]
    return tokens, torch.softmax(scaled, dim=-1)


def draw(
    tokens: Tensor, probabilities: Tensor, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Draw one candidate; returns a token [] and the probability [] it was drawn with."""
    choice = torch.multinomial(probabilities, 1, generator=generator).squeeze(0)
    return tokens[choice], probabilities[choice]


def generate(
    predict: Predict,
    prompt: Tensor,
    sampling: SamplingConfig,
    generator: torch.Generator | None = None,
) -> Generator[tuple[Tensor, Tensor], None, int]:
    """Continue a prompt token by token.

    Args:
        predict: The model, remembering what it has read.
        prompt: [T], at least one token.
        sampling: How to draw: penalty, then top-k, then temperature, then top-p.
        generator: Where the randomness comes from; None for torch's global one.

    Yields:
        A token [] and the probability [] that it was drawn with, after all filters.

    Returns:
        How many tokens were generated.
    """
    recent: deque[int] = deque(maxlen=sampling.repeat_window)
    unread = prompt
    for _ in range(sampling.max_tokens):
        logits = penalize_repeats(predict(unread), recent, sampling.repeat_penalty)
        tokens, probabilities = candidates(
            logits,
            top_k=sampling.top_k,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
        )
        token, probability = draw(tokens, probabilities, generator)
        recent.append(int(token))
        yield token, probability
        unread = token.unsqueeze(0)
    return sampling.max_tokens
