"""Units of work: about 256 MB of text each, whose output is one shard.

What a unit holds follows from the files alone, and what it gives from the unit alone,
so a shard has the same bytes whoever made it, and whenever. A process encodes a span of
a unit into work files; when all are there, one of them turns them into the shard.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from nope_gpt.data.documents import (
    PREFERENCE,
    TEXT,
    Document,
    Refused,
    canonical,
    document_of,
    texts_of,
)
from nope_gpt.data.encoding import EncodedDocument, Limit, encode, token_dtype
from nope_gpt.data.reading import Span, rows, where_of
from nope_gpt.data.shards import Part, write_shard
from nope_gpt.data.sources import File
from nope_gpt.files.writing import writing
from nope_gpt.tokenization import BaseTokenizer, ChatTokenizer

UNIT_SIZE = 256 * 1000 * 1000
"""Bytes of text in a shard, about."""

WRITE_SIZE = 1 << 20
"""Bytes that a work file collects before they are written."""

DOCUMENTS = np.dtype([("position", "<u8"), ("rest", "<u8"), ("lengths", "<i8", (2,))])
"""Of each document: the first and the next 8 bytes of its sha256, and tokens per stream."""


@dataclass(frozen=True)
class Unit:
    """Spans of files that make one shard.

    Attributes:
        name: Of the shard: a hash of the files and of the rows that are taken, and the number of
            the unit in them.
        source: Whose files these are.
        content: "text", "chat" or "preference".
        spans: What is read, in this order.
    """

    name: str
    source: str
    content: str
    spans: tuple[Span, ...]

    @property
    def record_name(self) -> str:
        """What its record is called."""
        return f"{self.content}-{self.name}"


@dataclass(frozen=True)
class Recipe:
    """What a document's tokens depend on, besides the document.

    Attributes:
        tokenizer: Directory that the tokenizer is saved in.
        limit: Of conversations.
        holdout_fraction: Of the documents.
    """

    tokenizer: Path
    limit: Limit
    holdout_fraction: float


@dataclass
class Tally:
    """What became of some documents.

    Attributes:
        text_bytes: Of those that were encoded, in UTF-8.
        refused: How many were, by reason, and where the first one stands.
    """

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    cut: int = 0
    refused: dict[str, list[Any]] = field(default_factory=dict)

    def add(self, other: Tally) -> None:
        """Count what another counted, too."""
        self.documents += other.documents
        self.tokens += other.tokens
        self.text_bytes += other.text_bytes
        self.cut += other.cut
        for reason, (count, where) in other.refused.items():
            self.refused.setdefault(reason, [0, where])[0] += count


def units_of(source: str, cut: list[tuple[File, list[Span]]]) -> list[Unit]:
    """Make units of the spans of some files, each content apart."""
    digest = digest_of(source, cut)
    spans = [span for _, of_file in cut for span in of_file]
    result: list[Unit] = []
    for content in sorted({span.schema.content for span in spans}):
        group: list[Span] = []
        size = 0
        mine = [span for span in spans if span.schema.content == content]
        for index, span in enumerate(mine):
            group.append(span)
            size += span.size
            if size >= UNIT_SIZE or index == len(mine) - 1:
                result.append(Unit(f"{digest}-{len(result):04d}", source, content, tuple(group)))
                group, size = [], 0
    return result


def digest_of(source: str, cut: list[tuple[File, list[Span]]]) -> str:
    """What names the units of some files: the hash of one, or of all of theirs and the choice."""
    lines: list[str] = [file.digest for file, _ in cut]
    chosen = [repr(spans[0].selection) for _, spans in cut if spans and spans[0].selection]
    if chosen:
        lines += [source, *chosen]
    elif len(cut) == 1:
        return cut[0][0].digest.short
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def encode_span(span: Span, work: Path, recipe: Recipe) -> Tally:
    """Encode the documents of a span into work files.

    Args:
        span: What to read.
        work: The beginning of the work files' names.
        recipe: How to encode.

    Raises:
        NopeError: The file is damaged.
    """
    tokenizer = tokenizer_in(recipe.tokenizer, span.schema.content)
    dtype = token_dtype(tokenizer.vocabulary_size)
    tally = Tally()
    table: list[tuple[int, int, tuple[int, int]]] = []
    with ExitStack() as stack:
        stack.enter_context(writing(work))
        files = [
            [stack.enter_context(WorkFile(path)) for path in paths]
            for paths in stream_files(work, span.schema.content)
        ]
        for document, encoded in encoded_documents(span, tokenizer, recipe.limit, tally):
            content = canonical(document)
            digest = hashlib.sha256(content).digest()
            lengths = (encoded[0].tokens.size, encoded[1].tokens.size if len(encoded) > 1 else 0)
            table.append((int.from_bytes(digest[:8]), int.from_bytes(digest[8:16]), lengths))
            for each, (tokens, *masks) in zip(encoded, files, strict=True):
                tokens.add(each.tokens.astype(dtype))
                if each.mask is not None:
                    masks[0].add(each.mask)
            tally.documents += 1
            tally.tokens += sum(lengths)
            tally.text_bytes += len(content) if isinstance(document, str) else size_of(document)
        with WorkFile(documents_file(work)) as file:
            file.add(np.array(table, DOCUMENTS))
    return tally


def encoded_documents(
    span: Span, tokenizer: BaseTokenizer, limit: Limit, tally: Tally
) -> Iterator[tuple[Document, tuple[EncodedDocument, ...]]]:
    """The documents of a span that can be trained on; those that cannot are counted."""
    for number, row in rows(span):
        try:
            document = document_of(row, span.schema)
            encoded, was_cut = encode(document, tokenizer, limit)
        except Refused as refusal:
            reason = str(refusal)
            if reason not in tally.refused:
                tally.refused[reason] = [0, where_of(span, number, span.name)]
            tally.refused[reason][0] += 1
            continue
        tally.cut += was_cut
        yield document, encoded


class WorkFile:
    """Numbers as they are, written every now and then; a full disk is told as such."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("wb")
        self.waiting: list[NDArray[Any]] = []
        self.num_bytes = 0

    def __enter__(self) -> Self:
        return self

    def add(self, array: NDArray[Any]) -> None:
        """Append an array."""
        self.waiting.append(array)
        self.num_bytes += array.nbytes
        if self.num_bytes >= WRITE_SIZE:
            self.write()

    def write(self) -> None:
        """Write what waits."""
        if self.waiting:
            self.file.write(np.concatenate(self.waiting).data)
        self.waiting, self.num_bytes = [], 0

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self.file:
            if kind is None:
                self.write()


