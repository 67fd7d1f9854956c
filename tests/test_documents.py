"""Files become documents, or an error that names the place that is wrong."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nope_gpt.data import documents
from nope_gpt.data.documents import LONGEST_DOCUMENT, decoded, open_sources, parts, subset_name
from nope_gpt.errors import MissingError, NopeError, UsageError

TEXTS = ["The first document.\n", "The second, über 🙂.", "\tThe third.\n\nIt has paragraphs."]
CHATS = [
    [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hi.\n"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "<tool_call>add</tool_call>"},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "4"},
    ],
]


def read(*names: object, column: str = "text") -> list[tuple[str, str, list[Any]]]:
    """Name, content and documents of every source."""
    sources = open_sources(map(str, names), column)
    return [(source.name, source.content, list(source.read())) for source in sources]


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_table(path: Path, rows: list[Any], row_group_size: int = 2) -> Path:
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, path, row_group_size=row_group_size)
    return path


WRITERS = pytest.mark.parametrize(
    ("write", "suffix"), [(write_lines, ".jsonl"), (write_table, ".parquet")]
)
Writer = Callable[[Path, list[Any]], Path]


@pytest.mark.parametrize("suffix", [".txt", ".md", ".TXT"])
def test_a_text_file_is_a_document(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"story{suffix}"
    path.write_text(TEXTS[1], encoding="utf-8")
    assert read(path) == [("story", "text", [TEXTS[1]])]


@WRITERS
def test_a_table_of_texts(tmp_path: Path, write: Writer, suffix: str) -> None:
    rows = [{"id": index, "text": text} for index, text in enumerate([*TEXTS, " \n"])]
    expected = [("table", "text", TEXTS)]
    assert read(write(tmp_path / f"table{suffix}", rows)) == expected, "blank ones left out"


@WRITERS
def test_a_table_with_its_text_in_another_column(
    tmp_path: Path, write: Writer, suffix: str
) -> None:
    rows = [{"text": "no", "body": text} for text in TEXTS]
    path = write(tmp_path / f"table{suffix}", rows)
    assert read(path, column="body") == [("table", "text", TEXTS)]


@WRITERS
def test_a_table_of_conversations(tmp_path: Path, write: Writer, suffix: str) -> None:
    rows = [
        {"text": "no", "messages": [message | {"name": None, "score": 1.5} for message in chat]}
        for chat in CHATS
    ]
    path = write(tmp_path / f"chats{suffix}", rows)
    assert read(path) == [("chats", "chat", CHATS)], "with the keys that matter alone"


def test_a_directory_is_one_source_of_its_texts_and_one_of_each_table(tmp_path: Path) -> None:
    root = tmp_path / "my corpus"
    (root / "deep" / "er").mkdir(parents=True)
    (root / "b.txt").write_text("b")
    (root / "a.md").write_text("a")
    (root / "deep" / "er" / "c.TXT").write_text("c")
    (root / "picture.png").write_bytes(b"\x89PNG\xff")
    write_lines(root / "chats.jsonl", [{"messages": CHATS[0]}])
    write_table(root / "deep" / "table.parquet", [{"text": "d"}])
    assert read(root) == [
        ("my corpus", "text", ["a", "b", "c"]),
        ("chats", "chat", [CHATS[0]]),
        ("table", "text", ["d"]),
    ]


def test_a_directory_inside_that_is_named_like_a_file_is_no_file(tmp_path: Path) -> None:
    root = tmp_path / "corpus"
    for name in ("chats.jsonl", "table.parquet", "notes.txt"):
        (root / name).mkdir(parents=True)
    (root / "notes.txt" / "a.md").write_text("a")
    assert read(root) == [("corpus", "text", ["a"])]


def test_standard_input_can_be_read_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    piped = io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfone\r\ntwo \xc3\xa9"))
    monkeypatch.setattr(sys, "stdin", piped)
    (source,) = open_sources(["-"], "text")
    assert (source.name, source.content) == ("stdin", "text")
    for _ in range(2):  # To train a tokenizer, and to encode.
        assert list(source.read()) == ["one\ntwo é"]


def test_python_docs_are_a_source_of_prose_and_one_of_conversations() -> None:
    sources = open_sources(["python-docs"], "text")
    assert [(source.name, source.content) for source in sources] == [
        ("python-docs", "text"),
        ("python-docs", "chat"),
    ]
    question = next(iter(sources[1].read()))
    assert [message["role"] for message in question] == ["user", "assistant"]


def test_sources_keep_their_order(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("z.txt", "a.txt", "m.txt")]
    for path in paths:
        path.write_text(path.stem)
    assert [name for name, _, _ in read(*paths)] == ["z", "a", "m"]


def test_the_origin_of_every_file_is_known(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("hello")
    (source,) = open_sources([str(path)], "text")
    sha256 = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
    assert source.origin == [{"path": "a.txt", "size": 5, "sha256": sha256}]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"plain", "plain"),
        (b"\xef\xbb\xbfmarked", "marked"),
        (b"one\r\ntwo\r\n", "one\ntwo\n"),
        (b"\xef\xbb\xbf\xc3\xa9\r\n", "é\n"),
        (b"a\rb\n\rc", "a\rb\n\rc"),
        (b"nul \x00", "nul \x00"),
        (b"", ""),
    ],
)
def test_marks_and_line_ends_of_other_systems_are_taken_off(content: bytes, text: str) -> None:
    assert decoded(content, "here") == text


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_the_size_of_a_source_is_known_before_it_is_read(tmp_path: Path, suffix: str) -> None:
    texts = [f"{number} " * 500 for number in range(40)]
    rows = [{"text": text} for text in texts]
    path = tmp_path / f"table{suffix}"
    if suffix == ".txt":
        path.write_text("\n".join(texts))
    elif suffix == ".jsonl":
        write_lines(path, rows)
    else:
        write_table(path, rows, row_group_size=1000)
    (source,) = open_sources([str(path)], "text")
    characters = sum(len(text) for text in source.read() if isinstance(text, str))
    assert source.size == pytest.approx(characters, rel=0.05)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab \n", max_size=60))
@example("\n\n" + "a" * 20)
@example("a" * 20 + "\n" * 20)
def test_a_long_text_is_cut_between_paragraphs_and_nothing_is_lost(text: str) -> None:
    longest = 8
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "LONGEST_DOCUMENT", longest)
        pieces = list(parts(text))
    joined = "".join(pieces)
    assert text.startswith(joined)
    assert not text[len(joined) :].strip(), "only blanks at the end are left out"
    for piece in pieces[:-1]:
        end = next(end for end in ("\n\n", "\n", "") if end in piece)
        assert piece.endswith(end)
        assert end or len(piece) == longest
    assert all(0 < len(piece) <= longest for piece in pieces)
    if len(text) <= longest:
        assert pieces == ([text] if text.strip() else [])


def test_a_book_becomes_documents_as_long_as_possible(tmp_path: Path) -> None:
    paragraph = "It was a dark and stormy night. " * 30 + "\n\n"
    path = tmp_path / "book.txt"
    path.write_text(paragraph * 100)
    ((_, _, pieces),) = read(path)
    whole = LONGEST_DOCUMENT // len(paragraph)
    assert [len(piece) // len(paragraph) for piece in pieces] == [whole, whole, 100 - 2 * whole]
    assert "".join(pieces) == paragraph * 100


@pytest.mark.parametrize("name", ["latin.txt", "latin.jsonl"])
def test_text_that_is_not_utf8_names_the_file_and_the_byte(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b'{"text": "fine"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(NopeError, match="byte .* is not UTF-8") as caught:
        read(path)
    byte, place = (30, str(path)) if name.endswith(".txt") else (13, f"{path}:2")
    assert caught.value.what.startswith(f"byte {byte} ")
    assert caught.value.where == place
    assert "iconv" in str(caught.value.hint)


@pytest.mark.parametrize(
    "line",
    ["{", "hello", "{'text': 1}", '{"text": "a"} x', "[" * 100_000, '{"n": ' + "1" * 5000 + "}"],
    ids=lambda line: line[:12],
)
def test_a_line_that_is_not_json_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "table.jsonl"
    path.write_text(f'{{"text": "fine"}}\n\n{line}\n')
    with pytest.raises(NopeError, match="this line is not JSON") as caught:
        read(path)
    assert caught.value.where == f"{path}:3"


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([{"role": "human", "content": "x"}], "'human' is none of system, user, assistant, tool"),
        ([{"role": None, "content": "x"}], "the role None is none of"),
        ([{"role": "user", "content": None}], "a message of the user has no text in `content`"),
        ([{"role": "user"}], "a message of the user has no text in `content`"),
    ],
)
@WRITERS
def test_a_message_that_cannot_be_meant_is_named(
    tmp_path: Path, write: Writer, suffix: str, messages: Any, complaint: str
) -> None:
    path = write(tmp_path / f"chats{suffix}", [{"messages": CHATS[0]}, {"messages": messages}])
    with pytest.raises(NopeError, match=re.escape(complaint)) as caught:
        read(path)
    assert caught.value.where == f"{path}{':2' if suffix == '.jsonl' else ' row 1'}"


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([{"messages": CHATS[0]}, {"messages": None}], "no list of `messages`"),
        ([{"messages": CHATS[0]}, {"messages": "hello"}], "no list of `messages`"),
        ([{"messages": CHATS[0]}, {"messages": ["hello"]}], "the role None"),
        ([{"messages": CHATS[0]}, {"messages": [{"role": ["user"]}]}], "the role ['user']"),
        ([{"messages": CHATS[0]}, {"text": "x"}], "no list of `messages`"),
        ([{"messages": CHATS[0]}, [1]], "no list of `messages`"),
        ([{"text": "x"}, {"text": None}], "no text in 'text'"),
        ([{"text": "x"}, {"text": 5}], "no text in 'text'"),
        ([{"text": "x"}, {"body": "y"}], "no text in 'text'"),
        ([{"text": "x"}, "text"], "no text in 'text'"),
    ],
)
def test_a_row_that_is_not_like_the_first_is_named(
    tmp_path: Path, rows: list[Any], complaint: str
) -> None:
    path = write_lines(tmp_path / "table.jsonl", rows)
    with pytest.raises(NopeError, match=re.escape(complaint)) as caught:
        read(path)
    assert caught.value.where == f"{path}:2"


@WRITERS
def test_a_missing_column_lists_those_that_are_there(
    tmp_path: Path, write: Writer, suffix: str
) -> None:
    path = write(tmp_path / f"table{suffix}", [{"url": "u", "body": "b"}])
    with pytest.raises(
        UsageError, match="'text'.*: url, body|'text'; there are url, body"
    ) as caught:
        read(path)
    assert caught.value.where == str(path)
    assert "--text-column" in str(caught.value.hint)


@pytest.mark.parametrize("row", [[1, 2], "text", 5])
def test_a_first_row_that_is_no_object_is_refused(tmp_path: Path, row: Any) -> None:
    with pytest.raises(UsageError, match=f"neither `messages` nor 'text'.*{type(row).__name__}"):
        read(write_lines(tmp_path / "table.jsonl", [row]))


def test_a_parquet_file_cut_short_is_refused(tmp_path: Path) -> None:
    path = write_table(tmp_path / "table.parquet", [{"text": text} for text in TEXTS])
    content = path.read_bytes()
    for size in range(0, len(content), 7):
        path.write_bytes(content[:size])
        with pytest.raises(NopeError, match="not a whole parquet file") as caught:
            read(path)
        assert caught.value.where == str(path)


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_table_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "table.jsonl"
    path.write_bytes(content)
    with pytest.raises(NopeError, match="this file is empty"):
        read(path)


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="no such file or directory") as caught:
        read(tmp_path / "nothing.txt")
    assert caught.value.where == str(tmp_path / "nothing.txt")
    assert "python-docs" in str(caught.value.hint)
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingError, match=r"no \.txt, \.md, \.jsonl, \.parquet file is in"):
        read(tmp_path / "empty")


def test_a_file_of_another_kind_is_refused_with_a_way_to_read_it(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("<p>")
    with pytest.raises(UsageError, match=r"end in '\.html' cannot be read") as caught:
        read(tmp_path / "page.html")
    assert "nope prepare - < page.html" in str(caught.value.hint)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that cannot be read")
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"file{suffix}"
    path.symlink_to("/proc/self/mem")
    with pytest.raises(NopeError) as caught:
        read(path)
    assert caught.value.where == str(path)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["text", "messages", "role", "content", "x"]), inner)
    ),
    max_leaves=8,
)
ROWS = st.dictionaries(st.sampled_from(["text", "messages"]), VALUES | st.just(CHATS[0]))


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(ROWS | VALUES, max_size=4))
def test_a_table_of_anything_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any]
) -> None:
    path = write_lines(tmp_path_factory.getbasetemp() / "anything.jsonl", rows)
    try:
        ((_, content, found),) = read(path)
    except NopeError as error:
        assert str(path) in str(error.where)
    else:
        assert all(type(document) is (str if content == "text" else list) for document in found)


@settings(max_examples=60, deadline=None)
@given(content=st.binary(max_size=40), suffix=st.sampled_from(documents.SUFFIXES))
def test_a_file_of_anything_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, suffix: str
) -> None:
    path = tmp_path_factory.getbasetemp() / f"anything{suffix}"
    path.write_bytes(content)
    try:
        read(path)
    except NopeError as error:
        assert str(path) in str(error.where)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("my corpus", "my-corpus"), ("../x", "x"), ("..", "data"), ("", "data"), ("a/b", "a-b"),
     ("über_1.5", "über_1.5"), ("-rf", "rf"), ("a\n", "a")],
)  # fmt: skip
def test_a_directorys_name_is_made_plain(name: str, expected: str) -> None:
    assert subset_name(name) == expected
