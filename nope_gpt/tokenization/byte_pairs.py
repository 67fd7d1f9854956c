"""Byte-pair ranks in the formats of other tools: tiktoken's lines, Hugging Face's tokenizer.json.

tiktoken merges any two neighbours whose bytes together are a token, the lowest rank first. Other
tools list the pairs that may merge, in order; the list that says the same is made here.
"""

from __future__ import annotations

import base64
import functools
import heapq
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nope_gpt.errors import NopeError
from nope_gpt.files.json_files import DAMAGE

Ranks = Mapping[bytes, int]
"""The tokens that bytes merge to, and the id of each."""

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
CL100K_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)

O200K_PATTERN = "|".join(
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
"""As tiktoken has them; a test compares."""


def as_lines(ranks: Ranks) -> bytes:
    """Ranks in tiktoken's format: a token in base64 and its rank on each line."""
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())


def read_lines(path: Path) -> dict[bytes, int]:
    """Read ranks in tiktoken's format.

    Raises:
        NopeError: The file is damaged, or a rank is missing or doubled.
    """
    ranks: dict[bytes, int] = {}
    try:
        for line in path.read_bytes().splitlines():
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (OSError, ValueError) as error:
        raise NopeError(f"the ranks cannot be read: {error}", where=str(path)) from None
    refuse_gaps(ranks, str(path))
    return ranks


def refuse_gaps(ranks: Ranks, where: str) -> None:
    """Refuse ranks that are not whole.

    Raises:
        NopeError: Some are missing or doubled.
    """
    whole = sorted(ranks.values()) == list(range(len(ranks)))
    if not whole or any(bytes([byte]) not in ranks for byte in range(256)):
        raise NopeError("the ranks are not whole: some are missing or doubled", where=where)


@functools.cache
def letters() -> tuple[str, ...]:
    """The letter that GPT-2 spells each byte with: itself where it can be seen."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unseen = [byte for byte in range(256) if byte not in seen]
    table = dict(zip(seen, seen, strict=True)) | {
        byte: 256 + index for index, byte in enumerate(unseen)
    }
    return tuple(chr(table[byte]) for byte in range(256))


@functools.cache
def bytes_of_letters() -> dict[str, int]:
    """The byte of each letter."""
    return {letter: byte for byte, letter in enumerate(letters())}


def spelled(token: bytes) -> str:
    """A token in GPT-2's letters."""
    return "".join(letters()[byte] for byte in token)


def unspelled(text: str) -> bytes:
    """The bytes that GPT-2's letters stand for.

    Raises:
        KeyError: It has a letter that stands for none.
    """
    return bytes(bytes_of_letters()[letter] for letter in text)


def merges(ranks: Ranks) -> list[tuple[bytes, bytes]]:
    """The pairs that merge, lowest rank first: of each token the last merge that makes it.

    A token that no two lower ones make by themselves has none.
    """
    pairs = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = parts_below(token, ranks, rank)
        if len(parts) == 2:
            pairs.append((parts[0], parts[1]))
    return pairs


def parts_below(token: bytes, ranks: Ranks, limit: int) -> list[bytes]:
    """What bytes become when only merges of a lower rank than the limit happen."""
    ends = list(range(1, len(token) + 1))  # Where the part that begins at a place ends.
    starts = list(range(-1, len(token)))  # Where the part before the one at a place begins.
    waiting: list[tuple[int, int, int]] = []

    def consider(start: int) -> None:
        """Let two neighbours wait for their turn, if they merge at all."""
        if start >= 0 and ends[start] < len(token):
            end = ends[ends[start]]
            rank = ranks.get(token[start:end], limit)
            if rank < limit:
                heapq.heappush(waiting, (rank, start, end))

    for place in range(len(token)):
        consider(place)
    while waiting:
        _, start, end = heapq.heappop(waiting)
        middle = ends[start]
        if middle in (0, len(token)) or ends[middle] != end:
            continue  # One of the two is part of a larger one by now.
        ends[start], ends[middle] = end, 0
        starts[end] = start
        consider(starts[start])
        consider(start)
    places = [0] if token else []
    while places and ends[places[-1]] < len(token):
        places.append(ends[places[-1]])
    return [token[start : ends[start]] for start in places]


SPLITS: dict[str, tuple[str | None, str | None]] = {
    GPT2_PATTERN: (None, "gpt-2"),
    CL100K_PATTERN: (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
        "dbrx",
    ),
    O200K_PATTERN: (O200K_PATTERN, None),  # llama.cpp's gpt-4o cuts outside of ASCII otherwise.
}
"""How text is cut into words, in tiktoken's pattern: Hugging Face's, where that is not its
built-in one of GPT-2 (Oniguruma knows no possessive `{1,3}+`), and what llama.cpp calls it, if it
has it."""


