"""A directory appears whole or not at all, and whoever reads it learns if it is not."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nope_gpt.errors import CapacityError, MissingError, NopeError, UsageError
from nope_gpt.files.artefacts import (
    MANIFEST,
    describe,
    may_be_replaced,
    publish,
    read_manifest,
    verify,
)
from nope_gpt.files.writing import array_file, beside, is_leftover, write_file, write_json, writing

CONTENT = bytes(range(256)) * 4
HEAD: dict[str, Any] = {"kind": "dataset", "format_version": 1}


def made(path: Path, content: bytes = CONTENT, **options: Any) -> Path:
    with publish(path, manifest=dict(HEAD), **options) as directory:
        (directory / "a.bin").write_bytes(content)
        (directory / "b.txt").write_text("hello")
    return path


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """Let no file grow beyond a limit, as on a disk that has no more room."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_directory_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "data"
    with publish(path, manifest=dict(HEAD)) as directory:
        (directory / "a.bin").write_bytes(CONTENT)
        assert not path.exists()
        assert directory.parent == path.parent, "a rename is atomic within one file system alone"
        assert not (directory / MANIFEST).exists(), "the manifest comes last"
    assert names(path) == ["a.bin", MANIFEST]
    assert names(path.parent) == ["data"]


def test_the_manifest_lists_every_file_with_its_size_and_sha256(tmp_path: Path) -> None:
    manifest = read_manifest(made(tmp_path / "data"), "dataset")
    assert manifest == HEAD | {
        "files": {
            "a.bin": {"size": len(CONTENT), "sha256": hashlib.sha256(CONTENT).hexdigest()},
            "b.txt": {"size": 5, "sha256": hashlib.sha256(b"hello").hexdigest()},
        }
    }
    verify(tmp_path / "data", manifest)


def test_a_manifest_may_be_completed_while_the_directory_is_filled(tmp_path: Path) -> None:
    manifest = dict(HEAD)
    with publish(tmp_path / "data", manifest=manifest):
        manifest["late"] = "é"
    assert read_manifest(tmp_path / "data", "dataset")["late"] == "é"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, OSError])
def test_nothing_is_left_after_a_failure(tmp_path: Path, error: type[BaseException]) -> None:
    root = tmp_path / "root"
    root.mkdir()
    with pytest.raises((error, NopeError)), publish(root / "data", manifest=dict(HEAD)) as inner:
        (inner / "a.bin").write_bytes(CONTENT)
        raise error
    assert names(root) == []


def test_what_exists_is_not_replaced_unless_asked(tmp_path: Path) -> None:
    path = made(tmp_path / "root" / "data")
    with pytest.raises(UsageError, match=r"already exists[^$]*--overwrite"):
        made(path, b"other")
    assert (path / "a.bin").read_bytes() == CONTENT
    made(path, b"other", overwrite=True)
    assert (path / "a.bin").read_bytes() == b"other"
    verify(path, read_manifest(path, "dataset"))
    assert names(path.parent) == ["data"]


def test_a_failed_replacement_leaves_what_was_there(tmp_path: Path) -> None:
    path = made(tmp_path / "root" / "data")
    with pytest.raises(ValueError, match="halfway"), publish(path, overwrite=True):
        raise ValueError("halfway")
    verify(path, read_manifest(path, "dataset"))
    assert names(path.parent) == ["data"]


def test_what_was_there_comes_back_if_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = made(tmp_path / "root" / "artefact", b"first")
    real = Path.replace

    def refusing(source: Path, target: Path) -> Path:
        if target == path and ".tmp-" in source.name:
            raise PermissionError(errno.EACCES, "refused")
        return real(source, target)

    monkeypatch.setattr(Path, "replace", refusing)
    with pytest.raises(NopeError, match="cannot write here"):
        made(path, b"second", overwrite=True)
    assert (path / "a.bin").read_bytes() == b"first"
    assert names(path.parent) == ["artefact"]