def documents_file(work: Path) -> Path:
    """The work file that lists the documents: `DOCUMENTS`."""
    return Path(f"{work}.documents")


def stream_files(work: Path, content: str) -> list[list[Path]]:
    """The work files of each stream: its tokens and, but for text, its mask."""
    kinds = ["tokens"] if content == TEXT else ["tokens", "mask"]
    count = 2 if content == PREFERENCE else 1
    return [[Path(f"{work}.{kind}{index}") for kind in kinds] for index in range(count)]


@functools.cache
def tokenizer_in(directory: Path, content: str) -> BaseTokenizer:
    """The tokenizer of a process, loaded once."""
    return (BaseTokenizer if content == TEXT else ChatTokenizer).load(directory)


def size_of(document: Document) -> int:
    """Bytes of the texts in a document."""
    texts = texts_of(document)
    return sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)


def finish_unit(
    unit: Unit, works: list[Path], directory: Path, recipe: Recipe, dropped: NDArray[np.int64]
) -> dict[str, Any]:
    """Turn the work files of a unit into its shard, or two for pairs.

    Args:
        unit: The unit.
        works: The beginnings of the names of its work files, in order.
        directory: Of the data set.
        recipe: How it was encoded.
        dropped: Documents to leave out, by their number in the unit.

    Returns:
        The record of the unit: its shards, as the manifest lists them, and counts.
    """
    tables = [np.fromfile(documents_file(work), DOCUMENTS) for work in works]
    table = np.concatenate(tables)
    keep = np.ones(table.size, dtype=bool)
    keep[dropped] = False
    held = holdout(table["position"], keep, recipe.holdout_fraction)
    dtype = token_dtype(tokenizer_in(recipe.tokenizer, unit.content).vocabulary_size)
    sides = ("chosen", "rejected") if unit.content == PREFERENCE else ("",)
    shards = []
    for index, side in enumerate(sides if keep.any() else ()):
        parts = [
            Part(each["lengths"][:, index], *stream_files(work, unit.content)[index])
            for work, each in zip(works, tables, strict=True)
        ]
        name = f"shard-{unit.name}-{side}" if side else f"shard-{unit.name}"
        entry = write_shard(directory, name, parts, keep & ~held, keep & held, dtype, unit.content)
        shards.append(entry | {"source": unit.source} | ({"side": side} if side else {}))
    lengths = table["lengths"].sum(axis=1)[keep]
    return {
        "shards": shards,
        "documents": int(keep.sum()),
        "holdout_documents": int((held & keep).sum()),
        "tokens": int(lengths.sum()),
        "duplicates": table.size - len(np.unique(table[["position", "rest"]])),
        "dropped": int(dropped.size),
        "lengths": np.bincount(np.frexp(lengths)[1] - 1).tolist(),
    }


HOLDOUT_RULE = (
    "a document is held out if the first 8 bytes of its sha256, as a fraction of 2^64, are below "
    "the fraction; a shard of different documents never holds out none or all of them, but at "
    "least the lowest, and never the highest"
)


def holdout(
    positions: NDArray[np.uint64], keep: NDArray[np.bool_], fraction: float
) -> NDArray[np.bool_]:
    """Which documents of a shard are held out: `HOLDOUT_RULE`."""
    held = np.zeros(positions.size, dtype=bool)
    if fraction == 0 or not keep.any():
        return held
    lowest, highest = positions[keep].min(), positions[keep].max()
    if lowest != highest:
        held = (positions / 2**64 < fraction) | (positions == lowest)
        held &= positions != highest
    return held
