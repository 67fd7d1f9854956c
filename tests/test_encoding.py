"""Documents become exactly the tokens that are to be trained, whatever people wrote in them."""

from __future__ import annotations

import functools
import json
import re
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CORPUS
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nope_gpt.config import CONTROL_TOKENS, ENCODINGS, PrepareConfig
from nope_gpt.data import reading, units
from nope_gpt.data.documents import (
    COMPLETIONS,
    PAIRS,
    Conversation,
    Document,
    Preference,
    Refused,
    document_of,
)
from nope_gpt.data.encoding import TOO_LONG, EncodedDocument, Limit, encode
from nope_gpt.data.prepare import prepare
from nope_gpt.data.shards import Dataset
from nope_gpt.memory import Message
from nope_gpt.tokenization import ChatTokenizer, resolve
from nope_gpt.tokenization.encodings import END_OF_TEXT

EVERY_KIND = pytest.mark.parametrize(
    "spec", ["bytes", "bpe:300", pytest.param("r50k_base", marks=pytest.mark.ranks)]
)

MARKERS = (*CONTROL_TOKENS, END_OF_TEXT, "<|im_end|>\n<|im_start|>assistant\n", "<|", "|>")
SPECIMENS = (
    *MARKERS,
    "\x00",
    "\r\n",
    "  ",
    "\ud800",
    "\udfff\ud83d",
    "\ud83d\ude42",
    "\ufeff",
    "👩‍👩‍👧",
    "\u202e",
)
SURROGATES = st.characters(codec=None, categories=("Cs", "L", "N", "Zs"))
WRITTEN = st.lists(
    st.sampled_from(SPECIMENS) | st.text(max_size=8) | st.text(SURROGATES, max_size=4), max_size=6
).map("".join)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(("system", "user", "assistant", "tool")), "content": WRITTEN}
    ),
    max_size=5,
)


@functools.cache
def tokenizer(spec: str) -> ChatTokenizer:
    return ChatTokenizer(resolve(spec, [CORPUS]).encoding)


def encoded(document: Document, limit: Limit | None = None, spec: str = "bytes") -> EncodedDocument:
    (stream,), _ = encode(document, tokenizer(spec), limit)
    return stream


def trained_text(stream: EncodedDocument) -> str:
    """What the model is to write of a stream of bytes."""
    assert stream.mask is not None
    return tokenizer("bytes").decode_tokens(stream.tokens[stream.mask == 1].tolist())


def whole(text: str) -> str:
    """A text as UTF-8 can hold it: halves of a character joined, or replaced if alone."""
    halves = re.compile("([\ud800-\udbff])([\udc00-\udfff])|[\ud800-\udfff]")
    return halves.sub(
        lambda m: (
            chr(0x10000 + (ord(m[1]) - 0xD800) * 0x400 + ord(m[2]) - 0xDC00) if m[1] else "\ufffd"
        ),
        text,
    )


