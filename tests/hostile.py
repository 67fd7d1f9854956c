"""Damage to files that our own code wrote, for fuzzing: by Hypothesis here, by atheris in `fuzz/`.

What is damaged, and how, is drawn from a `Chance`, of which `random.Random` is one.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Chance(Protocol):
    """What draws."""

    def randrange(self, stop: int, /) -> int: ...

    def choice(self, items: Sequence[T], /) -> T: ...

    def randbytes(self, count: int, /) -> bytes: ...


RAW = {
    "@deep@": "[" * 10_000 + "]" * 10_000,
    "@table@": '{"a":' * 400 + "1" + "}" * 400,
    "@digits@": "9" * 5000,
    "@overflow@": "1e999",
    "@doubled@": '{"a": 1, "a": 2}',
    "@half@": r'"\ud800"',
    "@open@": "[",
}
"""What `json.dumps` does not write, by the text that stands for it."""

VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 7, 255, 1 << 16, 1 << 31, 1 << 40, 1 << 63, -(1 << 63)),
    *(10**30, 10**400, 0.5, -0.0, 1e-320, 1e308, math.nan, math.inf, -math.inf),
    *("", "x", "12", "a\x00b", "\x1b]0;title\x07", "x" * 10_000, "../../x", "/etc/passwd", ".."),
    *("bytes", "bpe-300", "uint32", "text", "chat", "preference", "assistant", "<|im_end|>", "F32"),
    *([], {}, [[]], [None], {"": None}, ["x", 1], {"scale": 2.0}),
    *RAW,
]

DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "U16", "U64", "BOOL", "C64"]
DTYPES += ["F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3"]
DESCRIPTIONS = ["|O", "<f8", "<i8", ">u2", "<u4", "|u1", "|S3", "<M8[s]", "<c16", "<U2", "|V4", "i"]
LENGTHS = ["(0,)", "(1,)", "()", "(2, 3)", "(-1,)", f"({1 << 40},)", f"({1 << 70},)", "(True,)"]


def damaged(content: bytes, name: str, chance: Chance) -> bytes:
    """What a file becomes: of its own format in most cases, or any bytes.

    Args:
        content: Of the file.
        name: Of the file, which tells its format.
        chance: Draws the damage.
    """
    ways: list[Callable[[bytes, Chance], bytes]] = [flipped, cut_short, spliced, anything]
    suffix = Path(name).suffix
    ways += FORMATS.get(suffix, []) * 4
    for _ in range(1 + chance.randrange(2)):
        content = chance.choice(ways)(content, chance)
    return content


def flipped(content: bytes, chance: Chance) -> bytes:
    """Some bits are others."""
    result = bytearray(content)
    for _ in range(1 + chance.randrange(4)):
        if result:
            result[chance.randrange(len(result))] ^= 1 << chance.randrange(8)
    return bytes(result)


def cut_short(content: bytes, chance: Chance) -> bytes:
    """The end is missing, or the beginning."""
    place = chance.randrange(len(content) + 1)
    return content[:place] if chance.randrange(4) else content[place:]


def spliced(content: bytes, chance: Chance) -> bytes:
    """A piece is there twice, or bytes are in its place."""
    start, size = chance.randrange(len(content) + 1), chance.randrange(32)
    piece = content[start : start + size] * 2 if chance.randrange(2) else chance.randbytes(size)
    return content[:start] + piece + content[start + size :]


def anything(_: bytes, chance: Chance) -> bytes:
    """Other bytes."""
    return chance.randbytes(chance.randrange(200))


def in_json(content: bytes, chance: Chance) -> bytes:
    """A JSON document with other values, keys or types."""
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        return flipped(content, chance)
    for _ in range(1 + chance.randrange(3)):
        document = changed(document, chance)
    text = json.dumps(document, ensure_ascii=bool(chance.randrange(2)))
    for stands, raw in RAW.items():
        text = text.replace(f'"{stands}"', raw)
    if not chance.randrange(8):  # A key that is there twice.
        text = re.sub(r'^\{("[^"]*": )', lambda match: "{" + match[1] + "null, " + match[1], text)
    return text.encode("utf-8", "surrogatepass")


def changed(document: Any, chance: Chance) -> Any:
    """A document in which one value is another, is gone, or has another name."""
    places = list(containers(document))
    if not places:
        return deepcopy(chance.choice(VALUES))
    place = chance.choice(places)
    keys: list[Any] = list(place) if isinstance(place, dict) else list(range(len(place)))
    if not keys:
        return deepcopy(chance.choice(VALUES))
    key = chance.choice(keys)
    match chance.randrange(6):
        case 0:
            del place[key]
        case 1 if isinstance(place, dict):
            place[str(chance.choice(VALUES))[:100]] = place.pop(key)
        case 2:
            place[key] = deepcopy(place[chance.choice(keys)])
        case 3 if isinstance(place[key], int | float) and abs(place[key]) < 1 << 80:
            place[key] *= chance.choice([-1, 2, 0.5, 1000, 1 << 40])
        case _:
            place[key] = deepcopy(chance.choice(VALUES))
    return document


def containers(document: Any) -> Iterator[Any]:
    """Every list and table in a document, it among them; of long ones the first values."""
    found = [document]
    while found:
        value = found.pop()
        if isinstance(value, dict | list):
            yield value
            inner = list(value.values()) if isinstance(value, dict) else value
            found += [part for part in inner[:300] if isinstance(part, dict | list)]


def in_lines(content: bytes, chance: Chance) -> bytes:
    """Lines of JSON, one of which has other values, is gone, or is there twice."""
    lines = content.split(b"\n")
    index = chance.randrange(len(lines))
    if not chance.randrange(4):
        return b"\n".join(lines[:index] + lines[index:][:1] * chance.randrange(3) + lines[index:])
    lines[index] = in_json(lines[index], chance)
    return b"\n".join(lines)


def in_words(content: bytes, chance: Chance) -> bytes:
    """Lines of words, one of which is another."""
    lines = [line.split(b" ") for line in content.split(b"\n")]
    line = chance.choice(lines)
    words = [b"", b"====", b"QUFB", b"-1", b"0", b"9" * 5000, b"1.5", b"QQ==", b"\xff", b"QQ" * 99]
    line[chance.randrange(len(line))] = chance.choice(words)
    return b"\n".join(b" ".join(line) for line in lines)


def in_tensors(content: bytes, chance: Chance) -> bytes:
    """A safetensors file with another header, whose length is right."""
    length = int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8 : 8 + length])
        entry = header[chance.choice(sorted(header))]
        match chance.randrange(4):
            case 0:
                entry["dtype"] = chance.choice(DTYPES)
            case 1:
                entry["shape"] = [chance.choice([0, 1, 2, 32, 1 << 31, 1 << 60]) for _ in range(2)]
            case 2:
                entry["shape"], entry["data_offsets"] = [0, 1 << 60], [0, 0]
        text = json.dumps(header).encode()
    except (ValueError, LookupError, TypeError, RecursionError):
        text = content[8 : 8 + length]
    if not chance.randrange(3):
        text = in_json(text, chance)
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def in_array(content: bytes, chance: Chance) -> bytes:
    """A .npy file with another header, of the same length where there is room."""
    header, rest = content[:128], content[128:]
    if chance.randrange(2):
        new = chance.choice(DESCRIPTIONS).encode()
        changed_header = re.sub(rb"'descr': '[^']*'", b"'descr': '" + new + b"'", header)
    else:
        new = chance.choice(LENGTHS).encode()
        changed_header = re.sub(rb"'shape': \([^)]*\)", b"'shape': " + new, header)
    text = changed_header.rstrip(b" \n").ljust(len(header) - 1) + b"\n"
    if not chance.randrange(3):
        rest = rest[: chance.randrange(len(rest) + 1)]
    if not chance.randrange(3):
        rest = chance.randbytes(8) * (len(rest) // 8)
    return text + rest


def in_toml(content: bytes, chance: Chance) -> bytes:
    """A line of settings more."""
    values = ["[1]", "{a = 1}", "1e999", "nan", "9" * 5000, "0x" + "f" * 5000, "1979-05-27", "'x'"]
    values += ["true", "-1", "0", "1e-400", "[" * 10_000, '"\\u0000"', f'"{"x" * 9000}"', "9" * 400]
    keys = ["learning_rate", "seed", "dataset_path", "max_steps", "optimizer", "config", "run_name"]
    keys += [".".join("a" * 3000), ".".join(["seed"] * 1500), "'\x7f'", "a"]
    return content + f"\n{chance.choice(keys)} = {chance.choice(values)}\n".encode()


FORMATS: dict[str, list[Callable[[bytes, Chance], bytes]]] = {
    ".json": [in_json],
    ".jsonl": [in_lines],
    ".tiktoken": [in_words],
    ".safetensors": [in_tensors],
    ".npy": [in_array],
    ".toml": [in_toml],
}
