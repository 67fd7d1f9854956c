"""A prompt to its continuation, token by token, on the model's cache.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from nope_gpt.config import SamplingConfig
from nope_gpt.errors import UsageError
from nope_gpt.generation.sampling import Choice, Draws
from nope_gpt.network.caching import KVCache

LONGEST_PHRASE = 3
"""Tokens that a draft is looked up by, at most (Saxena, "Prompt lookup decoding", 2023)."""


class LanguageModel(Protocol):
    """What generation needs of a model."""

    @property
    def vocabulary_size(self) -> int: ...

    @property
    def first_token(self) -> int | None:
        """What all it reads is to begin with, if it was trained so."""
        ...

    @property
    def device(self) -> torch.device: ...

    def predict(
        self,
        tokens: Tensor,
        cache: KVCache,
        rows: Sequence[int] | None = None,
        *,
        every: bool = False,
    ) -> Tensor:
        """Read tokens [B, T], which are on the CPU; the logits [B, V] after the last, or after
        every one [B, T, V].
        """
        ...

    def new_cache(
        self, capacity: int, batch_size: int = 1, *, pinned: int = 0, compile: str = "off"
    ) -> KVCache:
        """An empty cache."""
        ...


def continuation(
    model: LanguageModel,
    prompt: Sequence[int],
    sampling: SamplingConfig,
    generator: torch.Generator | None = None,
    cache: KVCache | None = None,
) -> Generator[Choice, None, int]:
    """Continue a prompt token by token; the caller decides which token ends it.

    Args:
        model: Predicts.
        prompt: Token ids, at least one.
        sampling: How many tokens, how far the model looks back, and how to draw.
        generator: Source of randomness; None for torch's global one.
        cache: Of an earlier call, of one row: what the prompt has in common with what it has
            read is not read again. None for a new one.

    Returns:
        An iterator over the tokens; it has checked the prompt, but read nothing yet.

    Raises:
        UsageError: The prompt is empty or holds unknown tokens.
        CapacityError: The memory is too small for the context.
    """
    kept = within_context(checked(prompt, model.vocabulary_size), sampling, model.first_token)
    if cache is None:
        cache = cache_for(model, len(kept), sampling)
    unread = kept[cache.reuse(0, kept) :]
    ahead = Lookahead(model, cache, sampling.draft_tokens)
    return drawn(ahead, unread, Draws(sampling, generator), sampling.max_tokens)


def drawn(
    ahead: Lookahead, unread: list[int], draws: Draws, count: int
) -> Generator[Choice, None, int]:
    """Draw tokens, each from what the model says after all before it."""
    for _ in range(count):
        choice = draws.next(ahead.predict(unread))
        yield choice
        unread = [int(choice.token)]
    return count


def pairs(choices: Iterator[Choice]) -> Generator[tuple[Tensor, Tensor], None, int]:
    """Each token [] and the probability [] that it was drawn with."""
    count = 0
    for choice in choices:
        count += 1
        yield choice.token, choice.probability
    return count


def cache_for(
    model: LanguageModel, num_tokens: int, sampling: SamplingConfig, batch_size: int = 1
) -> KVCache:
    """A cache for prompts of so many tokens at most, and what is to follow them."""
    capacity = min(sampling.context_length, num_tokens + sampling.max_tokens)
    pinned = min(sampling.pin_tokens, capacity - 1)
    return model.new_cache(capacity, batch_size, pinned=pinned, compile=sampling.compile)


def checked(prompt: Sequence[int], vocabulary_size: int) -> list[int]:
    """The prompt, if it is one.

    Raises:
        UsageError: It is empty or holds unknown tokens.
    """
    ids = list(prompt)
    if not ids:
        raise UsageError("the prompt is empty, and must be at least one token")
    for token in (min(ids), max(ids)):
        if not 0 <= token < vocabulary_size:
            raise UsageError(
                f"the prompt holds token {token}, and the vocabulary ends at {vocabulary_size - 1}",
                hint="use the tokenizer of this model",
            )
    return ids


def within_context(
    prompt: list[int], sampling: SamplingConfig, first_token: int | None
) -> list[int]:
    """What of a prompt is read: all of it, or the pinned tokens and the last ones.

    Before it comes the first token that the model was trained with, unless it is there.
    """
    length, pinned = sampling.context_length, sampling.pin_tokens
    if first_token is not None:
        prompt = prompt if prompt[0] == first_token else [first_token, *prompt]
        pinned = min(pinned + 1, length - 1)
    if len(prompt) <= length:
        return prompt
    return prompt[:pinned] + prompt[pinned - length :]


class Lookahead:
    """Reads, with what is to be read, a guess of what follows; where it is right, that saves
    reading all weights once for each token.

    The guess is what followed the last time that the newest tokens were seen. What the model
    says is the same with any guess, so the draws are, too, where reading several tokens at
    once gives the logits of reading them one by one: bit for bit by the native reader.

    Args:
        model: Predicts.
        cache: Of one row.
        most: Tokens of a guess, 0 for none.
    """

    def __init__(self, model: LanguageModel, cache: KVCache, most: int) -> None:
        self.model = model
        self.cache = cache
        self.most = most
        self.guess: list[int] = []
        self.logits: list[Tensor] = []
        self.seen: list[int] = cache.tokens[0].copy()
        self.after: dict[tuple[int, ...], int] = {}
        if most:
            self.index(0)

    def predict(self, tokens: list[int]) -> Tensor:
        """Read tokens; returns the logits [V] of the one that follows."""
        if self.most:
            self.seen += tokens
            self.index(len(self.seen) - len(tokens))
        if self.logits:
            if tokens == self.guess[:1]:
                self.guess.pop(0)
                return self.logits.pop(0)
            self.cache.truncate(0, len(self.cache.tokens[0]) - len(self.guess))
            self.logits = []
        self.guess = self.guessed(len(tokens))
        row = torch.tensor([tokens + self.guess])
        if not self.guess:
            return self.model.predict(row, self.cache)[0]
        logits = self.model.predict(row, self.cache, every=True)[0, len(tokens) - 1 :]
        first, *self.logits = logits.unbind()
        return first

    def index(self, start: int) -> None:
        """Note, for the tokens from a place on, which phrases they follow."""
        for place in range(start, len(self.seen)):
            for length in range(1, min(LONGEST_PHRASE, place) + 1):
                self.after[tuple(self.seen[place - length : place])] = place

    def guessed(self, num_new: int) -> list[int]:
        """What followed the last time that the newest tokens were seen, if they were."""
        most = min(self.most, self.cache.capacity - len(self.seen))
        if most < 1 or num_new > 1:
            return []
        for length in range(LONGEST_PHRASE, 0, -1):
            place = self.after.get(tuple(self.seen[-length:]))
            if place is not None:
                guess = self.seen[place : place + most]
                # What follows may come to the end of the text: then it goes round.
                period = len(self.seen) - place
                return guess + [guess[i % period] for i in range(len(guess), most)]
        return []