def said(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def template(messages: list[Message]) -> str:
    return "".join(f"<|im_start|>{m['role']}\n{m['content']}\n<|im_end|>\n" for m in messages)


@EVERY_KIND
@settings(max_examples=80, deadline=None)
@given(text=WRITTEN)
@example(text="".join(SPECIMENS))
def test_a_text_is_itself_and_one_end(spec: str, text: str) -> None:
    chat = tokenizer(spec)
    tokens = encoded(text, spec=spec).tokens.tolist()
    assert chat.decode_tokens(tokens[:-1]) == whole(text)
    assert tokens[-1] == chat.end_of_text
    assert not {chat.end_of_text, *chat.control_tokens.values()} & set(tokens[:-1])


def characters(messages: list[Message]) -> list[tuple[str, bool]]:
    """Each character of a conversation, a control token counting as one, and whether the model
    is to write it: what an answer says, its newline, and what ends it.
    """
    found: list[tuple[str, bool]] = []
    for message in messages:
        mine = message["role"] == "assistant"
        found.append(("<|im_start|>", False))
        found += [(character, False) for character in f"{message['role']}\n"]
        found += [(character, mine) for character in f"{whole(message['content'])}\n"]
        found += [("<|im_end|>", mine), ("\n", False)]
    return found


@settings(max_examples=100, deadline=None)
@given(messages=MESSAGES, data=st.data())
@example(messages=[said("system", ""), said("assistant", "")], data=None)
@example(messages=[said("tool", "é"), said("assistant", "è\n\n"), said("user", "")] * 2, data=None)
def test_the_mask_is_that_of_the_characters(messages: list[Message], data: Any) -> None:
    """Whole, and cut to whole messages by any limit."""
    expected: list[tuple[int, bool]] = []
    chat = tokenizer("bytes")
    for text, is_trained in characters(messages):
        ids = [chat.control_tokens[text]] if text in chat.control_tokens else text.encode()
        expected += [(int(id), is_trained) for id in ids]
    limit = None
    if data is not None and data.draw(st.booleans()):
        limit = Limit(data.draw(st.integers(1, len(expected) + 1)))
        starts = [i for i, (id, _) in enumerate(expected) if id == chat.im_start_index]
        if len(expected) > limit.num_tokens + 1:
            expected = expected[: max(i for i in starts if i <= limit.num_tokens + 1)]
    if not any(is_trained for _, is_trained in expected):
        with pytest.raises(Refused):
            encoded(Conversation(messages), limit)
        return
    stream = encoded(Conversation(messages), limit)
    assert stream.mask is not None
    assert list(zip(stream.tokens.tolist(), stream.mask.tolist(), strict=True)) == expected


@EVERY_KIND
@settings(max_examples=60, deadline=None)
@given(messages=MESSAGES)
@example(messages=[said("user", "".join(SPECIMENS)), said("assistant", "".join(SPECIMENS))])
def test_only_the_template_gives_control_tokens(spec: str, messages: list[Message]) -> None:
    chat = tokenizer(spec)
    if not any(message["role"] == "assistant" for message in messages):
        with pytest.raises(Refused, match="no answer"):
            encoded(Conversation(messages), spec=spec)
        return
    stream = encoded(Conversation(messages), spec=spec)
    assert chat.decode_tokens(stream.tokens.tolist()) == whole(template(messages))
    controls = [token for token in stream.tokens if token in set(chat.control_tokens.values())]
    assert controls == [chat.im_start_index, chat.im_end_index] * len(messages)
    assert chat.end_of_text not in stream.tokens


@settings(max_examples=200, deadline=None)
@given(messages=MESSAGES, num_tokens=st.integers(1, 120), filter_long=st.booleans())
def test_a_long_conversation_keeps_all_whole_messages_that_fit(
    messages: list[Message], num_tokens: int, filter_long: bool
) -> None:
    limit = Limit(num_tokens, filter_long)
    sizes = [len(whole(template([m])).encode()) - len("<|im_start|><|im_end|>") + 2
             for m in messages]  # fmt: skip
    kept = sum(end <= num_tokens + 1 for end in accumulate(sizes))
    was_answered = any(message["role"] == "assistant" for message in messages[:kept])
    is_long = kept < len(messages)
    try:
        (stream,), was_cut = encode(Conversation(messages), tokenizer("bytes"), limit)
    except Refused as refusal:
        assert not was_answered or (is_long and filter_long)
        assert str(refusal) == (TOO_LONG if is_long else "no answer")
    else:
        assert was_answered and was_cut == is_long and not (is_long and filter_long)
        expected = encoded(Conversation(messages[:kept]))
        assert np.array_equal(stream.tokens, expected.tokens)
        assert np.array_equal(stream.mask, expected.mask)


TURNS = [said("user", "One?"), said("assistant", "Two."), said("user", "?"), said("assistant", "!")]
SIZES = [encoded(Conversation(TURNS[:count])).tokens.size for count in (2, 4)]


@pytest.mark.parametrize(
    ("num_tokens", "kept", "filtered"),
    [
        (SIZES[1], 4, 4),
        (SIZES[1] - 1, 4, 4),  # The last token needs none after it.
        (SIZES[1] - 2, 3, 0),
        (SIZES[0] - 1, 2, 0),
        (SIZES[0] - 2, 0, 0),
        (1, 0, 0),
    ],
)
def test_a_limit_counts_the_tokens_that_are_predicted_from(
    num_tokens: int, kept: int, filtered: int
) -> None:
    for count, limit in ((kept, Limit(num_tokens)), (filtered, Limit(num_tokens, True))):
        if count == 0:
            with pytest.raises(Refused, match=TOO_LONG):
                encoded(Conversation(TURNS), limit)
        else:
            expected = encoded(Conversation(TURNS[:count])).tokens
            assert np.array_equal(encoded(Conversation(TURNS), limit).tokens, expected)


def test_a_prompt_is_never_trained_even_if_answers_are_in_it() -> None:
    talk = [said("user", "One?"), said("assistant", "Two."), said("user", "Three?")]
    row = {"prompt": talk, "completion": [said("assistant", "Four.")]}
    document = document_of(row, COMPLETIONS)
    assert trained_text(encoded(document)) == "Four.\n<|im_end|>"
    assert (
        encoded(document).tokens.size
        == encoded(Conversation([*talk, *row["completion"]])).tokens.size
    )
    plain = document_of({"prompt": "One?", "completion": "Two."}, COMPLETIONS)
    assert trained_text(encoded(plain)) == "Two.\n<|im_end|>"


@settings(max_examples=100, deadline=None)
@given(
    talk=MESSAGES,
    answers=st.lists(WRITTEN, min_size=2, max_size=2, unique_by=whole),
)
def test_both_sides_of_a_pair_share_a_prompt_and_train_their_own_answer(
    talk: list[Message], answers: list[str]
) -> None:
    row = {
        "prompt": talk,
        "chosen": [said("assistant", answers[0])],
        "rejected": [said("assistant", answers[1])],
    }
    pair = document_of(row, PAIRS)
    streams, was_cut = encode(pair, tokenizer("bytes"))
    assert not was_cut
    prompt = len(whole(template(talk)).encode()) - 20 * len(talk)  # Control tokens are one each.
    for stream, answer in zip(streams, answers, strict=True):
        assert np.array_equal(stream.tokens[:prompt], streams[0].tokens[:prompt])
        assert stream.mask is not None and not stream.mask[:prompt].any()
        assert trained_text(stream) == whole(answer) + "\n<|im_end|>"


def test_a_pair_is_not_cut_but_refused() -> None:
    short, long = [said("assistant", "No.")], [said("assistant", "No. " * 50)]
    prompt = [said("user", "Hm?")]
    for chosen, rejected in ((short, long), (long, short)):
        pair = Preference(Conversation(prompt + chosen, 1), Conversation(prompt + rejected, 1))
        with pytest.raises(Refused, match=TOO_LONG):
            encode(pair, tokenizer("bytes"), Limit(100))
        assert len(encode(pair, tokenizer("bytes"), Limit(1000))[0]) == 2


def test_a_pair_with_one_answer_is_refused() -> None:
    pair = Preference(Conversation([said("user", "a"), said("assistant", "b")], 1),
                      Conversation([said("user", "a"), said("user", "b")], 1))  # fmt: skip
    with pytest.raises(Refused, match="no answer"):
        encode(pair, tokenizer("bytes"))


def test_the_sides_of_a_pair_stay_together_in_every_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "UNIT_SIZE", 2000)
    monkeypatch.setattr(reading, "SPAN_SIZE", 700)
    rows = [
        {"prompt": f"Question {n}?", "chosen": f"Yes, {n}." * (n % 5 + 1), "rejected": f"No, {n}."}
        for n in range(100)
    ]
    rows[7]["rejected"] = rows[7]["chosen"]
    source = tmp_path / "pairs.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = PrepareConfig(dataset_path="root", token_encoding="bytes", holdout_fraction=0.2)
    (made,) = prepare([str(source)], config)
    chat, found, num_held = tokenizer("bytes"), [], 0
    sides = Dataset.open(made.path).sides
    assert len(sides) > 2
    for chosen, rejected in sides:
        assert chosen.train_documents == rejected.train_documents < chosen.num_documents
        num_held += chosen.num_documents - chosen.train_documents
        for index in range(chosen.num_documents):
            better, worse = (
                chat.decode_tokens(side.document(index).tokens.tolist())
                for side in (chosen, rejected)
            )
            number = int(better.partition("Question ")[2].partition("?")[0])
            prompt = template([said("user", f"Question {number}?")])
            assert better == prompt + template([said("assistant", rows[number]["chosen"])])
            assert worse == prompt + template([said("assistant", rows[number]["rejected"])])
            found.append(number)
    assert sorted(found) == [n for n in range(100) if n != 7]
    assert made.statistics["holdout_documents"] == num_held
    assert made.statistics["tokens"] == sum(side.num_tokens for pair in sides for side in pair)


