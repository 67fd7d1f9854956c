"""Text to ids and back: the published ids, whole characters, and text that stays text."""

from __future__ import annotations

import base64
import functools
import json
import os
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import CORPUS
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nope_gpt.config import CONTROL_TOKENS, ENCODINGS
from nope_gpt.errors import MissingError, NopeError, UsageError
from nope_gpt.memory import Message
from nope_gpt.tokenization import (
    BaseTokenizer,
    ChatTokenizer,
    StreamDecoder,
    resolve,
    tokenizer_of,
)
from nope_gpt.tokenization.encodings import END_OF_TEXT, keep_downloads

ranks = pytest.mark.ranks

EVERY_KIND = pytest.mark.parametrize(
    "spec", ["bytes", "bpe:300", pytest.param("r50k_base", marks=ranks)]
)
"""A tokenizer of each kind: without training, trained, and tiktoken's."""

MARKERS = (*CONTROL_TOKENS, END_OF_TEXT, "<|im_sep|>", "<|", "|>", "im_end")
SPECIMENS = (
    *MARKERS,
    "\x00",
    "\n",
    "\r\n",
    "  ",
    "é",
    "e\u0301",
    "你好",
    "🙂",
    "👩‍👩‍👧",
    "\ufffd",
    "\u202e",
)
TEXTS = st.lists(st.sampled_from(SPECIMENS) | st.text(max_size=8), max_size=12).map("".join)
MARKED = st.lists(st.sampled_from(MARKERS) | st.text(max_size=3), max_size=8).map("".join)
CONVERSATIONS = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(("system", "user", "assistant", "tool")), "content": MARKED}
    ),
    max_size=5,
)


@functools.cache
def base(spec: str) -> BaseTokenizer:
    return resolve(spec, [CORPUS])


def chat(spec: str) -> ChatTokenizer:
    return ChatTokenizer(base(spec).encoding)


def published(messages: list[Message]) -> str:
    """What a conversation looks like in the published template."""
    return "".join(f"<|im_start|>{m['role']}\n{m['content']}\n<|im_end|>\n" for m in messages)


@ranks
def test_the_published_base_ids() -> None:
    tokenizer = BaseTokenizer.from_tiktoken("r50k_base")
    assert tokenizer.name == "r50k_base"
    assert tokenizer.vocabulary_size == 50257
    assert tokenizer.pad_token == tokenizer.end_of_text == 50256
    assert tokenizer.stop_tokens == {50256}
    assert tokenizer.decode_tokens([50256]) == "<|endoftext|>"


@ranks
def test_the_published_chat_ids() -> None:
    tokenizer = ChatTokenizer.from_tiktoken("r50k_base")
    assert tokenizer.control_tokens == {
        "<|im_start|>": 50257,
        "<|im_end|>": 50258,
        "<tool_call>": 50259,
        "</tool_call>": 50260,
    }
    assert tokenizer.vocabulary_size == 50261
    assert tokenizer.pad_token == 50256
    assert tokenizer.stop_tokens == {50256, 50258}
    assert tokenizer.im_start_index == 50257
    assert tokenizer.im_end_index == 50258
    assert tokenizer.response_tokens == [50257, 562, 10167, 198]


@ranks
def test_the_published_chat_ids_of_another_encoding() -> None:
    tokenizer = ChatTokenizer.from_tiktoken("cl100k_base")
    assert list(tokenizer.control_tokens.values()) == [100277, 100278, 100279, 100280]
    # Its own end of text comes before tokens of tiktoken's that no text ever gives.
    assert tokenizer.stop_tokens == {100257, 100278}


@ranks
@pytest.mark.parametrize("name", ENCODINGS)
def test_every_encoding_on_offer_loads_and_decodes_what_it_encodes(name: str) -> None:
    tokenizer = BaseTokenizer.from_tiktoken(name)
    tokens = tokenizer.tokenize(CORPUS + "🙂")
    assert tokenizer.decode_tokens(tokens) == CORPUS + "🙂"
    assert max(tokens) < tokenizer.vocabulary_size
    assert tokenizer.end_of_text < tokenizer.vocabulary_size


@EVERY_KIND
@settings(max_examples=40, deadline=None)
@given(text=TEXTS)
@example(text="".join(SPECIMENS))
def test_decoding_gives_back_what_was_encoded(spec: str, text: str) -> None:
    tokenizer = base(spec)
    tokens = tokenizer.tokenize(text)
    assert tokenizer.decode_tokens(tokens) == text
    assert tokenizer.end_of_text not in tokens


