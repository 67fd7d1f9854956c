"""A chat remembers its newest messages, and never begins in the middle of a turn."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nope_gpt.errors import UsageError
from nope_gpt.memory import BufferWindowMemory, Message

ROLES = st.sampled_from(("system", "user", "assistant", "tool"))


def conversation(roles: str) -> list[Message]:
    """Numbered messages of the roles that begin with the given letters."""
    names = {name[0]: name for name in ("system", "user", "assistant", "tool")}
    return [{"role": names[letter], "content": str(i)} for i, letter in enumerate(roles)]


def remembered(messages: list[Message], window: int) -> list[Message]:
    memory = BufferWindowMemory(window)
    for message in messages:
        memory.add_message(message)
    return memory.get_history()


@pytest.mark.parametrize(
    ("roles", "window", "kept"),
    [
        ("", 4, ""),
        ("uau", 4, "012"),
        ("uaua", 4, "0123"),
        ("uauau", 4, "234"),  # The window begins with an answer, which is left out.
        ("uauau", 5, "01234"),
        ("uatau", 3, "4"),  # So is a tool's reply.
        ("uauau", 1, "4"),
    ],
)
def test_the_newest_messages_are_remembered(roles: str, window: int, kept: str) -> None:
    history = remembered(conversation(roles), window)
    assert "".join(message["content"] for message in history) == kept


@pytest.mark.parametrize("window", range(1, 9))
def test_every_question_reaches_the_model_at_the_end_of_whole_turns(window: int) -> None:
    memory = BufferWindowMemory(window)
    for question, answer in zip(*[iter(conversation("ua" * 10))] * 2, strict=True):
        memory.add_message(question)
        history = memory.get_history()
        assert history[-1] == question
        roles = [message["role"] for message in history]
        assert roles == [("user", "assistant")[i % 2] for i in range(len(roles))]
        assert len(roles) <= window
        memory.add_message(answer)


@settings(max_examples=60, deadline=None)
@given(st.lists(ROLES, max_size=12), st.integers(1, 8))
def test_a_history_with_a_question_never_begins_with_an_answer(
    roles: list[str], window: int
) -> None:
    messages = [{"role": role, "content": str(index)} for index, role in enumerate(roles)]
    history = remembered(messages, window)
    newest = messages[-window:]
    assert history == newest[len(newest) - len(history) :]
    if any(message["role"] == "user" for message in newest):
        assert history[0]["role"] in ("system", "user")
        # Nothing else is forgotten.
        forgotten = newest[: len(newest) - len(history)]
        assert {message["role"] for message in forgotten} <= {"assistant", "tool"}
    else:
        assert history == newest


@pytest.mark.parametrize("window", [0, -1])
def test_a_memory_without_room_is_refused(window: int) -> None:
    with pytest.raises(UsageError, match=f"max_messages is {window}, and must be at least 1"):
        BufferWindowMemory(window)


def test_changing_a_history_changes_no_memory() -> None:
    memory = BufferWindowMemory(2)
    memory.add_message({"role": "user", "content": "hello"})
    memory.get_history().clear()
    assert memory.get_history() == [{"role": "user", "content": "hello"}]