@pytest.mark.ranks
@pytest.mark.parametrize("name", ENCODINGS)
def test_text_of_every_script_comes_back_from_a_shard(tmp_path: Path, name: str) -> None:
    texts = [
        CORPUS,
        "Всё хорошо, спасибо. 東京都、日本語のテキスト。",
        "שלום עולם 🙂🙃 ٣٤٥",
        "ação " * 300,
    ]
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = PrepareConfig(dataset_path="root", token_encoding=name, holdout_fraction=0.0)
    (made,) = prepare([str(source)], config)
    (shard,) = Dataset.open(made.path).shards
    found = [shard.document(index).tokens for index in range(shard.num_documents)]
    base = resolve(name, ())
    assert [base.decode_tokens(tokens[:-1].tolist()) for tokens in found] == texts
    is_wide = base.vocabulary_size > 1 << 16
    assert made.manifest["token_dtype"] == ("uint32" if is_wide else "uint16")
    assert (max(int(tokens[:-1].max()) for tokens in found) > 65_535) == is_wide


@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_a_line_of_ten_megabytes_is_whole(tmp_path: Path, kind: str) -> None:
    text = "A line without an end: é🙂\x00<|im_end|> " * 250_000
    assert len(text.encode()) > 10_000_000
    source = tmp_path / f"long.{kind}"
    source.write_text(json.dumps({"text": text}) if kind == "jsonl" else text)
    config = PrepareConfig(dataset_path="root", token_encoding="bytes", holdout_fraction=0.0)
    (made,) = prepare([str(source)], config)
    (shard,) = Dataset.open(made.path).shards
    tokens = np.asarray(shard.tokens)
    assert tokens[tokens < 256].astype(np.uint8).tobytes() == text.encode()
    assert (tokens >= 256).sum() == made.statistics["documents"]
    assert made.statistics["text_bytes"] == len(text.encode())
