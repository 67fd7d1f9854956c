"""Conversations as files: a line of JSON each, which `nope prepare` and `nope tune` read too."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nope_gpt.data.documents import Refused, messages_of
from nope_gpt.errors import MissingError, NopeError
from nope_gpt.files.json_files import DAMAGE, ESCAPED, parse_json
from nope_gpt.files.writing import write_file, writing
from nope_gpt.memory import Message


def save(path: Path, messages: Sequence[Message], facts: Mapping[str, Any]) -> None:
    """Write a conversation as the only line of a file, which is replaced in one step.

    Args:
        path: Of it.
        messages: The system message among them.
        facts: What else to keep beside them, such as the model.
    """
    write_file(path, line_of(messages, facts).encode("utf-8", ESCAPED))


def add(path: Path, messages: Sequence[Message], facts: Mapping[str, Any]) -> None:
    """Add a conversation to a file of several."""
    with writing(path), path.open("ab") as file:
        file.write(line_of(messages, facts).encode("utf-8", ESCAPED))


def line_of(messages: Sequence[Message], facts: Mapping[str, Any]) -> str:
    """A conversation as a line."""
    return json.dumps({"messages": list(messages), **facts}, ensure_ascii=False) + "\n"


def load(path: Path) -> list[Message]:
    """The messages of the last conversation of a file; other fields are left alone.

    Raises:
        MissingError: There is no such file.
        NopeError: It holds something else.
    """
    try:
        # Not at what str.splitlines takes for the end of a line: JSON has it within texts.
        lines = [line for line in path.read_bytes().split(b"\n") if line.strip()]
        return messages_of(parse_json(lines[-1].decode("utf-8"))["messages"])
    except FileNotFoundError:
        raise MissingError("there is no such transcript", where=str(path)) from None
    except Refused as refusal:
        raise NopeError(f"this is no transcript: {refusal}", where=str(path)) from None
    except DAMAGE as error:
        reason = f"{type(error).__name__}: {error}"
        raise NopeError(f"this is no transcript ({reason})", where=str(path)) from None


def as_markdown(messages: Sequence[Message]) -> str:
    """A conversation for people."""
    return (
        "\n\n".join(f"**{message['role']}**\n\n{message['content']}" for message in messages) + "\n"
    )
