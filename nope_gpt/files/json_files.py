"""JSON that anybody may have written, read within bounds and checked for what it must be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LARGEST = 1 << 29
"""Bytes of a file; the manifest of a trillion tokens has a tenth of that."""

DEEPEST = 64
"""Lists and tables within each other."""

DAMAGE = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
"""What reading a JSON file that is not what it should be can raise."""

ESCAPED = "backslashreplace"
"""How JSON is encoded: what UTF-8 cannot hold, half a character, becomes JSON's own escape."""

Pattern = type | tuple[Any] | list[Any] | Mapping[Any, Any]
"""What a value must be: of a type, where `int` is a whole number of at most 63 bits that is not
negative; with a pattern in parentheses, that or nothing; a list whose items all have a pattern; or
a table with a pattern for each key, and under `...` for every other key."""


def read_json(path: Path) -> Any:
    """Read a JSON file; one that is no plain file, such as a pipe that nobody writes to, never.

    Raises:
        OSError: There is no such file, or it cannot be read.
        ValueError: It is not JSON, too large or too deep, or names a key twice.
        RecursionError: It is far too deep.
    """
    size = path.stat().st_size
    if not path.is_file():
        raise OSError("it is no plain file")
    if size > LARGEST:
        raise ValueError(f"it has {size:,} bytes")
    text = path.read_text(encoding="utf-8")
    document = parse_json(text)
    if "\\u" in text:  # Half a character, which nothing can print or write, is told here.
        json.dumps(document, ensure_ascii=False).encode()
    return document


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: It is not JSON, too deep, or names a key twice.
        RecursionError: It is far too deep.
    """
    document = json.loads(text, object_pairs_hook=table)
    level = [document]
    for _ in range(DEEPEST):
        level = [part for value in level for part in parts(value) if isinstance(part, dict | list)]
        if not level:
            return document
    raise ValueError(f"it has more than {DEEPEST} lists and tables within each other")


def table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A table of keys that differ: of a doubled one, readers take different values."""
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        doubled = next(name for name in result if names.count(name) > 1)
        raise ValueError(f"it has {doubled[:40]!r} twice")
    return result


def parts(value: Any) -> list[Any]:
    """What is in a list or a table."""
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def check(value: Any, pattern: Pattern, name: str = "") -> None:
    """Check that a JSON value is what a pattern says.

    Args:
        value: Read from a file.
        pattern: It must have.
        name: What an error calls it, if it is a part of something.

    Raises:
        ValueError: It is something else; names the part.
    """
    if isinstance(pattern, type):
        kind = int | float if pattern is float else pattern
        fits = isinstance(value, kind) and isinstance(value, bool) == (pattern is bool)
        if not fits or (pattern is int and not 0 <= value < 1 << 63):
            raise ValueError(f"{name or 'it'} is wrong or missing")
    elif isinstance(pattern, tuple):
        if value is not None:
            check(value, pattern[0], name)
    elif isinstance(pattern, list):
        check(value, list, name)
        for index, item in enumerate(value):
            check(item, pattern[0], f"{name}[{index}]")
    else:
        check(value, dict, name)
        for key, inner in pattern.items():
            for own in value.keys() - pattern.keys() if key is ... else [key]:
                check(value.get(own), inner, f"{name}.{own[:40]}".lstrip("."))
