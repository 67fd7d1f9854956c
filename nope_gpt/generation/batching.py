"""Many prompts through one model, each row of the batch taken by the next as it falls free.

Every sequence draws from a randomness of its own, and is computed row by row: its text does
not depend on its neighbours where rows do not, which is bit for bit by the native reader.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nope_gpt.config import SamplingConfig
from nope_gpt.generation.continuation import LanguageModel, cache_for, checked, within_context
from nope_gpt.generation.sampling import Draws
from nope_gpt.generation.streaming import StopText
from nope_gpt.tokenization import BaseTokenizer, StreamDecoder


@dataclass(frozen=True)
class Request:
    """A prompt to continue.

    Attributes:
        prompt: Token ids, at least one.
        seed: Of its draws.
    """

    prompt: Sequence[int]
    seed: int


@dataclass(frozen=True)
class Answer:
    """What a request got.

    Attributes:
        index: Of the request.
        text: Up to what stopped it.
        new_tokens: Tokens written, the one that stopped it included.
        reason: "stop" or "length".
    """

    index: int
    text: str
    new_tokens: int
    reason: str

    def as_dict(self) -> dict[str, Any]:
        """What people want to know of it."""
        return {"text": self.text, "new_tokens": self.new_tokens, "reason": self.reason}


class Row:
    """A request while it is answered.

    Args:
        index: Of the request.
        request: What to answer.
        tokenizer: The model's.
        sampling: How to draw, and where to stop.
    """

    def __init__(
        self,
        index: int,
        request: Request,
        tokenizer: BaseTokenizer,
        sampling: SamplingConfig,
    ) -> None:
        self.index = index
        self.tokenizer = tokenizer
        self.most = sampling.max_tokens
        self.draws = Draws(sampling, torch.Generator().manual_seed(request.seed))
        self.decoder = StreamDecoder(tokenizer)
        self.cutter = StopText(sampling.stop)
        self.said: list[str] = []
        self.newest = 0
        self.count = 0

    def take(self, logits: torch.Tensor) -> Answer | None:
        """Draw the next token from its logits [V]; the answer, if that is its end."""
        token = self.draws.next(logits).token
        self.newest = int(token)
        self.count += 1
        if self.newest in self.tokenizer.stop_tokens:
            return self.answer("stop")
        self.say(self.decoder.decode(token))
        if self.cutter.is_over:
            return self.answer("stop")
        return self.answer("length") if self.count == self.most else None

    def say(self, text: str) -> None:
        self.said += [piece.text for piece in self.cutter.pass_on(text, 1.0)]

    def answer(self, reason: str) -> Answer:
        """The text so far."""
        self.say(self.decoder.flush())
        reason = "stop" if self.cutter.is_over else reason
        self.said += [piece.text for piece in self.cutter.rest()]
        return Answer(self.index, "".join(self.said), self.count, reason)


def answers(
    model: LanguageModel,
    tokenizer: BaseTokenizer,
    requests: Sequence[Request],
    sampling: SamplingConfig,
    batch_size: int,
) -> Iterator[Answer]:
    """Answer requests in their order, several at a time.

    Args:
        model: Writes.
        tokenizer: The model's.
        requests: What to answer.
        sampling: How to draw, and where to stop; the same for all.
        batch_size: Requests that are answered at a time, at most.

    Raises:
        UsageError: A prompt is empty or holds unknown tokens.
        CapacityError: The memory is too small for so many contexts.
    """
    prompts = [
        within_context(checked(request.prompt, model.vocabulary_size), sampling, model.first_token)
        for request in requests
    ]
    if not prompts:
        return
    num_rows = min(batch_size, len(prompts))
    cache = cache_for(model, max(map(len, prompts)), sampling, num_rows)
    waiting = iter(range(len(prompts)))
    rows: dict[int, Row] = {}
    done: dict[int, Answer] = {}
    next_index = 0
    while next_index < len(prompts):
        for place in set(range(num_rows)) - rows.keys():
            for index in waiting:
                cache.truncate(place, 0)
                row = Row(index, requests[index], tokenizer, sampling)
                read = torch.tensor([prompts[index]])
                answer = row.take(model.predict(read, cache, [place])[0])
                if answer is None:
                    rows[place] = row
                    break
                done[index] = answer
        if rows:
            places = sorted(rows)
            newest = torch.tensor([[rows[place].newest] for place in places])
            for place, logits in zip(places, model.predict(newest, cache, places), strict=True):
                answer = rows[place].take(logits)
                if answer:
                    done[answer.index] = answer
                    del rows[place]
        while next_index in done:
            yield done.pop(next_index)
            next_index += 1