@EVERY_KIND
@pytest.mark.parametrize(
    ("broken", "whole"),
    [
        ("a\ud800b", "a\ufffdb"),
        ("\udc00", "\ufffd"),
        ("\ud83d\ude42", "🙂"),
        ("\udc00\ud800", "\ufffd" * 2),
    ],
)
def test_half_a_character_is_replaced_and_not_fatal(spec: str, broken: str, whole: str) -> None:
    assert base(spec).decode_tokens(base(spec).tokenize(broken)) == whole
    assert BaseTokenizer.train([CORPUS, broken], 300).vocabulary_size == 300


@EVERY_KIND
@settings(max_examples=60, deadline=None)
@given(messages=CONVERSATIONS)
@example(
    messages=[
        {"role": role, "content": "".join(MARKERS)}
        for role in ("system", "user", "assistant", "tool")
    ]
)
def test_a_users_text_never_becomes_a_control_token(spec: str, messages: list[Message]) -> None:
    tokenizer = chat(spec)
    control = {*tokenizer.control_tokens.values(), tokenizer.end_of_text}
    written = Counter(token for token in tokenizer.tokenize_prompt(messages) if token in control)
    expected = Counter({tokenizer.im_start_index: len(messages) + 1})
    expected[tokenizer.im_end_index] = len(messages)
    assert written == +expected
    for message in messages:
        assert control.isdisjoint(tokenizer.tokenize(message["content"]))
        first, *_ = tokens = tokenizer.tokenize_message(message)
        assert first == tokenizer.im_start_index
        assert tokenizer.im_end_index in tokens[-2:]


@EVERY_KIND
@settings(max_examples=40, deadline=None)
@given(messages=CONVERSATIONS)
def test_a_prompt_is_the_published_template(spec: str, messages: list[Message]) -> None:
    tokenizer = chat(spec)
    expected = published(messages) + "<|im_start|>assistant\n"
    tokens = tokenizer.tokenize_prompt(messages)
    assert b"".join(map(tokenizer.bytes_of, tokens)) == expected.encode()
    assert tokenizer.decode_tokens(tokens) == expected
    assert tokens[-len(tokenizer.response_tokens) :] == tokenizer.response_tokens


@EVERY_KIND
@settings(max_examples=40, deadline=None)
@given(messages=CONVERSATIONS, answer=MARKED)
def test_a_model_is_prompted_with_the_ids_that_it_was_trained_on(
    spec: str, messages: list[Message], answer: str
) -> None:
    tokenizer = chat(spec)
    prompt = tokenizer.tokenize_prompt(messages)
    trained = [*messages, {"role": "assistant", "content": answer}]
    tokens = [token for message in trained for token in tokenizer.tokenize_message(message)]
    assert tokens[: len(prompt)] == prompt


@EVERY_KIND
def test_two_chat_tokenizers_of_one_base_give_equal_ids(spec: str) -> None:
    first = ChatTokenizer(base(spec).encoding)
    second, third = ChatTokenizer(base(spec).encoding), ChatTokenizer(first.encoding)
    messages = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hi."}]
    for other in (second, third):
        assert other.tokenize_prompt(messages) == first.tokenize_prompt(messages)
        assert other.control_tokens == first.control_tokens
        assert other.vocabulary_size == first.vocabulary_size == base(spec).vocabulary_size + 4


def cut(content: bytes, places: list[int]) -> list[bytes]:
    """Cut bytes at places that are taken modulo their length."""
    ends = sorted({place % (len(content) + 1) for place in places} | {len(content)})
    return [content[start:end] for start, end in zip([0, *ends], ends, strict=False)]


@EVERY_KIND
@settings(max_examples=60, deadline=None)
@given(text=TEXTS, places=st.lists(st.integers(0, 1 << 16), max_size=40))
@example(text="👩‍👩‍👧", places=list(range(30)))
def test_streamed_text_never_splits_a_character(spec: str, text: str, places: list[int]) -> None:
    # Cut anywhere, also inside of characters, as a model may choose its tokens.
    encoding = base(spec).encoding
    chunks = cut(text.encode(), places)
    tokens = [token for x in chunks if x for token in encoding._encode_single_piece(x)]
    stream, seen, said = StreamDecoder(base(spec)), b"", ""
    for token in tokens:
        seen += base(spec).bytes_of(token)
        said += stream.decode(token)
        assert said == seen.decode(errors="ignore"), "all whole characters, at once, and no part"
    assert said + stream.flush() == text == base(spec).decode_tokens(tokens)