def splits_of(pattern: str) -> tuple[str | None, str | None]:
    """Hugging Face's pattern and llama.cpp's name for tiktoken's pattern.

    Raises:
        NopeError: They know none that cuts alike.
    """
    if pattern in SPLITS:
        return SPLITS[pattern]
    raise NopeError("no other tool is known to cut text into words as this tokenizer does")


def tokenizer_json(
    ranks: Ranks,
    pattern: str,
    special: Mapping[str, int],
    plain: Mapping[str, int],
    first_token: int | None = None,
) -> dict[str, Any]:
    """A tokenizer in the format of Hugging Face's `tokenizers`.

    Args:
        ranks: Of the byte-pair tokens.
        pattern: tiktoken's, for cutting text into words.
        special: Tokens that steer, found in any text.
        plain: Tokens that no text becomes, and that are text when a model writes them.
        first_token: What every text is to begin with, if it is.
    """
    regex, _ = splits_of(pattern)
    own = {"add_prefix_space": False, "trim_offsets": True}
    words: dict[str, Any] = {"type": "ByteLevel", **own, "use_regex": regex is None}
    if regex is not None:
        cut = {
            "type": "Split",
            "pattern": {"Regex": regex},
            "behavior": "Isolated",
            "invert": False,
        }
        words = {"type": "Sequence", "pretokenizers": [cut, words]}
    vocabulary = {spelled(token): rank for token, rank in ranks.items()} | dict(plain)
    vocabulary |= special  # Or they would get the ids after the last.
    after: dict[str, Any] = {"type": "ByteLevel", **own, "use_regex": True}
    if first_token is not None:
        name = next(text for text, id in vocabulary.items() if id == first_token)
        after = {"type": "Sequence", "processors": [after, beginning_with(name, first_token)]}
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": id, "content": text, **added, "special": True} for text, id in special.items()
        ],
        "normalizer": None,
        "pre_tokenizer": words,
        "post_processor": after,
        "decoder": {"type": "ByteLevel", **own, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [[spelled(left), spelled(right)] for left, right in merges(ranks)],
        },
    }


def beginning_with(name: str, token: int) -> dict[str, Any]:
    """What puts a token before a text, and between two that belong together nothing."""
    token_before = {"SpecialToken": {"id": name, "type_id": 0}}
    one, other = ({"Sequence": {"id": part, "type_id": 0}} for part in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [token_before, one],
        "pair": [token_before, one, other],
        "special_tokens": {name: {"id": name, "ids": [token], "tokens": [name]}},
    }


def read_tokenizer_json(document: Any, where: str) -> tuple[dict[bytes, int], str, dict[str, int]]:
    """The ranks, the pattern and all other tokens of a tokenizer of Hugging Face's.

    Args:
        document: A tokenizer.json.
        where: It was read from.

    Raises:
        NopeError: It is damaged, or no byte-pair tokenizer like those written here.
    """
    try:
        model = document["model"]
        added = {str(item["content"]): int(item["id"]) for item in document["added_tokens"]}
        pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
        ranks, others = told_apart(
            {str(text): int(id) for text, id in model["vocab"].items()}, pairs
        )
        pattern = pattern_of(document["pre_tokenizer"])
        if model["type"] != "BPE" or document["normalizer"]:
            raise ValueError("it is not a byte-level BPE")
    except DAMAGE as error:
        raise NopeError(
            f"the tokenizer cannot be read ({type(error).__name__}: {error})", where=where
        ) from None
    if pairs != [[spelled(left), spelled(right)] for left, right in merges(ranks)]:
        raise NopeError("the tokenizer merges in another order than its ranks", where=where)
    return ranks, pattern, others | added


def told_apart(
    vocabulary: Mapping[str, int], pairs: list[list[str]]
) -> tuple[dict[bytes, int], dict[str, int]]:
    """Which tokens bytes merge to, and which nothing does.

    Args:
        vocabulary: In GPT-2's letters.
        pairs: That merge.

    Raises:
        KeyError: A token that bytes merge to has a letter that stands for none.
    """
    merged = {left + right for left, right in pairs} | set(letters())
    ranks = {unspelled(text): id for text, id in vocabulary.items() if text in merged}
    return ranks, {text: id for text, id in vocabulary.items() if text not in merged}


def pattern_of(words: Any) -> str:
    """tiktoken's pattern for a pre-tokenizer of Hugging Face's.

    Raises:
        ValueError: None is known.
    """
    parts = words["pretokenizers"] if words["type"] == "Sequence" else [words]
    regex = next((part["pattern"]["Regex"] for part in parts if part["type"] == "Split"), None)
    last = parts[-1]
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        raise ValueError("it does not cut text into words as tiktoken does")
    for pattern, (theirs, _) in SPLITS.items():
        if theirs == regex and last["use_regex"] == (regex is None):
            return pattern
    raise ValueError("it cuts text into words in an unknown way")
