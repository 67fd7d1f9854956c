"""A conversation with a model: messages and memory, without a terminal."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from nope_gpt.caching import KVCache
from nope_gpt.config import ChatConfig
from nope_gpt.errors import UsageError
from nope_gpt.memory import BufferWindowMemory, Message
from nope_gpt.model import NoPEGPT
from nope_gpt.streaming import Piece, Statistics, TextStream
from nope_gpt.tokenization import BaseTokenizer, ChatTokenizer


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
        self.cache: KVCache | None = None
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
        stream = TextStream(
            self.model, self.tokenizer, prompt, self.config, self.generator, self.reusable()
        )
        self.statistics = stream.statistics
        said: list[str] = []
        try:
            for piece in stream:
                said.append(piece.text)
                yield piece
        finally:
            self.memory.add_message({"role": "assistant", "content": "".join(said).strip()})

    def reusable(self) -> KVCache:
        """The cache of the conversation, so that only what is new in it is read.

        Between answers its reader may change: what compiles meanwhile is taken once it is there.
        """
        config = self.config
        if self.cache is None:
            self.cache = self.model.new_cache(
                config.context_length, pinned=config.pin_tokens, compile=config.compile
            )
        elif self.cache.reader is None:
            self.cache.reader = self.model.reader(config.compile)
        return self.cache

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