def test_a_stream_that_ends_inside_a_character_says_so() -> None:
    tokenizer = base("bytes")
    stream = StreamDecoder(tokenizer)
    assert [stream.decode(token) for token in "é".encode()[:1]] == [""]
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""
    assert tokenizer.decode_tokens("aé".encode()[:2]) == "a\ufffd"


@pytest.mark.parametrize("content", [b"\xff", b"\xc3(", b"\xe2\x82a", b"\x80\x80", b"\xed\xa0\x80"])
def test_bytes_that_are_no_text_stream_as_they_decode(content: bytes) -> None:
    stream = StreamDecoder(base("bytes"))
    said = "".join(map(stream.decode, content)) + stream.flush()
    assert said == base("bytes").decode_tokens(content) == content.decode(errors="replace")


@pytest.mark.parametrize("begin", ["tokenize", "tokenize_prompt"])
def test_tokenizing_begins_a_new_stream(begin: str) -> None:
    tokenizer = chat("bytes")
    half, other_half = "é".encode()
    assert tokenizer.decode_single_token(half) == ""
    assert tokenizer.decode_single_token(other_half) == "é"
    assert tokenizer.decode_single_token(half) == ""
    getattr(tokenizer, begin)("")
    assert tokenizer.decode_single_token(ord("a")) == "a", "nothing is left of the last stream"


def test_two_streams_do_not_mix() -> None:
    first, second = StreamDecoder(base("bytes")), StreamDecoder(base("bytes"))
    pairs = [
        (first.decode(a), second.decode(b)) for a, b in zip(b"\xc3\xa9", b"\xc3\xa8", strict=True)
    ]
    assert pairs == [("", ""), ("é", "è")]


@EVERY_KIND
def test_a_token_outside_the_vocabulary_is_refused(spec: str) -> None:
    tokenizer = chat(spec)
    last = tokenizer.vocabulary_size - 1
    assert tokenizer.decode_tokens([last]) == "</tool_call>"
    with pytest.raises(UsageError, match=f"token {last + 1} is not .* ends at {last}"):
        tokenizer.decode_tokens([last, last + 1])


@pytest.mark.parametrize("token", [-1, -100, 1 << 31, 1 << 40])
def test_a_token_that_no_vocabulary_has_is_refused(token: int) -> None:
    with pytest.raises(UsageError, match=f"token {token} is not in the vocabulary"):
        base("bytes").decode_tokens([token])


@pytest.mark.parametrize("size", [257, 258, 300, 320])
def test_a_trained_tokenizer_has_the_size_that_was_asked_for(size: int) -> None:
    tokenizer = BaseTokenizer.train([CORPUS], size)
    assert tokenizer.name == f"bpe-{size}"
    assert tokenizer.vocabulary_size == size
    assert tokenizer.end_of_text == size - 1
    tokens = tokenizer.tokenize(CORPUS)
    assert max(tokens) < size - 1
    assert tokenizer.decode_tokens(tokens) == CORPUS
    assert len(tokens) < len(CORPUS) or size == 257, "merges make text shorter"


def test_training_gives_the_same_ranks_every_time() -> None:
    # In another process too: see what `prepare` promises of its bytes.
    fingerprints = {BaseTokenizer.train([CORPUS], 320).fingerprint for _ in range(4)}
    assert len(fingerprints) == 1
    assert BaseTokenizer.train([CORPUS[::-1]], 320).fingerprint not in fingerprints


@pytest.mark.parametrize("size", [-1, 0, 1, 256, (1 << 20) + 1])
def test_a_size_out_of_range_is_refused(size: int) -> None:
    with pytest.raises(UsageError, match=f"vocabulary of {size} is out of range") as caught:
        BaseTokenizer.train([CORPUS], size)
    assert "257 to 1048576" in str(caught.value.hint)


@pytest.mark.parametrize("texts", [[], [""], ["a"], ["ab ab"], [CORPUS]])
def test_a_size_beyond_the_corpus_is_refused_with_one_that_fits(texts: list[str]) -> None:
    with pytest.raises(UsageError, match="variety for .* tokens, not for 4096") as caught:
        resolve("bpe:4096", texts)
    spec = str(caught.value.hint).split()[2].rstrip(",")
    assert resolve(spec, texts).name == spec.replace(":", "-")


