"""What `nope prepare` was asked for, as lists of files with their hashes."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nope_gpt.artifacts import writing
from nope_gpt.data import catalog, python_docs
from nope_gpt.data.documents import MESSAGES, Schema
from nope_gpt.data.downloads import Remote
from nope_gpt.data.reading import (
    PLAIN_TEXT,
    SUFFIXES,
    Selection,
    is_readable,
    schema_in,
    sha256_of,
)
from nope_gpt.errors import MissingError, UsageError

STANDARD_INPUT = "-"
PYTHON_DOCS = "python-docs"


@dataclass(frozen=True)
class File:
    """A file of documents, here or on the Hub.

    Attributes:
        name: Its path within the source.
        digest: `sha256:HEX` or `git:HEX`.
        path: Where it is on this machine.
        remote: Where it is on the Hub.
        schema: What its rows are, or None if it must be looked at.
    """

    name: str
    size: int
    digest: str
    schema: Schema | None = None
    path: Path | None = None
    remote: Remote | None = None

    @property
    def shown(self) -> str:
        """What an error calls it."""
        if self.remote is not None:
            return f"{self.remote.repo_id}/{self.name}"
        return "standard input" if self.name == STANDARD_INPUT else str(self.path)

    @property
    def record(self) -> dict[str, Any]:
        """What a manifest keeps of it."""
        kind, _, value = self.digest.partition(":")
        return {"path": self.name, "size": self.size, kind: value}


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

    def selections(
        self, files: Iterable[File], paths: list[Path], counts: list[int]
    ) -> dict[Path, Selection]:
        """Which rows of each file are taken, given how many it has."""
        total = sum(counts)
        wanted = min(round(total * self.weight), total if self.cap is None else self.cap)
        result, first = {}, 0
        for file, path, count in zip(files, paths, counts, strict=True):
            chosen = (first + count) * wanted // total - first * wanted // total
            seed = int(file.digest.partition(":")[2][:8], 16)
            result[path] = Selection(count, chosen, seed)
            first += count
        return result


@dataclass(frozen=True)
class Source:
    """Files that belong together.

    Attributes:
        name: What `--dataset-subset` of `nope tune` calls their documents.
        files: In order.
        origin: Where they come from on the Hub.
        num_repeats: Files that were left out because an earlier one is the same.
    """

    name: str
    files: tuple[File, ...]
    share: Share = Share()
    origin: dict[str, str] = field(default_factory=dict)
    num_repeats: int = 0

    @property
    def record(self) -> dict[str, Any]:
        """What the manifest keeps of it."""
        share = {} if self.share.is_whole else {"weight": self.share.weight, "cap": self.share.cap}
        files = [file.record for file in self.files]
        return {"name": self.name, **self.origin, **share, "files": files}

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


@dataclass(frozen=True)
class Request:
    """What is asked for on the Hub.

    Attributes:
        names: Files, directories, `-`, `python-docs`, or data sets on the Hub.
        subset: Comma-separated, for the data sets on the Hub.
        known: Sources of an earlier, unfinished or finished preparation: what was pinned
            then is not looked up again.
    """

    names: list[str]
    text_column: str = "text"
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    known: tuple[dict[str, Any], ...] = ()


def open_sources(request: Request, spool: Path) -> list[Source]:
    """Find what was asked for.

    Args:
        request: The names, and how they are meant.
        spool: Directory for what is no file yet: standard input and python-docs.

    Raises:
        MissingError: A file, data set, subset or revision is not there.
        UsageError: A file is of a kind that cannot be read.
        NetworkError: The Hub cannot be reached.
    """
    on_hub = [name for name in request.names if is_on_hub(name)]
    if request.subset and not on_hub:
        raise UsageError(
            "--dataset-subset chooses among the subsets of a data set on the Hub",
            where=", ".join(request.names),
            hint="leave it out, or name fineweb, smoltalk, ultrafeedback or ORG/NAME",
        )
    remote = hub_sources(on_hub, request)
    sources: list[Source] = []
    for name in request.names:
        path = Path(name).expanduser()
        if name == STANDARD_INPUT:
            sources.append(standard_input(spool))
        elif name in remote:
            sources.extend(remote[name])
        elif path.is_dir():
            sources.extend(directory_sources(path, request.text_column))
        elif path.is_file():
            sources.append(file_source(path, request.text_column))
        elif name == PYTHON_DOCS:
            sources.extend(documentation(spool))
        else:
            raise MissingError(
                "there is no such file or directory",
                where=str(path),
                hint="give text, .jsonl or .parquet files, directories of them, `-` for "
                "standard input, `python-docs`, fineweb, smoltalk, ultrafeedback, or the id of a "
                "data set on the Hub",
            )
    return without_repeated_files(sources)


def is_on_hub(name: str) -> bool:
    """Whether a name is that of a data set on the Hub; what lies here comes first."""
    if Path(name).expanduser().exists() or name.endswith(SUFFIXES):
        return False
    return catalog.known_collection(name) is not None or catalog.is_hub_id(name)


def hub_sources(names: list[str], request: Request) -> dict[str, list[Source]]:
    """The chosen subsets of each data set on the Hub."""
    pinned = {
        entry["repo"]: entry["revision"]
        for entry in request.known
        if entry.get("requested_revision") == (request.revision or "main")
    }
    collections = {}
    for name in names:
        known = catalog.known_collection(name)
        repo_id = known.repo_id if known else name
        revision = pinned.get(repo_id) or catalog.revision_of(repo_id, request.revision)
        if known is None:
            known = catalog.described_collection(name, revision, request.split)
        collections[name] = (known, revision)
    chosen = catalog.choose([item for item, _ in collections.values()], request.subset)
    return {
        name: [
            hub_source(item, revision, subset, Share.parse(share), request)
            for subset, share in chosen[item.repo_id]
        ]
        for name, (item, revision) in collections.items()
    }


def hub_source(
    item: catalog.Collection, revision: str, subset: catalog.Subset, share: Share, request: Request
) -> Source:
    """One subset, with its files from the Hub's list or from an earlier one."""
    origin = {
        "repo": item.repo_id,
        "revision": revision,
        "requested_revision": request.revision or "main",
        "subset": subset.name,
        "split": request.split,
    }
    earlier = [entry for entry in request.known if origin.items() <= entry.items()]
    if earlier:
        remotes = [
            Remote(item.repo_id, revision, file["path"], file["size"], digest_in(file))
            for file in earlier[0]["files"]
        ]
    else:
        remotes = catalog.files_of(item.repo_id, revision, subset, request.split)
    files = tuple(
        File(each.path, each.size, each.digest, subset.schema, remote=each) for each in remotes
    )
    return Source(subset.source or subset.name, files, share, origin)


