"""Sources to documents: files, directories and standard input, read one document at a time."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nope_gpt.data import python_docs
from nope_gpt.errors import MissingError, NopeError, UsageError
from nope_gpt.memory import Message

Document = str | list[Message]

TEXT_SUFFIXES = (".txt", ".md")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".parquet")
ROLES = ("system", "user", "assistant", "tool")

LONGEST_DOCUMENT = 32 * 1024
"""Characters; about as many tokens as the published models were trained to look back on."""


@dataclass(frozen=True)
class Source:
    """Documents of one kind that belong together.

    Attributes:
        name: What `--dataset-subset` calls them.
        content: "text" or "chat".
        read: Starts reading from the beginning.
        origin: Where they come from, for the manifest.
        size: Characters, about, or 0 where that is not known.
    """

    name: str
    content: str
    read: Callable[[], Iterator[Document]]
    origin: list[dict[str, Any]] = field(default_factory=list)
    size: int = 0


def open_sources(names: Iterable[str], text_column: str) -> list[Source]:
    """Find what `nope prepare` was asked for.

    Args:
        names: Files, directories, `-` for standard input, or `python-docs`.
        text_column: Column or key of the text in tables.

    Returns:
        The sources. `python-docs` gives two: its prose, and questions with answers.

    Raises:
        MissingError: A file is not there.
        UsageError: A file is of a kind that cannot be read.
    """
    sources: list[Source] = []
    for name in names:
        path = Path(name).expanduser()
        if name == "-":
            sources.append(standard_input())
        elif path.is_dir():
            sources.extend(directory_sources(path, text_column))
        elif path.is_file():
            sources.append(file_source(path, text_column))
        elif name == "python-docs":
            origin = [{"python": sys.version.split()[0]}]
            sources.append(Source(name, "text", python_docs.documents, origin))
            sources.append(Source(name, "chat", python_docs.conversations, origin))
        else:
            raise MissingError(
                "there is no such file or directory",
                where=str(path),
                hint="give text, .jsonl or .parquet files, directories of them, `-` for "
                "standard input, or `python-docs`",
            )
    return sources


def standard_input() -> Source:
    """What is piped in, read once and kept, since it cannot be read again."""
    text = decoded(sys.stdin.buffer.read(), "standard input")
    return Source("stdin", "text", lambda: parts(text), [{"path": "-"}])


def directory_sources(path: Path, text_column: str) -> list[Source]:
    """All text files of a directory as one source, and each table as one of its own."""
    found = (file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
    files = sorted(file for file in found if file.is_file())
    if not files:
        raise MissingError(f"no {', '.join(SUFFIXES)} file is in this directory", where=str(path))
    texts = [file for file in files if file.suffix.lower() in TEXT_SUFFIXES]
    sources = [text_source(path.resolve().name, texts)] if texts else []
    return sources + [file_source(file, text_column) for file in files if file not in texts]


def file_source(path: Path, text_column: str) -> Source:
    """The documents of one file, by its suffix."""
    suffix = path.suffix.lower()
    if suffix in TEXT_SUFFIXES:
        return text_source(path.stem, [path])
    if suffix == ".jsonl":
        rows: Callable[[], Iterator[tuple[str, Any]]] = lambda: json_rows(path)  # noqa: E731
    elif suffix == ".parquet":
        rows = lambda: parquet_rows(path, text_column)  # noqa: E731
    else:
        raise UsageError(
            f"files that end in {suffix!r} cannot be read",
            where=str(path),
            hint=f"give {', '.join(SUFFIXES)}, or pipe text in: `nope prepare - < {path.name}`",
        )
    content = content_of(rows, text_column, path)
    origin = origin_of(path)
    size = origin["size"] if suffix == ".jsonl" else unpacked_size(path, text_column)
    if content == "chat":
        return Source(path.stem, content, lambda: chats(rows()), [origin], size)
    return Source(path.stem, content, lambda: texts(rows(), text_column), [origin], size)


def text_source(name: str, files: list[Path]) -> Source:
    """The documents of plain text files."""

    def read() -> Iterator[Document]:
        for file in files:
            try:
                content = file.read_bytes()
            except OSError as error:
                raise NopeError(f"cannot be read: {error.strerror}", where=str(file)) from None
            yield from parts(decoded(content, str(file)))

    origin = [origin_of(file) for file in files]
    return Source(name, "text", read, origin, sum(entry["size"] for entry in origin))


def origin_of(path: Path) -> dict[str, Any]:
    """A file's name, size and sha256, for the manifest."""
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise NopeError(f"cannot be read: {error.strerror}", where=str(path)) from None
    return {"path": path.name, "size": path.stat().st_size, "sha256": digest}


