"""Files to rows: how a file is cut into spans that can be read apart, and what is in one.

A span of a .parquet file is a run of row groups; of a .jsonl file, the lines that begin
in a range of bytes; of a text, what lies between two paragraphs near given bytes. Where
the cuts are follows from the file alone, so any number of processes reads the same.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from nope_gpt.data.documents import TEXT, Schema, schema_of
from nope_gpt.data.ordering import shuffled
from nope_gpt.errors import NopeError, UsageError

TEXT_SUFFIXES = (".txt", ".md")
TABLE_SUFFIXES = (".jsonl", ".parquet")
SUFFIXES = (*TEXT_SUFFIXES, *TABLE_SUFFIXES)

SPAN_SIZE = 4 * 1000 * 1000
"""Bytes of text that one process reads at a time, about."""

LONGEST_DOCUMENT = 32 * 1024
"""Characters; about as many tokens as the published models were trained to look back on."""

ROWS_AT_A_TIME = 256
PARAGRAPH_REACH = 1 << 16
PLAIN_TEXT = Schema(TEXT, ("text",))

Row = tuple[int, Any]
"""Its number, counted from `first_row`, and what it holds."""


@dataclasses.dataclass(frozen=True)
class Selection:
    """A random choice of rows: so many of a file's, the same ones every time."""

    num_rows: int
    num_chosen: int
    seed: int

    def of(self, span: Span) -> NDArray[np.bool_]:
        """For each row of a span whether it is chosen."""
        numbers = np.arange(span.first_row, span.first_row + span.num_rows, dtype=np.int64)
        chosen: NDArray[np.bool_] = shuffled(numbers, self.num_rows, self.seed, 0) < self.num_chosen
        return chosen


@dataclasses.dataclass(frozen=True)
class Span:
    """A part of a file.

    Attributes:
        path: Of the file on this machine.
        name: What the file is called in its source.
        shown: What an error calls it.
        start: The first row group, or the byte from which the first line or paragraph is
            looked for.
        stop: The row group or byte where the next span starts.
        size: Bytes of text in it, about.
        first_row: Rows before it, where rows are counted.
        num_rows: Rows in it, likewise.
        selection: Which of the file's rows are taken, if not all.
    """

    path: Path
    name: str
    shown: str
    schema: Schema
    start: int
    stop: int
    size: int
    first_row: int = 0
    num_rows: int = 0
    selection: Selection | None = None


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn the system's refusal to read into an error that names the file.

    Raises:
        NopeError: It cannot be read.
    """
    try:
        yield
    except OSError as error:
        raise NopeError(f"cannot be read: {error.strerror or error}", where=str(path)) from None


def is_readable(path: Path) -> bool:
    """Whether the end of a file's name is one that we can read."""
    return path.suffix.lower() in SUFFIXES


def schema_in(path: Path, text_column: str, where: str | None = None) -> Schema:
    """What a file holds, by its columns or its first row.

    Args:
        path: Of the file on this machine.
        text_column: Which column holds text.
        where: What an error calls the file, if not by its path.

    Raises:
        UsageError: It has no column that we know; lists those that are there.
        NopeError: It is empty or damaged.
    """
    suffix = path.suffix.lower()
    if suffix in TEXT_SUFFIXES:
        return PLAIN_TEXT
    if suffix == ".parquet":
        with opened(path) as file:
            columns = file.schema_arrow.names
    else:
        shown = where or str(path)
        whole = Span(path, path.name, shown, PLAIN_TEXT, 0, path.stat().st_size, 0)
        first = next(json_rows(whole), None)
        if first is None:
            raise NopeError("this file is empty", where=shown)
        columns = list(first[1]) if isinstance(first[1], dict) else []
    schema = schema_of(columns, text_column)
    if schema is None:
        raise UsageError(
            f"there is neither `messages` nor {text_column!r}; there are "
            f"{', '.join(columns) or 'no columns'}",
            where=where or str(path),
            hint="choose the text with --text-column",
        )
    return schema


