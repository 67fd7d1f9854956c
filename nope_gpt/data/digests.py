"""What tells the bytes of a file: the hash that the Hub states of it."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any, Self

CHUNK = 1 << 20


class Digest(str):
    """`sha256:HEX`; or `git:HEX`, the id of a blob, which is all that the Hub states of a file
    outside of LFS.
    """

    __slots__ = ()

    @classmethod
    def of(cls, kind: str, value: str) -> Self:
        """That of a kind and its hexadecimal digits."""
        return cls(f"{kind}:{value}")

    @classmethod
    def of_file(cls, path: Path, kind: str = "sha256") -> Self:
        """That of a file on this machine.

        Raises:
            OSError: It cannot be read.
        """
        with path.open("rb") as file:
            if kind == "sha256":
                return cls.of(kind, hashlib.file_digest(file, kind).hexdigest())
            blob = hashlib.sha1(f"blob {os.fstat(file.fileno()).st_size}\0".encode())  # noqa: S324
            while chunk := file.read(CHUNK):
                blob.update(chunk)
        return cls.of(kind, blob.hexdigest())

    @classmethod
    def in_record(cls, record: dict[str, Any]) -> Self:
        """That of a file's record in a manifest."""
        kind = "sha256" if "sha256" in record else "git"
        return cls.of(kind, record[kind])

    @property
    def kind(self) -> str:
        """`sha256` or `git`."""
        return self.partition(":")[0]

    @property
    def value(self) -> str:
        """Its hexadecimal digits."""
        return self.partition(":")[2]

    @property
    def short(self) -> str:
        """Enough of it to name a file by."""
        return self.value[:16]

    @property
    def record(self) -> dict[str, str]:
        """What a manifest says."""
        return {self.kind: self.value}

    @property
    def is_well_formed(self) -> bool:
        """Whether it has as many digits as its kind has."""
        return re.fullmatch(r"sha256:[0-9a-f]{64}|git:[0-9a-f]{40}", self) is not None

    def is_of(self, path: Path) -> bool:
        """Whether a file on this machine has it.

        Raises:
            OSError: The file cannot be read.
        """
        return type(self).of_file(path, self.kind) == self