def digest_in(record: dict[str, Any]) -> str:
    """The hash in a file's record."""
    return f"sha256:{record['sha256']}" if "sha256" in record else f"git:{record['git']}"


def standard_input(spool: Path) -> Source:
    """What is piped in, kept in a file since it cannot be read again."""
    path = spool / "stdin.txt"
    with writing(path):
        spool.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file, 1 << 20)
    return Source("stdin", (local_file(path, STANDARD_INPUT, PLAIN_TEXT),))


def documentation(spool: Path) -> list[Source]:
    """Python's documentation: its prose, and questions with answers."""
    prose = ({"text": text} for text in python_docs.documents())
    answers = ({"messages": messages} for messages in python_docs.conversations())
    written = [
        (PLAIN_TEXT, written_lines(spool / "python-docs.jsonl", prose)),
        (MESSAGES, written_lines(spool / "python-docs-chat.jsonl", answers)),
    ]
    return [Source(PYTHON_DOCS, (local_file(path, path.name, schema),)) for schema, path in written]


def written_lines(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Write rows as a .jsonl file."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path


def directory_sources(path: Path, text_column: str) -> list[Source]:
    """The files of a directory: its texts as one source, and each kind of table as one."""
    found = sorted(file for file in path.rglob("*") if is_readable(file) and file.is_file())
    if not found:
        raise MissingError(f"no {', '.join(SUFFIXES)} file is in this directory", where=str(path))
    kinds: dict[str, list[File]] = {}
    for file in found:
        schema = schema_in(file, text_column)
        name = file.relative_to(path).as_posix()
        kinds.setdefault(schema.content, []).append(local_file(file, name, schema))
    return [Source(path.resolve().name, tuple(files)) for files in kinds.values()]


def file_source(path: Path, text_column: str) -> Source:
    """The documents of one file."""
    if not is_readable(path):
        raise UsageError(
            f"files that end in {path.suffix!r} cannot be read",
            where=str(path),
            hint=f"give {', '.join(SUFFIXES)}, or pipe text in: `nope prepare - < {path.name}`",
        )
    return Source(path.stem, (local_file(path, path.name, schema_in(path, text_column)),))


def local_file(path: Path, name: str, schema: Schema) -> File:
    """A file on this machine, hashed."""
    digest = f"sha256:{sha256_of(path)}"
    return File(name, path.stat().st_size, digest, schema, path=path)


def without_repeated_files(sources: list[Source]) -> list[Source]:
    """Sources in which no file has the bytes of an earlier one: each is read once."""
    seen: set[tuple[str, Schema | None]] = set()
    result = []
    for source in sources:
        files = []
        for file in source.files:
            if (file.digest, file.schema) not in seen:
                seen.add((file.digest, file.schema))
                files.append(file)
        repeats = len(source.files) - len(files)
        result.append(replace(source, files=tuple(files), num_repeats=repeats))
    return result