def spans(path: Path, name: str, shown: str, schema: Schema) -> list[Span]:
    """Cut a file into spans of about `SPAN_SIZE`."""
    if path.suffix.lower() == ".parquet":
        return row_group_spans(path, name, shown, schema)
    size = path.stat().st_size
    cuts = [*range(0, max(size - SPAN_SIZE // 2, 1), SPAN_SIZE), size]
    return [
        Span(path, name, shown, schema, start, stop, stop - start)
        for start, stop in itertools.pairwise(cuts)
    ]


def row_group_spans(path: Path, name: str, shown: str, schema: Schema) -> list[Span]:
    """Cut a .parquet file between row groups.

    Raises:
        UsageError: A column is missing.
        NopeError: It is no whole .parquet file.
    """
    result = []
    with opened(path) as file:
        metadata = file.metadata
        missing = [name for name in schema.columns if name not in file.schema_arrow.names]
        if missing:
            raise UsageError(
                f"there is no column {missing[0]!r}; there are "
                f"{', '.join(file.schema_arrow.names)}",
                where=shown,
                hint="choose the text with --text-column",
            )
        start = size = rows = first_row = 0
        for index in range(metadata.num_row_groups):
            group = metadata.row_group(index)
            rows += group.num_rows
            size += sum(
                group.column(column).total_uncompressed_size
                for column in range(group.num_columns)
                if group.column(column).path_in_schema.split(".")[0] in schema.columns
            )
            if size >= SPAN_SIZE * 3 // 4 or index == metadata.num_row_groups - 1:
                result.append(
                    Span(path, name, shown, schema, start, index + 1, size, first_row, rows)
                )
                first_row += rows
                start, size, rows = index + 1, 0, 0
    return result


def with_rows_counted(parts: list[Span]) -> list[Span]:
    """Spans that know their rows: of a .jsonl file, by reading its lines once."""
    if not parts or parts[0].path.suffix.lower() != ".jsonl":
        return parts
    counted, first = [], 0
    for span in parts:
        rows = sum(1 for _ in lines_of(span))
        counted.append(dataclasses.replace(span, first_row=first, num_rows=rows))
        first += rows
    return counted


def rows(span: Span) -> Iterator[Row]:
    """The chosen rows of a span; those of a text have its documents as `text`."""
    read = {".parquet": parquet_rows, ".jsonl": json_rows}.get(span.path.suffix.lower(), text_rows)
    if span.selection is None:
        return read(span)
    chosen = span.selection.of(span)
    return (row for row in read(span) if chosen[row[0] - span.first_row])


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a .parquet file; damage anywhere in it becomes an error that names it.

    Raises:
        NopeError: It is no whole .parquet file.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        raise NopeError(f"this is not a whole parquet file: {error}", where=str(path)) from None


def parquet_rows(span: Span) -> Iterator[Row]:
    """The columns that matter of a run of row groups."""
    number = span.first_row
    with opened(span.path) as file:
        groups = list(range(span.start, span.stop))
        for batch in file.iter_batches(
            batch_size=ROWS_AT_A_TIME,
            row_groups=groups,
            columns=list(span.schema.columns),
            use_threads=False,
        ):
            for row in batch.to_pylist():
                yield number, row
                number += 1


def json_rows(span: Span) -> Iterator[Row]:
    """The objects on the lines that begin in a span.

    Raises:
        NopeError: A line is not JSON; names it.
    """
    for number, (_, line) in enumerate(lines_of(span), span.first_row):
        if line.strip():
            try:
                yield number, json.loads(decoded(line, str(span.path)))
            except NopeError as error:
                where = where_of(span, number)
                raise NopeError(error.what, where=where, hint=error.hint) from None
            except (ValueError, RecursionError) as error:
                where = where_of(span, number)
                raise NopeError(f"this line is not JSON: {error}", where=where) from None


def lines_of(span: Span) -> Iterator[tuple[int, bytes]]:
    """The lines that begin in a span, each with the byte where it does."""
    with reading(span.path), span.path.open("rb") as file:
        if span.start:
            file.seek(span.start - 1)
            file.readline()
        place = file.tell()
        while place < span.stop and (line := file.readline()):
            yield place, line
            place += len(line)


def where_of(span: Span, number: int, name: str | None = None) -> str:
    """A row's place as people look it up: the number of its line in the file, or of the row."""
    path, name = span.path, name or span.shown
    if path.suffix.lower() in TEXT_SUFFIXES:
        return name
    if path.suffix.lower() == ".parquet":
        return f"{name} row {number}"
    lines = itertools.islice(lines_of(span), number - span.first_row, None)
    line, rest = 1, next(lines)[0]
    with reading(path), path.open("rb") as file:
        while rest and (block := file.read(min(rest, 1 << 20))):
            line += block.count(b"\n")
            rest -= len(block)
    return f"{name}:{line}"


def text_rows(span: Span) -> Iterator[Row]:
    """The documents of a text between two cuts."""
    with reading(span.path), span.path.open("rb") as file:
        start, stop = cut_near(file, span.start), cut_near(file, span.stop)
        file.seek(start)
        content = file.read(stop - start)
    for text in parts(decoded(content, span.shown, start)):
        yield 0, {"text": text}


def cut_near(file: BinaryIO, place: int) -> int:
    """The first place from a byte on where a text can be cut: a paragraph, a line, a character."""
    size = os.fstat(file.fileno()).st_size
    if place in (0, size):
        return place
    file.seek(place - 1)
    window = file.read(PARAGRAPH_REACH)
    for mark in (b"\n\n", b"\n"):
        found = window.find(mark)
        if found >= 0:
            return min(place - 1 + found + len(mark), size)
    following = window[1:5]
    inside = itertools.takewhile(lambda byte: byte & 0xC0 == 0x80, following)
    return place + len(list(inside))


def decoded(content: bytes, where: str, first_byte: int = 0) -> str:
    """Text from UTF-8 with or without a mark at its start, lines ended by newlines alone.

    Raises:
        NopeError: It is not UTF-8; names the byte.
    """
    try:
        text = content.decode("utf-8" if first_byte else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise NopeError(
            f"byte {first_byte + error.start:,} is not UTF-8 ({error.reason})",
            where=where,
            hint="convert the file first, for example: iconv -f latin1 -t utf-8 OLD > NEW",
        ) from None
    return text.replace("\r\n", "\n")


def parts(text: str) -> Iterator[str]:
    """Cut a long text into documents between paragraphs, or lines if it has none.

    Shuffling and the hold-out work by document, so that one long file must be several.
    """
    start = 0
    while len(text) - start > LONGEST_DOCUMENT:
        limit = start + LONGEST_DOCUMENT
        cut = max(text.rfind("\n\n", start, limit) + 2, 0)
        cut = cut if cut > start + 1 else text.rfind("\n", start, limit) + 1
        cut = cut if cut > start else limit
        yield text[start:cut]
        start = cut
    if text[start:].strip():
        yield text[start:]
