"""Directories that appear whole or not at all, and know what they hold.

Data sets and checkpoints are directories with a `manifest.json` that names their
kind, their format version and the size and sha256 of every file. They are written
beside their final place and renamed into it, so a reader never meets half of one.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nope_gpt.errors import MissingError, NopeError, UsageError
from nope_gpt.files.json_files import DAMAGE, check, read_json
from nope_gpt.files.writing import beside, in_json, sync, writing

MANIFEST = "manifest.json"
PARITY = "parity.json"
FORMAT_VERSION = 1

Manifest = dict[str, Any]

DESCRIPTION = {"size": int, "sha256": str}
"""What a manifest says of a file."""


@contextmanager
def publish(
    path: Path, *, manifest: Manifest | None = None, overwrite: bool = False
) -> Iterator[Path]:
    """Give a directory to fill, then put it in its place whole.

    Every file is flushed to the disk before the rename, and the parent after it, so
    that a loss of power leaves no half of one. Replacing is two renames: the old directory
    is set aside as NAME.old-TOKEN before the new one takes its place.

    Args:
        path: The directory to make.
        manifest: What to write as manifest.json beside the list of files; the caller
            may complete it while filling the directory. None writes no manifest.
        overwrite: Replace a directory that is already there.

    Raises:
        UsageError: The directory exists and may not be replaced, or holds something else.
        CapacityError: The disk is full.
        NopeError: The place cannot be written.
    """
    refuse_existing(path, overwrite=overwrite)
    place = path.absolute()  # `.` has no name of its own.
    temporary = beside(place, "tmp")
    with writing(path):
        try:
            temporary.mkdir(parents=True)
            yield temporary
            files = sorted(file for file in temporary.iterdir())
            if manifest is not None:
                listing = {file.name: describe(file) for file in files}
                files.append(temporary / MANIFEST)
                files[-1].write_bytes(in_json(manifest | {"files": listing}))
            for file in files:
                sync(file)
            sync(temporary)
            replace_directory(temporary, place)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        sync(place.parent)


def refuse_existing(path: Path, *, overwrite: bool) -> None:
    """Refuse a place that has something that may not be replaced.

    Raises:
        UsageError: The directory exists and may not be replaced, or holds something else.
    """
    if path.exists() and not overwrite:
        raise UsageError(
            "this already exists",
            where=str(path),
            hint="choose another name, or add --overwrite to replace it",
        )
    if path.is_dir() and not path.is_symlink() and not may_be_replaced(path):
        raise UsageError(
            "this directory holds something else, and is not replaced",
            where=str(path),
            hint="choose another place",
        )


def replace_directory(new: Path, path: Path) -> None:
    """Rename a directory into place, setting aside and then removing what was there.

    If another process takes the place first, its directory stays there and this one fails.
    """
    old = beside(path, "old")
    try:
        if path.exists():
            with suppress(FileNotFoundError):  # Another process has just set it aside.
                path.replace(old)
        new.replace(path)
    finally:
        if not path.exists() and old.exists():
            with suppress(OSError):  # Unless another process has just taken the place.
                old.replace(path)
        if old.is_symlink() or old.is_file():
            old.unlink()
        elif old.is_dir():
            # Windows and NFS keep what another process reads.
            shutil.rmtree(old, ignore_errors=True)


def may_be_replaced(path: Path) -> bool:
    """Whether a directory is empty or gone, or one that this program writes whole."""
    try:
        names = {file.name for file in path.iterdir()}
    except FileNotFoundError:  # Another process has just set it aside.
        return True
    is_model = {"config.json", "model.safetensors"} <= names
    return not names or bool(names & {MANIFEST, PARITY}) or is_model


def is_kind(path: Path, kind: str) -> bool:
    """Whether a directory has a manifest that says it is of a kind, whole or damaged."""
    try:
        return bool(read_json(path / MANIFEST)["kind"] == kind)
    except DAMAGE:
        return False


def describe(path: Path) -> dict[str, Any]:
    """The size in bytes and the sha256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}


def read_manifest(path: Path, kind: str) -> Manifest:
    """Read the manifest of a directory and check that it is what it should be.

    Args:
        path: The directory.
        kind: What it must be: "dataset" or "checkpoint".

    Raises:
        MissingError: There is no manifest: nothing there, or something unfinished.
        NopeError: The manifest is damaged or of a newer format, or a file it names is missing
            or of another size.
        UsageError: This is a file, or a directory of another kind.
    """
    file = path / MANIFEST
    if path.is_file():
        raise UsageError(f"this is a file, not the directory of a {kind}", where=str(path))
    try:
        manifest = read_json(file)
        check(manifest, {"kind": str, "files": {...: DESCRIPTION}})
        found, version = manifest["kind"], manifest["format_version"]
        sizes = {name: entry["size"] for name, entry in manifest["files"].items()}
    except FileNotFoundError:
        raise MissingError(f"this is not a {kind}: it has no {MANIFEST}", where=str(path)) from None
    except DAMAGE as error:
        raise NopeError(
            f"the manifest is damaged ({type(error).__name__}: {error})", where=str(file)
        ) from None
    if found != kind:
        raise UsageError(
            f"this is a {found}, not a {kind}",
            where=str(path),
            hint=f"see what it is: nope inspect {path}",
        )
    if version != FORMAT_VERSION:
        raise NopeError(
            f"this {kind} has format {version}, and this program reads format {FORMAT_VERSION}",
            where=str(path),
            hint="pip install --upgrade nope-gpt",
        )
    for name, size in sizes.items():
        part = path / Path(name).name
        actual = None
        with suppress(OSError):  # Another process may be replacing the directory.
            actual = part.stat().st_size if part.is_file() else None
        if actual != size:
            seen = "is missing" if actual is None else f"has {actual:,} bytes instead of {size:,}"
            raise NopeError(f"this {kind} is damaged: {name} {seen}", where=str(path))
    return dict(manifest)


def verify(path: Path, manifest: Manifest) -> None:
    """Compare every file with its sha256.

    Raises:
        NopeError: A file is not what was written; names it.
    """
    for name, entry in manifest["files"].items():
        file = path / Path(name).name
        try:
            found = describe(file)["sha256"]
        except (OSError, ValueError) as error:  # The latter of a name with a zero byte.
            reason = getattr(error, "strerror", None) or error
            raise NopeError(f"cannot be read: {reason}", where=str(file)) from None
        if found != entry["sha256"]:
            raise NopeError(
                f"this {manifest['kind']} is damaged: {name} is not what was written",
                where=str(path),
            )