@EVERY_KIND
def test_a_saved_tokenizer_comes_back(spec: str, tmp_path: Path) -> None:
    place = tmp_path / "model"
    base(spec).save(place)
    files = {path.name for path in place.iterdir()}
    own = {"tokenizer.tiktoken"} if spec.startswith("bpe") else set()
    assert files == {"tokenizer.json"} | own
    loaded = BaseTokenizer.load(place)
    assert loaded.name == base(spec).name
    assert loaded.fingerprint == base(spec).fingerprint
    assert loaded.vocabulary_size == base(spec).vocabulary_size
    assert loaded.tokenize(CORPUS + "🙂") == base(spec).tokenize(CORPUS + "🙂")
    assert resolve(str(place), []).fingerprint == loaded.fingerprint, "a directory shares it"
    assert ChatTokenizer.load(place).control_tokens == chat(spec).control_tokens


@ranks
def test_a_published_tokenizer_is_saved_as_published(tmp_path: Path) -> None:
    ChatTokenizer.from_tiktoken("r50k_base").save(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == b'{"name": "r50k_base"}'


def test_tokenizers_of_one_name_that_give_other_ids_are_told_apart() -> None:
    one, other = (BaseTokenizer.train([text], 300) for text in (CORPUS, CORPUS.upper()))
    assert one.name == other.name
    assert one.fingerprint != other.fingerprint
    assert one.fingerprint != base("bytes").fingerprint


def encoded(token: bytes, rank: int) -> bytes:
    return base64.b64encode(token) + b" %d" % rank


Lines = list[bytes]


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda lines: lines[:65] + lines[66:], id="a missing byte"),
        pytest.param(lambda lines: [*lines[:65], encoded(b"BC", 65), *lines[66:]], id="no byte B"),
        pytest.param(lambda lines: [*lines[:-1], encoded(b"xyz", 297)], id="a doubled rank"),
        pytest.param(lambda lines: [*lines, encoded(b"A", 299)], id="a doubled token"),
        pytest.param(lambda lines: [*lines, encoded(b"xyz", 500)], id="a gap"),
        pytest.param(lambda lines: [*lines, encoded(b"xyz", -1)], id="a negative rank"),
        pytest.param(lambda lines: [*lines, b"!!!! 299"], id="bad base64"),
        pytest.param(lambda lines: [*lines, b"YWJj"], id="no rank"),
        pytest.param(lambda lines: [*lines, b"YWJj zwei"], id="a rank that is no number"),
        pytest.param(lambda lines: [*lines, b"YWJj 299 1"], id="too much"),
        pytest.param(lambda lines: [*lines[:-1], lines[-1].split()[0]], id="cut in a line"),
        pytest.param(lambda lines: [*lines[:-1], lines[-1][:-1]], id="cut in a rank"),
        pytest.param(lambda lines: lines[:100], id="cut early"),
        pytest.param(lambda _: [], id="empty"),
        pytest.param(lambda _: [b"\x89PNG\r\n\x1a\n", b"\x00\xff"], id="something else"),
    ],
)
def test_damaged_ranks_are_refused(tmp_path: Path, damage: Callable[[Lines], Lines]) -> None:
    base("bpe:300").save(tmp_path)
    path = tmp_path / "tokenizer.tiktoken"
    lines = path.read_bytes().splitlines()
    assert len(lines) == 299
    path.write_bytes(b"\n".join(damage(lines)))
    with pytest.raises(NopeError, match="the ranks") as caught:
        BaseTokenizer.load(tmp_path)
    assert caught.value.where == str(path)


HOSTILE = ("../../x", "https://example.org/x", "/etc/passwd", "", None, 5, ["r50k_base"], {"a": 1})


@pytest.mark.parametrize("name", [*HOSTILE, "x" * 10_000], ids=lambda name: repr(name)[:20])
def test_a_hostile_name_is_refused_and_never_followed(tmp_path: Path, name: Any) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"name": name}))
    with pytest.raises(NopeError, match="none of tiktoken's") as caught:
        BaseTokenizer.load(tmp_path)
    assert len(caught.value.what) < 300
    assert caught.value.where == str(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"r50k_base"',
        b'{"model": {}}',
        b"\xff\xfe",
        b'{"name":' * 100_000,
    ],
    ids=lambda content: repr(content)[:20],
)
def test_a_damaged_tokenizer_json_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    (tmp_path / "config.json").write_text('{"vocabulary_size": 50257}')
    with pytest.raises(NopeError, match="the tokenizer cannot be read") as caught:
        BaseTokenizer.load(tmp_path)
    assert caught.value.where == str(tmp_path / "tokenizer.json")


