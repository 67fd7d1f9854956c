"""Files are cut into spans that lose nothing and repeat nothing, or the damage is named."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nope_gpt.data import reading
from nope_gpt.data.documents import MESSAGES, Schema
from nope_gpt.data.opening import local_file
from nope_gpt.data.reading import (
    LONGEST_DOCUMENT,
    decoded,
    parts,
    rows,
    schema_in,
    spans,
    where_of,
    with_rows_counted,
)
from nope_gpt.errors import NopeError, UsageError

TEXT = Schema("text", ("text",))
TEXTS = ["The first document.\n", "The second, über 🙂.", "\tThe third.\n\nIt has paragraphs."]


def read(path: Path, column: str = "text") -> list[Any]:
    """What every row of a file holds."""
    schema = schema_in(path, column)
    return [row for span in spans(path, path.name, str(path), schema) for _, row in rows(span)]


def write_lines(path: Path, values: list[Any]) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


def write_table(path: Path, values: list[Any], row_group_size: int = 2) -> Path:
    table = pyarrow.Table.from_pylist(values)
    pyarrow.parquet.write_table(table, path, row_group_size=row_group_size)
    return path


Writer = Callable[[Path, list[Any]], Path]
WRITERS = pytest.mark.parametrize(
    ("write", "suffix"), [(write_lines, ".jsonl"), (write_table, ".parquet")]
)


@pytest.mark.parametrize("suffix", [".txt", ".md", ".TXT"])
def test_a_text_file_is_a_document(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"story{suffix}"
    path.write_text(TEXTS[1], encoding="utf-8")
    assert read(path) == [{"text": TEXTS[1]}]


@WRITERS
def test_only_the_columns_that_matter_are_read(tmp_path: Path, write: Writer, suffix: str) -> None:
    values = [{"id": index, "body": text} for index, text in enumerate(TEXTS)]
    path = write(tmp_path / f"table{suffix}", values)
    assert [row["body"] for row in read(path, "body")] == TEXTS
    if suffix == ".parquet":
        assert all(row.keys() == {"body"} for row in read(path, "body"))


@WRITERS
def test_messages_go_before_a_text(tmp_path: Path, write: Writer, suffix: str) -> None:
    chat = [{"role": "user", "content": "Hello?", "score": 1.5}]
    path = write(tmp_path / f"chats{suffix}", [{"text": "no", "messages": chat}])
    assert schema_in(path, "text") == MESSAGES
    assert read(path)[0]["messages"] == chat


@WRITERS
def test_a_missing_column_lists_those_that_are_there(
    tmp_path: Path, write: Writer, suffix: str
) -> None:
    path = write(tmp_path / f"table{suffix}", [{"url": "u", "body": "b"}])
    with pytest.raises(UsageError, match="neither `messages` nor 'text'; there are url, body") as e:
        read(path)
    assert e.value.where == str(path)
    assert "--text-column" in str(e.value.hint)


LINES = st.lists(st.text(alphabet="ab é🙂\r", max_size=12), max_size=12)


@settings(max_examples=150, deadline=None)
@given(values=LINES, size=st.integers(1, 40), last=st.booleans())
def test_the_lines_of_all_spans_are_those_of_the_file(
    tmp_path_factory: pytest.TempPathFactory, values: list[str], size: int, last: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.jsonl"
    content = "\n".join(json.dumps({"text": value}, ensure_ascii=False) for value in values)
    path.write_bytes((content + "\n" * (last and bool(values))).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "SPAN_SIZE", size)
        cut = with_rows_counted(spans(path, path.name, str(path), TEXT))
        found = [(number, row["text"]) for span in cut for number, row in rows(span)]
    assert found == list(enumerate(values))
    assert sum(span.num_rows for span in cut) == len(values)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=20),
    group=st.integers(1, 7),
    size=st.integers(1, 200),
)
def test_the_rows_of_all_spans_are_those_of_the_table(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], group: int, size: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.parquet"
    values = [{"text": f"{number}" * length} for number, length in enumerate(sizes)]
    write_table(path, values, group)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "SPAN_SIZE", size)
        cut = spans(path, path.name, str(path), TEXT)
        found = [row for span in cut for row in rows(span)]
    assert found == list(enumerate(values))
    assert sum(span.num_rows for span in cut) == len(values)


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(alphabet="ab \né🙂", max_size=120),
    size=st.integers(4, 60),
    reach=st.integers(5, 20),
)
def test_the_text_of_all_spans_is_that_of_the_file(
    tmp_path_factory: pytest.TempPathFactory, text: str, size: int, reach: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "SPAN_SIZE", size)
        patch.setattr(reading, "PARAGRAPH_REACH", reach)
        cut = spans(path, path.name, str(path), TEXT)
        found = [row["text"] for span in cut for _, row in rows(span)]
    assert re.sub(r"\s", "", "".join(found)) == re.sub(r"\s", "", text), "blank spans aside"
    assert all(piece in text for piece in found)


@pytest.mark.parametrize("reach", [1 << 16, 5])
def test_a_long_text_is_cut_at_paragraphs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reach: int
) -> None:
    monkeypatch.setattr(reading, "SPAN_SIZE", 1_000)
    monkeypatch.setattr(reading, "PARAGRAPH_REACH", reach)
    paragraph = "Ünïcödé 🙂 and some words. " * 3 + "\n\n"
    path = tmp_path / "book.txt"
    path.write_text(paragraph * 100, encoding="utf-8")
    cut = spans(path, path.name, str(path), TEXT)
    assert len(cut) > 5
    pieces = ["".join(row["text"] for _, row in rows(span)) for span in cut]
    assert "".join(pieces) == paragraph * 100
    if reach > 5:
        assert all(piece.endswith("\n\n") for piece in pieces)


def test_a_line_of_ten_megabytes_is_one_row(tmp_path: Path) -> None:
    values = [{"text": "a" * 10_000_000}, {"text": "b"}, {"text": "c" * 9_000_000}]
    path = write_lines(tmp_path / "long.jsonl", values)
    cut = spans(path, path.name, str(path), TEXT)
    assert len(cut) > 3
    assert [row for span in cut for _, row in rows(span)] == values


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


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab \n", max_size=60))
@example("\n\n" + "a" * 20)
@example("a" * 20 + "\n" * 20)
def test_a_long_text_is_cut_between_paragraphs_and_nothing_is_lost(text: str) -> None:
    longest = 8
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "LONGEST_DOCUMENT", longest)
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
    pieces = [row["text"] for row in read(path)]
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


@pytest.mark.parametrize("size", [4_000_000, 20])
@pytest.mark.parametrize(
    "line",
    ["{", "hello", "{'text': 1}", '{"text": "a"} x', "[" * 100_000, '{"n": ' + "1" * 5000 + "}"],
    ids=lambda line: line[:12],
)
def test_a_line_that_is_not_json_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, size: int
) -> None:
    monkeypatch.setattr(reading, "SPAN_SIZE", size)
    path = tmp_path / "table.jsonl"
    path.write_text(f'{{"text": "fine"}}\n\n{{"text": "also"}}\n{line}\n')
    with pytest.raises(NopeError, match="this line is not JSON") as caught:
        read(path)
    assert caught.value.where == f"{path}:4"


@WRITERS
def test_the_place_of_a_row_is_its_line_or_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Writer, suffix: str
) -> None:
    monkeypatch.setattr(reading, "SPAN_SIZE", 30)
    path = write(tmp_path / f"table{suffix}", [{"text": "x" * 10}] * 9)
    cut = spans(path, "name", "shown", TEXT)
    assert len(cut) > 2
    places = [where_of(span, number) for span in cut for number, _ in rows(span)]
    form = "shown:{}" if suffix == ".jsonl" else "shown row {}"
    first = 1 if suffix == ".jsonl" else 0
    assert places == [form.format(number + first) for number in range(9)]


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


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that cannot be read")
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"file{suffix}"
    path.symlink_to("/proc/self/mem")
    with pytest.raises(NopeError) as caught:
        local_file(path, path.name, reading.PLAIN_TEXT)
    assert caught.value.where == str(path)


@settings(max_examples=60, deadline=None)
@given(content=st.binary(max_size=40), suffix=st.sampled_from(reading.SUFFIXES))
def test_a_file_of_anything_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, suffix: str
) -> None:
    path = tmp_path_factory.getbasetemp() / f"anything{suffix}"
    path.write_bytes(content)
    try:
        read(path)
    except NopeError as error:
        assert str(path) in str(error.where)
