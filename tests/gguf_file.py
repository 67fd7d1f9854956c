"""An own reader of GGUF files, from the format's specification: the settings, and the tensors.

Knows nothing of the package, nor of the `gguf` library.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
TEXT, ARRAY = 8, 9
F32, F16, Q8_0, BF16 = 0, 1, 8, 30
BLOCK = 32


@dataclass
class Cursor:
    """Where a file is read."""

    content: bytes
    place: int = 0

    def scalar(self, code: str) -> Any:
        size = struct.calcsize(f"<{code}")
        (value,) = struct.unpack_from(f"<{code}", self.content, self.place)
        self.place += size
        return value

    def text(self) -> str:
        length = self.scalar("Q")
        self.place += length
        return self.content[self.place - length : self.place].decode()

    def value(self, kind: int) -> Any:
        if kind == TEXT:
            return self.text()
        if kind == ARRAY:
            inner, length = self.scalar("I"), self.scalar("Q")
            return [self.value(inner) for _ in range(length)]
        return self.scalar(SCALARS[kind])


def read(path: Path) -> tuple[dict[str, Any], dict[str, NDArray[np.float32]]]:
    """The settings and the tensors of a file."""
    cursor = Cursor(path.read_bytes())
    assert cursor.content[:4] == b"GGUF"
    cursor.place = 4
    assert cursor.scalar("I") == 3
    num_tensors, num_settings = cursor.scalar("Q"), cursor.scalar("Q")
    settings = {}
    for _ in range(num_settings):
        name = cursor.text()
        settings[name] = cursor.value(cursor.scalar("I"))
    described = []
    for _ in range(num_tensors):
        name = cursor.text()
        shape = [cursor.scalar("Q") for _ in range(cursor.scalar("I"))]
        described.append((name, shape[::-1], cursor.scalar("I"), cursor.scalar("Q")))
    alignment = settings.get("general.alignment", 32)
    first = -(-cursor.place // alignment) * alignment
    tensors = {}
    for name, shape, kind, offset in described:
        tensors[name] = numbers(cursor.content, first + offset, shape, kind)
    return settings, tensors


def numbers(content: bytes, place: int, shape: list[int], kind: int) -> NDArray[np.float32]:
    """A tensor in float32."""
    count = int(np.prod(shape))
    if kind == Q8_0:
        layout = np.dtype([("scale", "<f2"), ("values", "i1", BLOCK)])
        blocks = np.frombuffer(content, layout, count // BLOCK, place)
        flat = blocks["scale"].astype(np.float32)[:, None] * blocks["values"]
    elif kind == BF16:
        halves = np.frombuffer(content, "<u2", count, place)
        flat = (halves.astype(np.uint32) << 16).view(np.float32)
    else:
        flat = np.frombuffer(content, {F32: "<f4", F16: "<f2"}[kind], count, place)
    return flat.astype(np.float32).reshape(shape)
