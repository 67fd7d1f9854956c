"""The files of a preparation, wherever they are, and what is taken of them."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from nope_gpt.data import units
from nope_gpt.data.documents import Document, Refused, Schema, document_of
from nope_gpt.data.downloads import Downloads
from nope_gpt.data.reading import (
    TEXT_SUFFIXES,
    Selection,
    Span,
    rows,
    schema_in,
    spans,
    with_rows_counted,
)
from nope_gpt.data.schedule import Group
from nope_gpt.data.sources import File, Source
from nope_gpt.data.staging import Staging, read
from nope_gpt.errors import UsageError
from nope_gpt.files.writing import write_json


class Corpus:
    """Sources, with their files at hand when they are needed.

    Args:
        sources: What was asked for.
        text_column: Which column of a table holds text.
        downloads: Fetches the files of the Hub.
        staging: What is finished, and how many rows there are.
        keeps_downloads: Whether files stay when they are encoded.
    """

    def __init__(
        self,
        sources: list[Source],
        text_column: str,
        downloads: Downloads,
        staging: Staging,
        keeps_downloads: bool,
    ) -> None:
        self.sources = sources
        self.text_column = text_column
        self.downloads = downloads
        self.staging = staging
        self.keeps_downloads = keeps_downloads
        self.groups = groups_of(sources)
        self.users: dict[str, list[Group]] = defaultdict(list)
        for group in self.groups:
            for file in group.files:
                self.users[file.digest].append(group)
        self.num_rows: dict[str, int] = {}

    def fetch(self, file: File) -> Path:
        """Where a file lies; downloads it first if need be."""
        if file.path is not None:
            return file.path
        assert file.remote is not None
        return self.downloads.fetch(file.remote)

    def discard(self, file: File) -> None:
        """Remove a downloaded file once nothing needs it: sources may share one by its bytes."""
        if file.remote is None or self.keeps_downloads:
            return
        if all(self.staging.has_group(group.name) for group in self.users[file.digest]):
            self.downloads.path_of(file.remote).unlink(missing_ok=True)

    def units_of(self, group: Group, paths: list[Path]) -> list[units.Unit]:
        """The units of a group whose files are here."""
        cut = [
            (file, self.chosen_spans(group.source, file, path))
            for file, path in zip(group.files, paths, strict=True)
        ]
        return units.units_of(group.source.name, cut)

    def spans(self, file: File, path: Path) -> list[Span]:
        """The spans of a file that is here."""
        return spans(path, file.name, file.shown, self.schema(file, path))

    def schema(self, file: File, path: Path) -> Schema:
        """What the rows of a file are."""
        return file.schema or schema_in(path, self.text_column, file.shown)

    def chosen_spans(self, source: Source, file: File, path: Path) -> list[Span]:
        """The spans of a file, with the rows that its source's share takes."""
        found = self.spans(file, path)
        if source.share.is_whole:
            return found
        selection = self.selection(source, file)
        counted = with_rows_counted(found)
        return [dataclasses.replace(span, selection=selection) for span in counted]

    def selection(self, source: Source, file: File) -> Selection:
        """Which rows of a file are taken, since only a share of its source is wanted."""
        counts = [self.num_rows[each.digest] for each in source.files]
        index = source.files.index(file)
        return source.share.selection(file, sum(counts[:index]), counts[index], sum(counts))

    def count_rows(self) -> None:
        """Count the rows of the sources of which only a share is wanted: in all their files.

        Raises:
            UsageError: A file has no rows.
        """
        shared = [source for source in self.sources if not source.share.is_whole]
        if not shared:
            return
        with self.staging.exclusively():
            self.num_rows = dict(read(self.staging.rows_file) or {})
            for source in shared:
                for file in source.files:
                    if file.digest not in self.num_rows:
                        self.num_rows[file.digest] = self.rows_in(source, file)
                        write_json(self.staging.rows_file, self.num_rows)

    def rows_in(self, source: Source, file: File) -> int:
        """How many rows a file has."""
        path = self.fetch(file)
        if path.suffix.lower() in TEXT_SUFFIXES:
            raise UsageError(
                "a text has no rows of which to take a share",
                where=file.shown,
                hint=f"take the whole of it: --dataset-subset {source.origin.get('subset')}",
            )
        return sum(span.num_rows for span in with_rows_counted(self.spans(file, path)))

    def documents(self, source: Source) -> Iterator[Document]:
        """The documents of a source, from the first file on."""
        for file in source.files:
            for span in self.spans(file, self.fetch(file)):
                for _, row in rows(span):
                    try:
                        yield document_of(row, span.schema)
                    except Refused:
                        continue


def groups_of(sources: list[Source]) -> list[Group]:
    """Files that are fetched and encoded together: small ones of a source in a row."""
    result: list[Group] = []
    for source in sources:
        files: list[File] = []
        size = 0
        for file in source.files:
            if files and size + file.size > units.UNIT_SIZE:
                result.append(Group(len(result), source, tuple(files)))
                files, size = [], 0
            files.append(file)
            size += file.size
        if files:
            result.append(Group(len(result), source, tuple(files)))
    return result
