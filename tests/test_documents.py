"""Rows become documents, or are refused with a reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nope_gpt.config import PrepareConfig
from nope_gpt.data.documents import (
    BARE_PAIRS,
    COMPLETIONS,
    MESSAGES,
    PAIRS,
    Conversation,
    Preference,
    Refused,
    Schema,
    canonical,
    document_of,
    schema_of,
)
from nope_gpt.data.prepare import prepare
from nope_gpt.errors import NopeError

TEXT = Schema("text", ("text",))
CHAT = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hi.\n"}]


def test_the_same_messages_of_which_other_answers_are_trained_are_another_document() -> None:
    asked, answered = {"prompt": CHAT[:1], "completion": CHAT[1:]}, {"messages": CHAT}
    documents = [document_of(asked, COMPLETIONS), document_of(answered, MESSAGES)]
    assert canonical(documents[0]) != canonical(documents[1])


def test_answers_that_tell_the_prompt_again_have_it_once() -> None:
    worse = [CHAT[0], {"role": "assistant", "content": "No."}]
    row = {"prompt": CHAT[0]["content"], "chosen": CHAT, "rejected": worse}
    found = document_of(row, PAIRS)
    assert isinstance(found, Preference)
    assert (found.chosen.messages, found.rejected.messages) == (CHAT, worse)


def test_texts_with_half_a_character_are_told_apart_too() -> None:
    assert len({canonical(text) for text in ("a\ud800", "a\ud801", "a?", "a")}) == 4


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (["text"], TEXT),
        (["id", "text", "url"], TEXT),
        (["messages", "text"], MESSAGES),
        (["prompt", "chosen", "rejected", "messages"], MESSAGES),
        (["prompt", "chosen", "rejected", "text"], PAIRS),
        (["chosen", "rejected"], BARE_PAIRS),
        (["prompt", "completion", "text"], COMPLETIONS),
        (["prompt"], None),
        ([], None),
    ],
)
def test_the_columns_tell_what_a_row_is(columns: list[str], expected: Schema | None) -> None:
    assert schema_of(columns, "text") == expected


@pytest.mark.parametrize(
    ("row", "schema", "reason"),
    [
        ({"messages": [{"role": "human", "content": "x"}]}, MESSAGES, "a role that is none of"),
        ({"messages": [{"role": None, "content": "x"}]}, MESSAGES, "a role that is none of"),
        ({"messages": [{"role": ["user"]}]}, MESSAGES, "a role that is none of"),
        ({"messages": ["hello"]}, MESSAGES, "a role that is none of"),
        ({"messages": [{"role": "user", "content": None}]}, MESSAGES, "a message without text"),
        ({"messages": [{"role": "user"}]}, MESSAGES, "a message without text"),
        ({"messages": None}, MESSAGES, "no list of messages"),
        ({"messages": "hello"}, MESSAGES, "no list of messages"),
        ({"text": "x"}, MESSAGES, "no list of messages"),
        ([1], MESSAGES, "something else than an object"),
        ({"text": None}, TEXT, "no text"),
        ({"text": 5}, TEXT, "no text"),
        ({"body": "y"}, TEXT, "no text"),
        ("text", TEXT, "something else than an object"),
        ({"text": " \n"}, TEXT, "nothing but blanks"),
        ({"prompt": None, "completion": "x"}, COMPLETIONS, "no list of messages"),
        ({"chosen": "a", "rejected": "a"}, BARE_PAIRS, "two answers that are the same"),
    ],
)
def test_a_row_that_is_no_document_is_refused_with_the_reason(
    row: Any, schema: Schema, reason: str
) -> None:
    with pytest.raises(Refused, match=reason):
        document_of(row, schema)


@pytest.mark.parametrize("schema", [MESSAGES, COMPLETIONS])
def test_a_file_may_mix_both_forms_of_a_conversation(schema: Schema) -> None:
    assert document_of({"messages": CHAT}, schema) == Conversation(CHAT)
    row = {"prompt": "Why?", "completion": "So."}
    asked, answer = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
    assert document_of(row, schema) == Conversation([asked, answer], 1)


def test_only_role_and_content_of_a_message_are_kept() -> None:
    messages = [message | {"name": None, "score": 1.5} for message in CHAT]
    assert document_of({"messages": messages, "id": 7}, MESSAGES) == Conversation(CHAT)


def test_refused_rows_are_counted_by_reason_with_the_place_of_the_first(tmp_path: Path) -> None:
    rows = [
        {"messages": CHAT},
        {"messages": CHAT[:1]},
        {"messages": [{"role": "human", "content": "x"}]},
        {"messages": [*CHAT[:1], {"role": "assistant", "content": "Yes."}]},
        {"messages": CHAT[:1]},
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = PrepareConfig(dataset_path="root", token_encoding="bytes")
    (made,) = prepare([str(tmp_path / "chats.jsonl")], config)
    assert made.statistics["documents"] == 2
    assert made.statistics["refused"] == {
        "no answer": {"count": 2, "first": "chats.jsonl:2"},
        "a role that is none of system, user, assistant, tool": {
            "count": 1,
            "first": "chats.jsonl:3",
        },
    }


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["text", "messages", "role", "content", "x"]), inner)
    ),
    max_leaves=8,
)
KEYS = ["text", "messages", "prompt", "completion", "chosen", "rejected"]
ROWS = st.dictionaries(st.sampled_from(KEYS), VALUES | st.just(CHAT) | st.just("x")) | VALUES


@settings(max_examples=300, deadline=None)
@given(row=ROWS, schema=st.sampled_from([TEXT, MESSAGES, PAIRS, BARE_PAIRS, COMPLETIONS]))
def test_a_row_of_anything_is_a_document_or_refused(row: Any, schema: Schema) -> None:
    try:
        document = document_of(row, schema)
    except Refused as refused:
        assert str(refused)
    else:
        assert canonical(document)


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(ROWS, max_size=4))
def test_a_table_of_anything_is_prepared_or_refused(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any]
) -> None:
    path = tmp_path_factory.getbasetemp() / "anything.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    root = tmp_path_factory.mktemp("root")
    try:
        (made,) = prepare(
            [str(path)], PrepareConfig(dataset_path=str(root), token_encoding="bytes")
        )
    except NopeError:
        assert not list(root.iterdir())
    else:
        refused = sum(entry["count"] for entry in made.statistics["refused"].values())
        assert made.statistics["documents"] + refused == len(rows)
