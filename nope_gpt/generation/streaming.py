"""A prompt's continuation as text that streams, with what it took."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch

from nope_gpt.amounts import format_bytes
from nope_gpt.config import SamplingConfig
from nope_gpt.device import memory_in_use
from nope_gpt.generation.continuation import LanguageModel, cache_for, continuation, within_context
from nope_gpt.generation.sampling import Choice
from nope_gpt.network.caching import KVCache
from nope_gpt.tokenization import BaseTokenizer, StreamDecoder


class Piece(NamedTuple):
    """Streamed text, and the probability of the token that completed it."""

    text: str
    probability: float


@dataclass
class Statistics:
    """What a stream took.

    Attributes:
        prompt_tokens: Tokens of the prompt that are in the context.
        reused_tokens: Of these, the ones that did not need to be read again.
        new_tokens: Tokens written, the one that stopped it included.
        first_seconds: Time to the first token.
        seconds: Time in all.
        memory: Bytes of the process, or of the tensors on a GPU, or None if not known.
        reason: Why it ended: "stop", "length" or "interrupted".
    """

    prompt_tokens: int
    reused_tokens: int = 0
    new_tokens: int = 0
    first_seconds: float = 0.0
    seconds: float = 0.0
    memory: int | None = None
    reason: str = "interrupted"

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed, the first token left out; 0 if there was no other."""
        seconds = self.seconds - self.first_seconds
        return (self.new_tokens - 1) / seconds if self.new_tokens > 1 and seconds else 0.0

    @property
    def prompt_tokens_per_second(self) -> float:
        """Speed of reading the prompt."""
        read = self.prompt_tokens - self.reused_tokens
        return read / self.first_seconds if self.first_seconds else 0.0

    def __str__(self) -> str:
        reused = f", {self.reused_tokens} reused" if self.reused_tokens else ""
        memory = "" if self.memory is None else f" · {format_bytes(self.memory)}"
        return (
            f"{self.new_tokens} tokens · {self.tokens_per_second:.1f} tok/s · "
            f"first after {self.first_seconds:.2f} s · prompt {self.prompt_tokens} tokens{reused} "
            f"at {self.prompt_tokens_per_second:,.0f} tok/s{memory} · {self.reason}"
        )

    def as_dict(self) -> dict[str, Any]:
        """Everything, the speeds included."""
        return asdict(self) | {
            "tokens_per_second": self.tokens_per_second,
            "prompt_tokens_per_second": self.prompt_tokens_per_second,
        }


class TextStream:
    """A prompt's continuation as text, up to a stop token or a stop text.

    Args:
        model: Writes.
        tokenizer: The model's.
        prompt: Token ids, at least one.
        sampling: How to draw, and where to stop.
        generator: Source of randomness; None for torch's global one.
        cache: Of an earlier stream, for what the prompts have in common.
        log_probabilities: Note the log-probability of every token, and of so many likeliest.

    Attributes:
        statistics: What it took so far.
        scores: The notes on the tokens, the one that stopped it included.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: BaseTokenizer,
        prompt: Sequence[int],
        sampling: SamplingConfig,
        generator: torch.Generator | None = None,
        cache: KVCache | None = None,
        log_probabilities: int | None = None,
    ) -> None:
        self.log_probabilities = log_probabilities
        self.tokenizer = tokenizer
        self.sampling = sampling
        kept = within_context(list(prompt), sampling, model.first_token)
        self.cache = cache_for(model, len(kept), sampling) if cache is None else cache
        self.device = model.device
        self.statistics = Statistics(len(kept), reused_tokens=self.cache.num_shared(0, kept))
        self.scores: list[dict[str, Any]] = []
        self.tokens = continuation(model, prompt, sampling, generator, self.cache)

    def __iter__(self) -> Iterator[Piece]:
        decoder, cutter = StreamDecoder(self.tokenizer), StopText(self.sampling.stop)
        statistics, started = self.statistics, time.perf_counter()
        reason = "length"
        for choice in self.tokens:
            if self.log_probabilities is not None:
                self.note(choice, self.log_probabilities)
            statistics.new_tokens += 1
            statistics.seconds = time.perf_counter() - started
            if statistics.new_tokens == 1:
                statistics.first_seconds = statistics.seconds
            if int(choice.token) in self.tokenizer.stop_tokens:
                reason = "stop"
                break
            yield from cutter.pass_on(decoder.decode(choice.token), float(choice.probability))
            if cutter.is_over:
                reason = "stop"
                break
        yield from cutter.pass_on(decoder.flush(), 0.0)
        yield from cutter.rest()
        statistics.memory = memory_in_use(self.device)
        statistics.reason = "stop" if cutter.is_over else reason

    def note(self, choice: Choice, count: int) -> None:
        """Remember what the model thinks of a token, and of the likeliest ones."""
        own, likeliest = choice.log_probabilities(count)
        self.scores.append(
            {
                "token": int(choice.token),
                "text": self.tokenizer.decode_tokens([int(choice.token)]),
                "probability": float(choice.probability),
                "log_probability": own,
                "likeliest": {str(token): value for token, value in likeliest.items()},
            }
        )


class StopText:
    """Passes text on up to the first of some texts, and holds back what may be part of one.

    Args:
        stops: Texts, none of them empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = stops
        self.held: list[Piece] = []
        self.is_over = False

    def pass_on(self, text: str, probability: float) -> Iterator[Piece]:
        """What can be shown now that a text has come."""
        if self.is_over or not text:
            return
        self.held.append(Piece(text, probability))
        joined = "".join(piece.text for piece in self.held)
        found = [place for stop in self.stops if (place := joined.find(stop)) >= 0]
        if found:
            yield from self.release(min(found))
            self.held, self.is_over = [], True
            return
        beginnings = {stop[:size] for stop in self.stops for size in range(1, len(stop))}
        held_back = max((len(part) for part in beginnings if joined.endswith(part)), default=0)
        yield from self.release(len(joined) - held_back)

    def release(self, count: int) -> Iterator[Piece]:
        """The first so many characters that are held."""
        while count > 0:
            piece = self.held.pop(0)
            if len(piece.text) > count:
                self.held.insert(0, Piece(piece.text[count:], piece.probability))
                piece = Piece(piece.text[:count], piece.probability)
            count -= len(piece.text)
            yield piece

    def rest(self) -> Iterator[Piece]:
        """What was held back, now that no more text comes."""
        held, self.held = self.held, []
        yield from held


def generate_text(
    model: LanguageModel,
    tokenizer: BaseTokenizer,
    prompt: str,
    *,
    generator: torch.Generator | None = None,
    **sampling: Any,
) -> Iterator[str]:
    """Continue a text as a stream of texts that never split a character.

    Args:
        model: Writes.
        tokenizer: The model's.
        prompt: What to continue; an empty one begins a text.
        generator: Source of randomness; None for torch's global one.
        sampling: Any of `SamplingConfig`: `max_tokens`, `temperature`, `stop`, ...

    Raises:
        TypeError: There is no such setting; a seed is one of the generator.
        UsageError: A setting is out of its range.
    """
    tokens = tokenizer.tokenize(prompt) or [tokenizer.end_of_text]
    for piece in TextStream(model, tokenizer, tokens, SamplingConfig(**sampling), generator):
        yield piece.text
