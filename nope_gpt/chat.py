"""A conversation with a model: messages, memory and streaming text, without a terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from nope_gpt.config import ChatConfig, SamplingConfig
from nope_gpt.errors import UsageError
from nope_gpt.memory import BufferWindowMemory, Message
from nope_gpt.model import NoPEGPT
from nope_gpt.tokenization import BaseTokenizer, ChatTokenizer, StreamDecoder


class Piece(NamedTuple):
    """Streamed text, and the probability of the token that completed it."""

    text: str
    probability: float


@dataclass
class Statistics:
    """What the last stream took.

    Attributes:
        prompt_tokens: Tokens read.
        new_tokens: Tokens written, the one that stopped it included.
        first_seconds: Time to the first token.
        seconds: Time in all.
        reason: Why it ended: "stop", "length" or "interrupted".
    """

    prompt_tokens: int
    new_tokens: int = 0
    first_seconds: float = 0.0
    seconds: float = 0.0
    reason: str = "interrupted"

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed, the first token left out; 0 if there was no other."""
        seconds = self.seconds - self.first_seconds
        return (self.new_tokens - 1) / seconds if self.new_tokens > 1 and seconds else 0.0

    def __str__(self) -> str:
        return (
            f"{self.new_tokens} tokens · {self.tokens_per_second:.1f} tok/s · "
            f"first after {self.first_seconds:.2f} s · prompt {self.prompt_tokens} tokens · "
            f"{self.reason}"
        )


class TextStream:
    """A prompt's continuation as text, up to a stop token.

    Args:
        model: Writes.
        tokenizer: The model's.
        prompt: Token ids, at least one.
        sampling: How to draw.
        generator: Source of randomness; None for torch's global one.
    """

    def __init__(
        self,
        model: NoPEGPT,
        tokenizer: BaseTokenizer,
        prompt: list[int],
        sampling: SamplingConfig,
        generator: torch.Generator | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.statistics = Statistics(min(len(prompt), sampling.context_length))
        self.tokens = model.generate(
            torch.tensor(prompt, dtype=torch.int64),
            max_tokens=sampling.max_tokens,
            context_length=sampling.context_length,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            repeat_penalty=sampling.repeat_penalty,
            repeat_window=sampling.repeat_window,
            generator=generator,
        )

    def __iter__(self) -> Iterator[Piece]:
        decoder, statistics = StreamDecoder(self.tokenizer), self.statistics
        started = time.perf_counter()
        reason = "length"
        for token, probability in self.tokens:
            statistics.new_tokens += 1
            statistics.seconds = time.perf_counter() - started
            if statistics.new_tokens == 1:
                statistics.first_seconds = statistics.seconds
            if int(token) in self.tokenizer.stop_tokens:
                reason = "stop"
                break
            if text := decoder.decode(token):
                yield Piece(text, float(probability))
        if text := decoder.flush():
            yield Piece(text, 0.0)
        statistics.reason = reason


class ChatSession:
    """A conversation.

    Args:
        model: A chat model.
        tokenizer: The model's.
        config: The system message, the length of the memory, and how to draw.
        generator: Source of randomness; None for torch's global one.

    Raises:
        UsageError: The model is a base model, which knows no turns.
    """

    def __init__(
        self,
        model: NoPEGPT,
        tokenizer: BaseTokenizer,
        config: ChatConfig,
        generator: torch.Generator | None = None,
    ) -> None:
        if not isinstance(tokenizer, ChatTokenizer):
            raise UsageError(
                "this is a base model, which was never taught to take turns",
                hint="continue a text with `nope generate`, or teach it with `nope tune`",
            )
        self.model = model
        self.tokenizer = tokenizer
        self.config = config
        self.generator = generator
        self.memory = BufferWindowMemory(config.max_message_history)
        self.statistics: Statistics | None = None

    def reply(self, text: str) -> Iterator[Piece]:
        """Answer a message, streaming.

        What was said is remembered even if the stream is left early.
        """
        before = self.memory.messages.copy()
        self.memory.add_message({"role": "user", "content": text})
        try:
            prompt = self.prompt()
        except UsageError:
            self.memory.messages = before
            raise
        stream = TextStream(self.model, self.tokenizer, prompt, self.config, self.generator)
        self.statistics = stream.statistics
        said: list[str] = []
        try:
            for piece in stream:
                said.append(piece.text)
                yield piece
        finally:
            self.memory.add_message({"role": "assistant", "content": "".join(said).strip()})

    def prompt(self) -> list[int]:
        """The system message and as much of the history as the context holds, whole messages.

        Raises:
            UsageError: The last message alone is too long.
        """
        system: list[Message] = []
        if self.config.system_message:
            system = [{"role": "system", "content": self.config.system_message}]
        history = self.memory.get_history()
        while True:
            tokens = self.tokenizer.tokenize_prompt([*system, *history])
            if len(tokens) <= self.config.context_length:
                return tokens
            if len(history) == 1:
                raise UsageError(
                    f"the message and the system message are {len(tokens):,} tokens, and the "
                    f"context holds {self.config.context_length:,}",
                    hint="raise --context-length, or say less",
                )
            history = history[1:]
            while len(history) > 1 and history[0]["role"] != "user":
                history = history[1:]
