"""A conversation with a model: messages, what of them it sees, and its answers, without a terminal.

All messages are kept; the model sees the newest whole turns that fit, after the system message. A
turn is what a user said and everything up to what they say next, calls of tools and their results
included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from nope_gpt.chat.tools import Call, Tool, calls_in, told
from nope_gpt.config import ChatConfig
from nope_gpt.errors import UsageError
from nope_gpt.generation.streaming import Piece, Statistics, TextStream
from nope_gpt.memory import Message
from nope_gpt.model import NoPEGPT
from nope_gpt.network.caching import KVCache
from nope_gpt.tokenization import BaseTokenizer, ChatTokenizer

LONGEST_CHAIN = 5
"""Answers in a row that may ask for tools."""

NOT_ALLOWED = '{"error": "the user did not allow it"}'
"""What the model is told of a call that was not carried out."""


@dataclass(frozen=True)
class Window:
    """What the model sees of a conversation.

    Attributes:
        system: Tokens of the system message.
        history: Tokens of the messages.
        context: Tokens that the model may look back on.
        messages: That it sees.
        forgotten: Messages that it sees no more.
    """

    system: int
    history: int
    context: int
    messages: int
    forgotten: int

    @property
    def free(self) -> int:
        """Tokens left for what is to come."""
        return max(self.context - self.system - self.history, 0)


class ChatSession:
    """A conversation.

    Args:
        model: A chat model.
        tokenizer: The model's.
        config: The system message, the length of the memory, and how to draw.
        generator: Source of randomness; None for torch's global one.
        tools: Functions that the model is told of, by name.

    Attributes:
        messages: All that was said, without the system message.
        statistics: What the last answer took.

    Raises:
        UsageError: The model is a base model, which knows no turns.
    """

    kind: type[BaseTokenizer] = ChatTokenizer

    def __init__(
        self,
        model: NoPEGPT,
        tokenizer: BaseTokenizer,
        config: ChatConfig,
        generator: torch.Generator | None = None,
        tools: Mapping[str, Tool] | None = None,
    ) -> None:
        if not isinstance(tokenizer, self.kind):
            raise UsageError(
                "this is a base model, which was never taught to take turns",
                hint="continue a text with `nope generate`, or teach it with `nope tune`",
            )
        self.model = model
        self.tokenizer = tokenizer
        self.config = config
        self.generator = generator
        self.tools = dict(tools or {})
        self.messages: list[Message] = []
        self.cache: KVCache | None = None
        self.statistics: Statistics | None = None

    def reply(self, text: str) -> Iterator[Piece]:
        """Answer a message, streaming; what was said is kept even if the stream is left early.

        Raises:
            UsageError: The message alone is too long for the context; it is not kept.
        """
        self.messages.append({"role": "user", "content": text})
        try:
            prompt = self.prompt()
        except UsageError:
            self.messages.pop()
            raise
        return self.written(prompt, "")

    def answer(self) -> Iterator[Piece]:
        """Write the next message: an answer to a question, or to the results of tools.

        Raises:
            UsageError: There is nothing to answer.
        """
        if not self.messages or self.messages[-1]["role"] == "assistant":
            raise UsageError("there is nothing to answer yet")
        return self.written(self.prompt(), "")

    def retry(self) -> Iterator[Piece]:
        """Answer the last question again; the answer that it had is forgotten.

        Raises:
            UsageError: There is no question.
        """
        self.rewind()
        return self.answer()

    def proceed(self) -> Iterator[Piece]:
        """Go on with an answer that was cut.

        Raises:
            UsageError: The last message is none.
        """
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise UsageError("there is no answer to go on with")
        begun = self.messages.pop()["content"]
        return self.written(self.prompt() + self.tokenizer.tokenize(begun), begun)

    def written(self, prompt: list[int], begun: str) -> Iterator[Piece]:
        """Stream an answer after a prompt, and remember it after what it begins with."""
        stream = TextStream(
            self.model, self.tokenizer, prompt, self.config, self.generator, self.reusable()
        )
        self.statistics = stream.statistics
        said = [begun]
        try:
            for piece in stream:
                said.append(piece.text)
                yield piece
        finally:
            content = "".join(said).strip()
            if content or stream.statistics.reason != "interrupted":
                self.messages.append({"role": "assistant", "content": content})

    def rewind(self) -> str:
        """Forget all after the last question; returns it.

        Raises:
            UsageError: There is no question.
        """
        place = self.last_question()
        del self.messages[place + 1 :]
        return self.messages[place]["content"]

    def undo(self) -> str:
        """Forget the last question and all after it; returns the question.

        Raises:
            UsageError: There is no question.
        """
        question = self.rewind()
        self.messages.pop()
        return question

    def last_question(self) -> int:
        """Where the last question is.

        Raises:
            UsageError: Nothing was asked.
        """
        places = [index for index, m in enumerate(self.messages) if m["role"] == "user"]
        if not places:
            raise UsageError("nothing was asked yet")
        return places[-1]

    def calls(self) -> list[Call]:
        """What the last answer asks for, if the model was told of tools."""
        last = self.messages[-1] if self.messages else {"role": ""}
        if not self.tools or last["role"] != "assistant":
            return []
        return calls_in(last["content"], self.tools)

    def add_result(self, content: str) -> None:
        """Remember what a tool gave; `answer` lets the model go on."""
        self.messages.append({"role": "tool", "content": content})

    def reusable(self) -> KVCache:
        """The cache of the conversation, so that only what is new in it is read.

        Between answers its reader may change: what compiles meanwhile is taken once it is there.
        """
        config = self.config
        if self.cache is None or self.cache.capacity != config.context_length:
            self.cache = self.model.new_cache(
                config.context_length, pinned=config.pin_tokens, compile=config.compile
            )
        elif self.cache.reader is None:
            self.cache.reader = self.model.reader(config.compile)
        return self.cache

    def prompt(self) -> list[int]:
        """The tokens that the model answers: what it sees, and the header of the answer.

        Raises:
            UsageError: The last turn alone is too long.
        """
        return self.tokens_of([*self.system(), *self.visible()])

    def tokens_of(self, messages: Sequence[Message]) -> list[int]:
        """The tokens of messages, and the header of the answer to come."""
        assert isinstance(self.tokenizer, ChatTokenizer)
        return self.tokenizer.tokenize_prompt(messages)

    def system(self) -> list[Message]:
        """The system message, with the tools in it, if there is one."""
        text = told(self.tools, self.config.system_message)
        return [{"role": "system", "content": text}] if text else []

    def visible(self) -> list[Message]:
        """The messages that the model sees: the newest whole turns that fit, at least the last.

        Raises:
            UsageError: The last turn alone is too long.
        """
        parts = turns(self.messages)
        while len(parts) > 1 and sum(map(len, parts)) > self.config.max_message_history:
            parts.pop(0)
        while True:
            history = [message for part in parts for message in part]
            size = len(self.tokens_of([*self.system(), *history]))
            if size <= self.config.context_length:
                return history
            if len(parts) == 1:
                raise UsageError(
                    f"the message and the system message are {size:,} tokens, and the "
                    f"context holds {self.config.context_length:,}",
                    hint="raise --context-length, or say less",
                )
            parts.pop(0)

    def window(self) -> Window:
        """What the model sees now, in tokens."""
        history = self.visible()
        header, system = len(self.tokens_of([])), len(self.tokens_of(self.system()))
        return Window(
            system=system - header,
            history=len(self.tokens_of([*self.system(), *history])) - system,
            context=self.config.context_length,
            messages=len(history),
            forgotten=len(self.messages) - len(history),
        )


class Completion(ChatSession):
    """A base model in the place of a chat model: it continues each message as a text."""

    kind = BaseTokenizer

    def tokens_of(self, messages: Sequence[Message]) -> list[int]:
        text = "".join(message["content"] for message in messages)
        return self.tokenizer.tokenize(text) or [self.tokenizer.end_of_text]

    def system(self) -> list[Message]:
        return []

    def visible(self) -> list[Message]:
        place = self.last_question()
        return self.messages[place : place + 1]


def session_of(
    model: NoPEGPT,
    tokenizer: BaseTokenizer,
    config: ChatConfig,
    tools: Mapping[str, Tool] | None = None,
) -> ChatSession:
    """A conversation with a chat model, or with a base model that continues messages."""
    kind = ChatSession if isinstance(tokenizer, ChatTokenizer) else Completion
    return kind(model, tokenizer, config, tools=tools)


def rounds(
    session: ChatSession, pieces: Iterator[Piece], result_of: Callable[[Call], str]
) -> Iterator[Iterator[Piece]]:
    """An answer, and those that follow it while each asks for tools.

    Args:
        session: Of the conversation.
        pieces: The answer; each must be read to its end before the next is asked for.
        result_of: Carries out a call, and returns what to tell the model.
    """
    for _ in range(LONGEST_CHAIN):
        yield pieces
        calls = session.calls()
        if not calls:
            return
        for call in calls:
            session.add_result(result_of(call))
        pieces = session.answer()


def turns(messages: Sequence[Message]) -> list[list[Message]]:
    """Split a conversation before every question."""
    places = [index for index, message in enumerate(messages) if message["role"] == "user"]
    bounds = sorted({0, *places, len(messages)})
    return [list(messages[first:end]) for first, end in pairwise(bounds)]