@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_file_or_a_link_can_be_replaced(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "root" / "data"
    path.parent.mkdir()
    if kind == "file":
        path.write_text("in the way")
    else:
        path.symlink_to(made(tmp_path / "elsewhere"), target_is_directory=True)
    made(path, b"other", overwrite=True)
    assert (path / "a.bin").read_bytes() == b"other"
    assert names(path.parent) == ["data"]
    if kind == "link":
        assert (tmp_path / "elsewhere" / "a.bin").read_bytes() == CONTENT


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    path = tmp_path / "file" / "data"
    for attempt in (made, lambda path: write_file(path, CONTENT)):
        with pytest.raises(NopeError, match="cannot write here") as caught:
            attempt(path)
        assert caught.value.where == str(path)
        assert type(caught.value) is NopeError
    assert (tmp_path / "file").read_text() == "not a directory"


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    for attempt in (made, lambda path: write_file(path, CONTENT)):
        with (
            full_disk(len(CONTENT) - 1),
            pytest.raises(CapacityError, match="the disk is full") as caught,
        ):
            attempt(root / "data")
        assert caught.value.exit_code == 4
        assert names(root) == []


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_manifest_that_does_not_fit_leaves_nothing(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    with full_disk(10), pytest.raises(CapacityError), publish(root / "data", manifest=dict(HEAD)):
        pass
    assert names(root) == []


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (errno.ENOSPC, CapacityError),
        (errno.EDQUOT, CapacityError),
        (errno.EFBIG, CapacityError),
        (errno.EACCES, NopeError),
        (errno.EROFS, NopeError),
    ],
)
def test_only_what_more_room_would_mend_is_a_lack_of_room(
    code: int, expected: type[NopeError]
) -> None:
    with pytest.raises(NopeError, match=os.strerror(code)) as caught, writing(Path("here")):
        raise OSError(code, os.strerror(code))
    assert type(caught.value) is expected
    assert caught.value.where == "here"
    assert caught.value.hint


def an_array(path: Path) -> None:
    with array_file(path, np.dtype(np.uint8), 3) as file:
        file.write(np.arange(3, dtype=np.uint8))


@pytest.mark.parametrize("write", [made, an_array, lambda path: write_file(path, CONTENT)])
def test_what_appears_is_on_the_disk_before_its_name_is_and_then_its_name(
    tmp_path: Path, write: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, int]] = []
    fsync, replace = os.fsync, Path.replace

    def flushing(descriptor: int) -> None:
        events.append(("flush", os.fstat(descriptor).st_ino))
        fsync(descriptor)

    def renaming(self: Path, target: Path) -> Path:
        events.append(("rename", self.stat().st_ino))
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", flushing)
    monkeypatch.setattr(Path, "replace", renaming)
    path = tmp_path / "new"
    write(path)
    renamed = max(i for i, event in enumerate(events) if event == ("rename", path.stat().st_ino))
    parts = {("flush", part.stat().st_ino) for part in (path, *path.glob("*"))}
    assert parts <= set(events[:renamed])
    assert ("flush", tmp_path.stat().st_ino) in events[renamed:]


def test_a_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "new" / "value.json"
    write_json(path, {"é": 1})
    write_json(path, {"é": 2})
    assert json.loads(path.read_text(encoding="utf-8")) == {"é": 2}
    assert "é" in path.read_text(encoding="utf-8"), "readable, not escaped"
    assert names(path.parent) == ["value.json"]


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "int64"])
@pytest.mark.parametrize("size", [0, 1, 1000])
def test_an_array_is_written_as_numpy_writes_it(tmp_path: Path, dtype: str, size: int) -> None:
    array = np.arange(size, dtype=dtype)
    with array_file(tmp_path / "array.npy", array.dtype, size) as file:
        for piece in np.array_split(array, 3):
            file.write(piece)
        assert not (tmp_path / "array.npy").exists(), "it appears when it is whole"
    expected = io.BytesIO()
    np.save(expected, array)
    assert (tmp_path / "array.npy").read_bytes() == expected.getvalue()
    assert file.description == describe(tmp_path / "array.npy")
    assert names(tmp_path) == ["array.npy", "home"]


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """A damage to the manifest's content."""

    def damage(path: Path) -> None:
        manifest = json.loads((path / MANIFEST).read_text())
        change(manifest)
        (path / MANIFEST).write_text(json.dumps(manifest))

    return damage


