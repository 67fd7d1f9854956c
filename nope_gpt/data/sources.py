"""What `nope prepare` reads: sources of files with their hashes, and shares of them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nope_gpt.data.digests import Digest
from nope_gpt.data.documents import Schema
from nope_gpt.data.downloads import Remote
from nope_gpt.data.reading import Selection, reading
from nope_gpt.errors import NopeError, UsageError

STANDARD_INPUT = "-"

Stamp = tuple[int, int, int]
"""Size in bytes, nanoseconds of the last change, and inode of a file."""


@dataclass(frozen=True)
class File:
    """A file of documents, here or on the Hub.

    Attributes:
        name: Its path within the source.
        size: In bytes.
        digest: Of its bytes.
        path: Where it is on this machine.
        remote: Where it is on the Hub.
        schema: What its rows are, or None if it must be looked at.
        stamp: What the system said of it when it was hashed, if it can change.
    """

    name: str
    size: int
    digest: Digest
    schema: Schema | None = None
    path: Path | None = None
    remote: Remote | None = None
    stamp: Stamp | None = None

    @property
    def shown(self) -> str:
        """What an error calls it."""
        if self.remote is not None:
            return f"{self.remote.repo_id}/{self.name}"
        return "standard input" if self.name == STANDARD_INPUT else str(self.path)

    @property
    def record(self) -> dict[str, Any]:
        """What a manifest keeps of it."""
        return {"path": self.name, "size": self.size, **self.digest.record}


@dataclass(frozen=True)
class Share:
    """How much of a source is taken: a fraction of its rows, and no more than so many.

    Raises:
        UsageError: The text is not `:WEIGHT`, `@COUNT` or both.
    """

    weight: float = 1.0
    cap: int | None = None

    @classmethod
    def parse(cls, text: str) -> Share:
        match = re.fullmatch(r"(?::(\d*\.?\d+))?(?:@(\d+))?", text)
        weight = float(match[1] or 1.0) if match else 0.0
        cap = int(match[2]) if match and match[2] else None
        if not 0.0 < weight <= 1.0 or cap == 0:
            raise UsageError(
                f"{text!r} behind a subset is no share of it",
                hint="write NAME:0.5 for half of its rows, NAME@10000 for at most so many",
            )
        return cls(weight, cap)

    @property
    def is_whole(self) -> bool:
        return self.weight == 1.0 and self.cap is None

    def wanted(self, total: int) -> int:
        """How many of so many rows it is."""
        return min(round(total * self.weight), total if self.cap is None else self.cap)

    def selection(self, file: File, before: int, count: int, total: int) -> Selection:
        """Which rows of a file are taken; all files together give the share to the row.

        Args:
            file: Whose hash the choice follows from.
            before: Rows of the files before it.
            count: Rows of the file.
            total: Rows of all files.
        """
        wanted = self.wanted(total)
        chosen = ((before + count) * wanted // total - before * wanted // total) if total else 0
        return Selection(count, chosen, int(file.digest.value[:8], 16))


def named_share(word: str) -> tuple[str, str]:
    """A subset's name, and what stands behind it."""
    match = re.fullmatch(r"\s*([^:@]*?)\s*((?:[:@].*)?)", word)
    return (match[1], match[2]) if match else (word, "")


@dataclass(frozen=True)
class Source:
    """Files that belong together.

    Attributes:
        name: What `--dataset-subset` of `nope tune` calls their documents.
        files: In order.
        share: What of their rows is taken.
        origin: Where they come from on the Hub.
    """

    name: str
    files: tuple[File, ...]
    share: Share = Share()
    origin: dict[str, str] = field(default_factory=dict)

    @property
    def record(self) -> dict[str, Any]:
        """What the manifest keeps of it."""
        share = {} if self.share.is_whole else {"weight": self.share.weight, "cap": self.share.cap}
        files = [file.record for file in self.files]
        return {"name": self.name, **self.origin, **share, "files": files}


def stamp_of(path: Path) -> Stamp:
    """What tells that a file has changed."""
    seen = path.stat()
    return seen.st_size, seen.st_mtime_ns, seen.st_ino


def refuse_changed(files: Iterable[File]) -> None:
    """Check that files are still those that were hashed.

    Raises:
        NopeError: One is not.
    """
    for file in files:
        if file.path is None or file.stamp is None:
            continue
        with reading(file.path):
            if stamp_of(file.path) != file.stamp:
                raise NopeError(
                    "this file changed while it was being prepared",
                    where=file.shown,
                    hint="the same command again reads it anew, once nothing writes to it",
                )
