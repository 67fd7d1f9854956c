"""What `nope prepare` was asked for, found: on this machine or on the Hub."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nope_gpt.data import catalog, python_docs
from nope_gpt.data.digests import Digest
from nope_gpt.data.documents import MESSAGES, Schema
from nope_gpt.data.downloads import Remote
from nope_gpt.data.reading import (
    PLAIN_TEXT,
    SUFFIXES,
    is_readable,
    reading,
    schema_in,
)
from nope_gpt.data.sources import STANDARD_INPUT, File, Share, Source, stamp_of
from nope_gpt.errors import MissingError, NopeError, UsageError
from nope_gpt.files.writing import write_file, writing

PYTHON_DOCS = "python-docs"

OTHER_SUFFIXES = (".csv", ".tsv", ".json", ".html", ".xml", ".arrow", ".gz", ".zst", ".xz", ".zip")
"""Names that end so are of files, not of data sets on the Hub."""


@dataclass(frozen=True)
class Request:
    """What is asked for on the Hub.

    Attributes:
        names: Files, directories, `-`, `python-docs`, or data sets on the Hub.
        text_column: Of tables of text.
        subset: Comma-separated, for the data sets on the Hub.
        split: Of the data sets on the Hub.
        revision: Branch, tag or commit of them; None for the newest state.
        known: Sources of an earlier, unfinished or finished preparation: what was pinned
            then is not looked up again.
    """

    names: list[str]
    text_column: str = "text"
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    known: tuple[dict[str, Any], ...] = ()


def open_sources(request: Request, spool: Path, note: Callable[[str], None]) -> list[Source]:
    """Find what was asked for.

    Args:
        request: The names, and how they are meant.
        spool: Directory for what is no file yet: standard input and python-docs.
        note: Told what is left out.

    Raises:
        MissingError: A file, data set, subset or revision is not there.
        UsageError: A file is of a kind that cannot be read.
        NetworkError: The Hub cannot be reached.
    """
    if "" in request.names:
        raise UsageError("a source has no name", hint="`.` is the current directory")
    if request.names.count(STANDARD_INPUT) > 1:
        raise UsageError("standard input can be read once", hint="give `-` once")
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
            sources.extend(directory_sources(path, request.text_column, note))
        elif path.is_file():
            sources.append(file_source(path, request.text_column))
        elif name == PYTHON_DOCS:
            sources.extend(documentation(spool))
        elif path.exists():
            raise UsageError(
                "this is neither a file nor a directory",
                where=str(path),
                hint=f"pipe it in: `nope prepare - < {path}`",
            )
        else:
            raise MissingError(
                "there is no such file or directory",
                where=str(path),
                hint="give text, .jsonl or .parquet files, directories of them, `-` for "
                "standard input, `python-docs`, fineweb, smoltalk, ultrafeedback, or the id of a "
                "data set on the Hub",
            )
    return without_repeated_files(sources, note)


def is_on_hub(name: str) -> bool:
    """Whether a name is that of a data set on the Hub; what lies here comes first."""
    if Path(name).expanduser().exists() or name.lower().endswith((*SUFFIXES, *OTHER_SUFFIXES)):
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
            known = catalog.described_collection(name, revision)
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
            Remote(item.repo_id, revision, file["path"], file["size"], Digest.in_record(file))
            for file in earlier[0]["files"]
        ]
    else:
        remotes = catalog.files_of(item.repo_id, revision, subset, request.split)
    files = tuple(
        File(each.path, each.size, each.digest, subset.schema, remote=each) for each in remotes
    )
    return Source(subset.source or subset.name, files, share, origin)


def standard_input(spool: Path) -> Source:
    """What is piped in, kept in a file since it cannot be read again.

    Raises:
        UsageError: It is closed.
        CapacityError: The disk is full.
    """
    path = spool / "stdin.txt"
    if sys.stdin is None or sys.stdin.closed:
        raise UsageError("standard input is closed", hint="zcat corpus.gz | nope prepare -")
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
    files = [local_file(path, path.name, schema) for schema, path in written]
    # Another process may put the same bytes in their place, which is no change.
    return [Source(PYTHON_DOCS, (replace(file, stamp=None),)) for file in files]


def written_lines(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Write rows as a .jsonl file, which several processes may do at once."""
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_file(path, "".join(lines).encode())
    return path