@ranks
@pytest.mark.parametrize(
    ("size", "name"),
    [
        (50257, "r50k_base"),
        (50261, "r50k_base"),
        (50281, "p50k_base"),
        (100281, "cl100k_base"),
        (200019, "o200k_base"),
    ],
)
def test_a_model_of_before_tokenizers_travelled_is_known_by_its_vocabulary(
    tmp_path: Path, size: int, name: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"vocabulary_size": size}))
    tokenizer = BaseTokenizer.load(tmp_path)
    assert tokenizer.name == name
    assert tokenizer_of(tokenizer, size).vocabulary_size == size


@pytest.mark.parametrize(
    "config",
    ["", "{", "[]", "{}", '{"vocabulary_size": 61}', '{"vocabulary_size": "50257"}',
     '{"vocabulary_size": [50257]}', '{"vocabulary_size": null}', "[" * 100_000],
    ids=lambda config: config[:20],
)  # fmt: skip
def test_a_model_whose_tokenizer_cannot_be_told_is_refused(tmp_path: Path, config: str) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(MissingError, match="no tokenizer.json, and its vocabulary is none"):
        BaseTokenizer.load(tmp_path)


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"there is no tokenizer\.json here"):
        BaseTokenizer.load(tmp_path)


@pytest.mark.parametrize("spec", ["r50k", "gpt2", "bpe", "bpe:", "bpe:-5", "bpe:4k", "bytes:8"])
def test_an_unknown_encoding_names_those_that_there_are(spec: str) -> None:
    with pytest.raises(UsageError, match="unknown encoding") as caught:
        resolve(spec, [CORPUS])
    assert all(name in str(caught.value.hint) for name in (*ENCODINGS, "bytes", "bpe:4096"))


def test_a_base_and_a_chat_model_are_told_apart_by_their_vocabulary() -> None:
    tokenizer = base("bytes")
    assert type(tokenizer_of(tokenizer, 257)) is BaseTokenizer
    assert type(tokenizer_of(tokenizer, 261)) is ChatTokenizer
    assert type(tokenizer_of(chat("bytes"), 257)) is BaseTokenizer
    with pytest.raises(NopeError, match="has 300 tokens, and the tokenizer bytes has 257, or 261"):
        tokenizer_of(tokenizer, 300)


def test_ranks_that_cannot_be_fetched_are_a_network_error(
    nope: Callable[..., subprocess.CompletedProcess[str]], corpus: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    nowhere = dict.fromkeys(("HTTPS_PROXY", "https_proxy"), "http://127.0.0.1:9")
    env = {"TIKTOKEN_CACHE_DIR": str(cache), "NO_PROXY": "", "no_proxy": "", **nowhere}
    done = nope("prepare", corpus, "--token-encoding", "r50k_base", env=env)
    assert done.returncode == 5
    assert "the ranks of r50k_base are not on this machine" in done.stderr
    assert "--token-encoding bpe:4096" in done.stderr
    assert "Traceback" not in done.stderr
    assert not any((tmp_path / "datasets").glob("*"))


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({}, "{home}/.cache/nope-gpt/tiktoken"),
        ({"XDG_CACHE_HOME": "/elsewhere"}, "/elsewhere/nope-gpt/tiktoken"),
        ({"TIKTOKEN_CACHE_DIR": "/mine"}, "/mine"),
        ({"TIKTOKEN_CACHE_DIR": ""}, ""),
        ({"DATA_GYM_CACHE_DIR": "/mine"}, None),
    ],
)
def test_ranks_are_kept_where_a_reboot_does_not_remove_them(
    monkeypatch: pytest.MonkeyPatch, chosen: dict[str, str], expected: str | None
) -> None:
    for name in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    keep_downloads()
    place = os.environ.get("TIKTOKEN_CACHE_DIR")
    assert place == (expected and str(Path(expected.format(home=Path.home()))))


@pytest.mark.ranks
def test_an_id_that_an_encoding_leaves_out_stands_for_nothing() -> None:
    tokenizer = ChatTokenizer.from_tiktoken("cl100k_base")
    assert tokenizer.bytes_of(100_262) == b""
