"""Files that appear whole or not at all, and what to say when the system refuses to write one."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from safetensors import SafetensorError

from nope_gpt.amounts import format_bytes
from nope_gpt.errors import CapacityError, NopeError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the system's refusal to write into an error that says what to do.

    Raises:
        CapacityError: The disk or a quota is full.
        NopeError: The place cannot be written for another reason.
    """
    try:
        yield
    except SafetensorError as error:
        code = re.search(r"(?:code: |os error )(\d+)", str(error))
        if code is None:
            raise
        with writing(path):
            raise OSError(int(code[1]), os.strerror(int(code[1]))) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise CapacityError(
                f"the disk is full: {error.strerror}",
                where=str(path),
                hint="free some space, or choose another place",
            ) from error
        hints = {errno.ENAMETOOLONG: "choose a shorter name", errno.ENOENT: "it was removed"}
        raise NopeError(
            f"cannot write here: {error.strerror or error}",
            where=str(path),
            hint=hints.get(error.errno or 0, "choose a directory that you may write to"),
        ) from error


def write_file(path: Path, content: bytes) -> None:
    """Replace a file in one step, so that it is never seen half-written."""
    temporary = beside(path, "tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(content)
            sync(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        sync(path.parent)


def write_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write tensors as a safetensors file, which others may read as they may any other file."""
    from safetensors.torch import save_file

    ordinary = beside(path, "tmp")
    with writing(path):
        save_file(tensors, path, metadata=metadata)
        ordinary.touch()
        path.chmod(ordinary.stat().st_mode)
        ordinary.unlink()


class ArrayFile:
    """A .npy file that is being written.

    Attributes:
        name: Of the file.
        size: Bytes so far.
        digest: The sha256 so far.
    """

    def __init__(self, name: str, file: BinaryIO) -> None:
        self.name = name
        self.file = file
        self.size = 0
        self.digest = hashlib.sha256()

    def write(self, array: NDArray[Any]) -> None:
        """Append numbers of the declared type."""
        if array.size:
            self.append(array.data.cast("B"))

    def append(self, content: bytes | memoryview) -> None:
        """Append bytes."""
        self.file.write(content)
        self.digest.update(content)
        self.size += len(content)

    @property
    def description(self) -> dict[str, Any]:
        """What a manifest says of the file."""
        return {"size": self.size, "sha256": self.digest.hexdigest()}


@contextmanager
def array_file(path: Path, dtype: np.dtype[Any], length: int) -> Iterator[ArrayFile]:
    """Write a .npy file of a known length piece by piece; it appears when it is whole.

    Unlike `numpy.save` it tells a full disk as such.
    """
    from numpy.lib import format as npy

    header = io.BytesIO()
    shape = {"descr": dtype.str, "fortran_order": False, "shape": (int(length),)}
    npy.write_array_header_1_0(header, shape)
    temporary = beside(path, "tmp")
    with writing(path):
        try:
            with temporary.open("wb") as file:
                result = ArrayFile(path.name, file)
                result.append(header.getvalue())
                yield result
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write a value as readable JSON in one step."""
    write_file(path, in_json(value))


def in_json(value: Any) -> bytes:
    """A value as JSON for people, the same on every system."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def refuse_small_disk(directory: Path, size: int, what: str, flag: str) -> None:
    """Refuse to begin what the disk has no room for.

    Args:
        directory: To write in.
        size: Bytes that it takes.
        what: It is.
        flag: That chooses another place.

    Raises:
        CapacityError: With both figures.
    """
    free = shutil.disk_usage(nearest_directory(directory)).free
    if size > free:
        raise CapacityError(
            f"{what} takes {format_bytes(size)}, and the disk has {format_bytes(free)} left",
            where=str(directory),
            hint=f"free some space, or choose another {flag}",
        )


def nearest_directory(path: Path) -> Path:
    """The directory itself, or the first one above it that is there."""
    path = path.absolute()
    return next(each for each in (path, *path.parents) if each.is_dir())


def beside(path: Path, kind: str) -> Path:
    """A name beside a place that no other process has, on this machine or another."""
    return path.with_name(f"{path.name}.{kind}-{secrets.token_hex(4)}")


def is_leftover(path: Path) -> bool:
    """Whether a killed program left this beside the place it was to have."""
    return re.search(r"\.(tmp|old)-[0-9a-f]+$", path.name) is not None


def plain(name: str) -> str:
    """A name as a part of a directory's name, on every system."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "data"


def sync(path: Path) -> None:
    """Flush a file or directory to the disk."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open a directory.
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