def directory_sources(path: Path, text_column: str, note: Callable[[str], None]) -> list[Source]:
    """The files of a directory: its texts as one source, and each kind of table as one.

    Raises:
        MissingError: There is none that can be read.
        NopeError: One is damaged.
    """
    files = sorted(files_below(path))
    found = [file for file in files if is_readable(file)]
    if not found:
        raise MissingError(f"no {', '.join(SUFFIXES)} file is in this directory", where=str(path))
    if len(found) < len(files):
        suffixes = sorted({file.suffix or file.name for file in files if not is_readable(file)})
        shown = ", ".join(suffixes[:5]) + (", …" if len(suffixes) > 5 else "")
        left_out = len(files) - len(found)
        note(
            f"left out of {path}: {left_out:,} file{'s' * (left_out > 1)} of other kinds ({shown})"
        )
    kinds: dict[str, list[File]] = {}
    for file in found:
        schema = schema_in(file, text_column)
        name = file.relative_to(path).as_posix()
        kinds.setdefault(schema.content, []).append(local_file(file, name, schema))
    return [Source(path.resolve().name, tuple(files)) for files in kinds.values()]


def files_below(path: Path) -> Iterator[Path]:
    """The files in a directory and those in it, through links; hidden ones are left out.

    Raises:
        NopeError: A directory cannot be read.
    """

    def refused(error: OSError) -> None:
        raise NopeError(f"cannot be read: {error.strerror}", where=str(error.filename))

    seen = set()
    for folder, folders, names in os.walk(path, onerror=refused, followlinks=True):
        seen.add(os.path.realpath(folder))
        below = (name for name in folders if not name.startswith("."))
        folders[:] = [name for name in below if os.path.realpath(Path(folder, name)) not in seen]
        here = (Path(folder, name) for name in names if not name.startswith("."))
        yield from (file for file in here if file.is_file())


def file_source(path: Path, text_column: str) -> Source:
    """The documents of one file.

    Raises:
        UsageError: It is of a kind that cannot be read.
        NopeError: It is damaged.
    """
    if not is_readable(path):
        raise UsageError(
            f"files that end in {path.suffix!r} cannot be read",
            where=str(path),
            hint=f"give {', '.join(SUFFIXES)}, or pipe text in: `nope prepare - < {path.name}`",
        )
    return Source(path.stem, (local_file(path, path.name, schema_in(path, text_column)),))


def local_file(path: Path, name: str, schema: Schema) -> File:
    """A file on this machine, hashed.

    Raises:
        UsageError: Its name is no text.
        NopeError: It cannot be read.
    """
    try:
        name.encode()
    except UnicodeEncodeError:
        raise UsageError(
            "the name of this file is not UTF-8",
            where=repr(os.fsencode(path)),
            hint="rename it, or pipe it in with `nope prepare -`",
        ) from None
    with reading(path):
        stamp = stamp_of(path)
        digest = Digest.of_file(path)
    return File(name, stamp[0], digest, schema, path=path, stamp=stamp)


def without_repeated_files(sources: list[Source], note: Callable[[str], None]) -> list[Source]:
    """Sources in which no file has the bytes of an earlier one: each is read once, unless it
    is for another content, or for another share of its rows."""
    seen: set[Any] = set()
    result = []
    for source in sources:
        files = []
        for file in source.files:
            how = (file.digest, file.schema and file.schema.content, source.share)
            if how not in seen:
                seen.add(how)
                files.append(file)
        repeats = len(source.files) - len(files)
        if repeats:
            those = "1 file is the same" if repeats == 1 else f"{repeats:,} files are the same"
            note(f"left out of {source.name}: {those} as an earlier one")
        if files:
            result.append(replace(source, files=tuple(files)))
    return result