def decoded(content: bytes, where: str) -> str:
    """Text from UTF-8 with or without a mark at its start, lines ended by newlines alone.

    Raises:
        NopeError: It is not UTF-8; names the byte.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise NopeError(
            f"byte {error.start:,} is not UTF-8 ({error.reason})",
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


def json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a .jsonl file with where each stands."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                where = f"{path}:{number}"
                if line.strip():
                    yield where, parsed(decoded(line, where), where)
    except OSError as error:
        raise NopeError(f"cannot be read: {error.strerror}", where=str(path)) from None


def parsed(line: str, where: str) -> Any:
    """The value of a line of JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise NopeError(f"this line is not JSON: {error}", where=where) from None


def parquet_rows(path: Path, text_column: str) -> Iterator[tuple[str, Any]]:
    """The rows of a .parquet file, with its messages or its text alone."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        columns = [name for name in ("messages", text_column) if name in names][:1]
        if not columns:
            raise UsageError(
                f"there is no column {text_column!r}; there are {', '.join(names)}",
                where=str(path),
                hint="choose one with --text-column",
            )
        number = 0
        for batch in file.iter_batches(batch_size=1024, columns=columns):
            for row in batch.to_pylist():
                yield f"{path} row {number}", row
                number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise NopeError(f"this is not a whole parquet file: {error}", where=str(path)) from None


def unpacked_size(path: Path, text_column: str) -> int:
    """Bytes of the messages or the text of a .parquet file before compression."""
    import pyarrow.parquet

    metadata = pyarrow.parquet.ParquetFile(path).metadata
    return sum(
        metadata.row_group(group).column(column).total_uncompressed_size
        for group in range(metadata.num_row_groups)
        for column in range(metadata.num_columns)
        if metadata.schema.column(column).path.split(".")[0] in ("messages", text_column)
    )


def content_of(rows: Callable[[], Iterator[tuple[str, Any]]], text_column: str, path: Path) -> str:
    """Whether a table holds conversations or text, by its first row."""
    _, row = next(rows(), (None, None))
    if row is None:
        raise NopeError("this file is empty", where=str(path))
    if isinstance(row, dict) and "messages" in row:
        return "chat"
    if isinstance(row, dict) and text_column in row:
        return "text"
    keys = ", ".join(row) if isinstance(row, dict) else type(row).__name__
    raise UsageError(
        f"the first row has neither `messages` nor {text_column!r}, but: {keys}",
        where=str(path),
        hint="choose the text with --text-column",
    )


def texts(rows: Iterator[tuple[str, Any]], text_column: str) -> Iterator[Document]:
    """The texts of a table's rows."""
    for where, row in rows:
        text = row.get(text_column) if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise NopeError(f"this row has no text in {text_column!r}", where=where)
        if text.strip():
            yield text


def chats(rows: Iterator[tuple[str, Any]]) -> Iterator[Document]:
    """The conversations of a table's rows."""
    for where, row in rows:
        messages = row.get("messages") if isinstance(row, dict) else None
        if not isinstance(messages, list):
            raise NopeError("this row has no list of `messages`", where=where)
        yield [checked_message(message, where) for message in messages]


def checked_message(message: Any, where: str) -> Message:
    """A message with a known role and text, its other keys left out."""
    role = message.get("role") if isinstance(message, dict) else None
    if role not in ROLES:
        raise NopeError(f"the role {role!r} is none of {', '.join(ROLES)}", where=where)
    if not isinstance(message.get("content"), str):
        raise NopeError(f"a message of the {role} has no text in `content`", where=where)
    return {"role": role, "content": message["content"]}


def subset_name(name: str) -> str:
    """A source's name as part of a directory's name."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "data"