def raw(content: bytes) -> Callable[[Path], object]:
    return lambda path: (path / MANIFEST).write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda path: (path / MANIFEST).unlink(), MissingError, "not a dataset: it has no manif"),
        (edit(lambda m: m.update(kind="checkpoint")), UsageError, "a checkpoint, not a dataset"),
        (edit(lambda m: m.update(format_version=2)), NopeError, "format 2, and this.*format 1"),
        (lambda path: (path / "a.bin").unlink(), NopeError, "damaged: a.bin is missing"),
        (
            lambda path: (path / "a.bin").write_bytes(CONTENT[:-1]),
            NopeError,
            "a.bin has 1,023 bytes instead of 1,024",
        ),
        (raw(b""), NopeError, "manifest is damaged"),
        (raw(b'{"kind": "dataset", '), NopeError, "manifest is damaged"),
        (raw(b"\xff\xfe"), NopeError, "manifest is damaged"),
        (raw(b"[]"), NopeError, "manifest is damaged"),
        (raw(b"null"), NopeError, "manifest is damaged"),
        (raw(b"[" * 100_000), NopeError, "manifest is damaged"),
        (edit(lambda m: m.pop("files")), NopeError, "manifest is damaged"),
        (edit(lambda m: m.update(files=["a.bin"])), NopeError, "manifest is damaged"),
        (edit(lambda m: m["files"]["a.bin"].pop("size")), NopeError, "manifest is damaged"),
        (edit(lambda m: m["files"]["a.bin"].update(size="big")), NopeError, "manifest is damaged"),
        (edit(lambda m: m["files"]["a.bin"].update(size=1e999)), NopeError, "manifest is damaged"),
    ],
)
def test_a_damaged_directory_is_refused(
    tmp_path: Path, damage: Callable[[Path], object], error: type[NopeError], message: str
) -> None:
    path = made(tmp_path / "data")
    damage(path)
    with pytest.raises(error, match=message) as caught:
        read_manifest(path, "dataset")
    assert type(caught.value) is error
    assert str(path) in str(caught.value.where)


def test_a_newer_format_says_how_to_read_it(tmp_path: Path) -> None:
    path = made(tmp_path / "data")
    edit(lambda manifest: manifest.update(format_version=2))(path)
    with pytest.raises(NopeError) as caught:
        read_manifest(path, "dataset")
    assert caught.value.hint == "pip install --upgrade nope-gpt"


def test_a_flipped_bit_is_found_and_its_file_is_named(tmp_path: Path) -> None:
    path = made(tmp_path / "data")
    (path / "a.bin").write_bytes(b"\x01" + CONTENT[1:])
    manifest = read_manifest(path, "dataset")
    with pytest.raises(NopeError, match="damaged: a.bin is not what was written"):
        verify(path, manifest)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "..", "sub/a.bin/../../../x"])
def test_a_manifest_reads_nothing_outside_its_directory(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text("hello")
    path = made(tmp_path / "data")
    edit(lambda manifest: manifest["files"].update({name: {"size": 5, "sha256": ""}}))(path)
    with pytest.raises(NopeError, match="is missing"):
        read_manifest(path, "dataset")


def test_a_directory_of_something_else_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="this directory holds something else"):
        made(tmp_path / "project", overwrite=True)
    assert (tmp_path / "project" / "thesis.txt").read_text() == "years of work"


def test_processes_of_the_same_number_on_two_machines_do_not_meet(tmp_path: Path) -> None:
    first, second = (beside(tmp_path / "data", "tmp") for _ in range(2))
    assert first != second
    assert is_leftover(first)
    assert is_leftover(beside(tmp_path / "data", "old"))
    assert not is_leftover(tmp_path / "data.tmp")


def test_a_file_that_vanished_or_cannot_be_read_is_named_when_verified(tmp_path: Path) -> None:
    path = made(tmp_path / "data")
    manifest = read_manifest(path, "dataset")
    (path / "a.bin").unlink()
    with pytest.raises(NopeError, match="cannot be read") as caught:
        verify(path, manifest)
    assert caught.value.where == str(path / "a.bin")


def test_a_file_is_no_directory_of_an_artefact(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("hello")
    with pytest.raises(UsageError, match="this is a file, not the directory of a dataset"):
        read_manifest(tmp_path / "data", "dataset")


def test_a_place_that_another_process_has_just_set_aside_holds_nothing_else(tmp_path: Path) -> None:
    assert may_be_replaced(tmp_path / "gone")
