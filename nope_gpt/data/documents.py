"""Rows to documents: texts, conversations and pairs of a better and a worse answer.

What a table holds is told by its columns, in this order: `messages`; `chosen` and
`rejected`, with or without `prompt`; `prompt` and `completion`; the text column.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from nope_gpt.memory import Message

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Conversation:
    """Messages, of which the answers from `first_trained` on are for the model to write."""

    messages: list[Message]
    first_trained: int = 0


@dataclass(frozen=True)
class Preference:
    """Two conversations that part at an answer: one is better than the other."""

    chosen: Conversation
    rejected: Conversation


Document = str | Conversation | Preference

TEXT = "text"
CHAT = "chat"
PREFERENCE = "preference"
CONTENTS = (TEXT, CHAT, PREFERENCE)
"""What a data set can hold."""


@dataclass(frozen=True)
class Schema:
    """What the rows of a table are, and the columns that say so."""

    content: str
    columns: tuple[str, ...]


MESSAGES = Schema(CHAT, ("messages",))
PAIRS = Schema(PREFERENCE, ("prompt", "chosen", "rejected"))
BARE_PAIRS = Schema(PREFERENCE, ("chosen", "rejected"))
COMPLETIONS = Schema(CHAT, ("prompt", "completion"))


def schema_of(columns: Iterable[str], text_column: str) -> Schema | None:
    """Tell from its columns what a table holds, or None if it is nothing known."""
    present = set(columns)
    for schema in (MESSAGES, PAIRS, BARE_PAIRS, COMPLETIONS, Schema(TEXT, (text_column,))):
        if present.issuperset(schema.columns):
            return schema
    return None


class Refused(Exception):
    """A row that is no document to train on; its message is the reason."""


def document_of(row: Any, schema: Schema) -> Document:
    """The document that a row is.

    Raises:
        Refused: It is none.
    """
    if not isinstance(row, Mapping):
        raise Refused("something else than an object")
    if schema.content == TEXT:
        return text_of(row.get(schema.columns[0]))
    if schema.content == CHAT:  # Lines of JSON may have either form, whatever the first one has.
        forms = (form for form in (MESSAGES, COMPLETIONS) if row.keys() >= set(form.columns))
        schema = next(forms, schema)
    if schema == MESSAGES:
        return Conversation(messages_of(row.get("messages")))
    if schema == COMPLETIONS:
        prompt = spoken(row.get("prompt"), "user")
        return Conversation(prompt + spoken(row.get("completion"), "assistant"), len(prompt))
    return preference_of(row)


def text_of(value: Any) -> str:
    """A text that says something."""
    if not isinstance(value, str):
        raise Refused("no text")
    if not value.strip():
        raise Refused("nothing but blanks")
    return value


def preference_of(row: Mapping[str, Any]) -> Preference:
    """A pair whose answers differ, each trained from where they part."""
    chosen, rejected = (answered(row.get("prompt"), row.get(key)) for key in PAIRS.columns[1:])
    pairs = zip(chosen, rejected, strict=False)
    shared = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(chosen), len(rejected)))
    if chosen == rejected:
        raise Refused("two answers that are the same")
    return Preference(Conversation(chosen, shared), Conversation(rejected, shared))


def answered(prompt: Any, answer: Any) -> list[Message]:
    """A prompt and its answer, which may tell the prompt again."""
    messages = spoken(answer, "assistant")
    if isinstance(prompt, str) and any(message["role"] != "assistant" for message in messages):
        return messages
    return messages if prompt is None else spoken(prompt, "user") + messages


def spoken(value: Any, role: str) -> list[Message]:
    """Messages, given as such or as what one of them says."""
    return [{"role": role, "content": value}] if isinstance(value, str) else messages_of(value)


def messages_of(value: Any) -> list[Message]:
    """Messages with a known role and text, their other keys left out."""
    if not isinstance(value, list):
        raise Refused("no list of messages")
    result = []
    for message in value:
        role = message.get("role") if isinstance(message, Mapping) else None
        if role not in ROLES:
            raise Refused(f"a role that is none of {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise Refused("a message without text in `content`")
        result.append({"role": role, "content": message["content"]})
    return result


def canonical(document: Document) -> bytes:
    """The bytes that two documents share only if they are the same."""
    if isinstance(document, str):
        return document.encode("utf-8", "surrogatepass")
    if isinstance(document, Conversation):
        value: Any = document.messages
        if document.first_trained:
            value = {"messages": value, "first_trained": document.first_trained}
    else:
        value = [document.chosen.messages, document.rejected.messages]
    return json.dumps(value, sort_keys=True).encode()


def texts_of(document: Document) -> list[str]:
    """The texts in a document."""
    if isinstance(document, str):
        return [document]
    if isinstance(document, Conversation):
        return [message["content"] for message in document.messages]
    return texts_of(document.chosen) + texts_of(document.rejected)
