"""Short-term memory of a conversation."""

from __future__ import annotations

from collections import deque

from nope_gpt.errors import UsageError

Message = dict[str, str]


class BufferWindowMemory:
    """Remember the newest messages of a conversation.

    The system message is not part of it: put it in front of the history yourself.

    Args:
        max_messages: Messages to remember; the oldest are forgotten beyond that.

    Raises:
        UsageError: `max_messages` is below 1.
    """

    def __init__(self, max_messages: int) -> None:
        if max_messages < 1:
            raise UsageError(f"max_messages is {max_messages}, and must be at least 1")
        self.messages: deque[Message] = deque(maxlen=max_messages)

    def add_message(self, message: Message) -> None:
        """Remember a message, a dict with `role` and `content`."""
        self.messages.append(message)

    def get_history(self) -> list[Message]:
        """The remembered messages, oldest first, beginning with a question.

        A window of even length cuts between a question and its answer at every second
        turn. An answer without its question is left out, because no model was trained on
        conversations that begin with one.
        """
        history = list(self.messages)
        if any(message["role"] == "user" for message in history):
            while history[0]["role"] in ("assistant", "tool"):
                history.pop(0)
        return history
