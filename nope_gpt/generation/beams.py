"""Beam search: the likeliest continuation, as far as some hypotheses side by side can tell.

Shapes: N hypotheses, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nope_gpt.config import SamplingConfig
from nope_gpt.generation.continuation import LanguageModel, cache_for, checked, within_context


@dataclass(frozen=True)
class Hypothesis:
    """A continuation.

    Attributes:
        tokens: Its ids, the stop token included, if it came to one.
        log_probability: Of all of it, in nats.
        score: The log-probability over a power of the number of tokens.
        is_finished: Whether it came to a stop token.
    """

    tokens: list[int]
    log_probability: float
    score: float
    is_finished: bool


Beam = tuple[list[int], float]
"""Tokens so far, and their log-probability."""


def extended(
    live: list[Beam],
    logits: Tensor,
    stop_tokens: Sequence[int] | frozenset[int],
    num_beams: int,
) -> tuple[list[Beam], list[int], list[Beam]]:
    """The likeliest ways on by a token.

    Args:
        live: Those that go on, M of them.
        logits: After each [M, V].
        stop_tokens: What finishes one.
        num_beams: That are to go on at most.

    Returns:
        Those that go on, the likeliest first; which of `live` each comes from; those that end.
    """
    totals = torch.tensor([total for _, total in live], dtype=torch.float64)
    every = torch.log_softmax(logits.cpu().double(), dim=-1) + totals[:, None]
    count = min(num_beams * (1 + len(stop_tokens)), every.numel())
    grown: list[Beam] = []
    parents: list[int] = []
    ended: list[Beam] = []
    for total, place in zip(*(x.tolist() for x in torch.topk(every.flatten(), count)), strict=True):
        parent, token = divmod(place, every.size(1))
        tokens = [*live[parent][0], token]
        if token in stop_tokens:
            ended.append((tokens, total))
        elif len(grown) < num_beams:
            grown.append((tokens, total))
            parents.append(parent)
    return grown, parents, ended


def beam_search(
    model: LanguageModel,
    prompt: Sequence[int],
    sampling: SamplingConfig,
    *,
    num_beams: int,
    length_penalty: float = 1.0,
    stop_tokens: Sequence[int] | frozenset[int] = (),
) -> list[Hypothesis]:
    """Search for the continuations with the best scores.

    A score is the log-probability divided by tokens ** length_penalty (Wu et al., 2016,
    without its constants). The search ends when no hypothesis that goes on can still come
    among the best: its score at most is that of its log-probability now, over the power of
    the greatest length.

    Args:
        model: Predicts.
        prompt: Token ids, at least one.
        sampling: How many tokens at most, and how far the model looks back.
        num_beams: N, and how many are returned at most.
        length_penalty: At least 0, for the plain log-probability; 1 for the mean.
        stop_tokens: What finishes a hypothesis.

    Returns:
        The best first.
    """
    kept = within_context(checked(prompt, model.vocabulary_size), sampling, model.first_token)
    cache = cache_for(model, len(kept), sampling, num_beams)
    logits = model.predict(torch.tensor([kept]), cache, [0])
    live: list[Beam] = [([], 0.0)]
    finished: list[Hypothesis] = []

    def hypothesis(tokens: list[int], total: float, *, is_finished: bool) -> Hypothesis:
        score = total / len(tokens) ** length_penalty
        return Hypothesis(tokens, total, score, is_finished)

    for length in range(1, sampling.max_tokens + 1):
        live, parents, ended = extended(live, logits, stop_tokens, num_beams)
        finished += [hypothesis(*pair, is_finished=True) for pair in ended]
        finished = sorted(finished, key=lambda item: -item.score)[:num_beams]
        if not live or length == sampling.max_tokens:
            break
        best_to_come = live[0][1] / sampling.max_tokens**length_penalty
        if len(finished) == num_beams and finished[-1].score >= best_to_come:
            live = []
            break
        rows = list(range(len(live)))
        cache.select([*parents, *[0] * (num_beams - len(live))])
        newest = torch.tensor([tokens[-1:] for tokens, _ in live])
        logits = model.predict(newest, cache, rows)
    unfinished = [hypothesis(*pair, is_finished=False) for pair in live]
    return sorted([*finished, *unfinished], key=lambda item: -item.score)[:num_beams]
