r"""GPT-2's pattern in less time, with the same tokens.

The pattern that cuts text into words before merging ends in `\s+(?!\S)|\s`: of blanks
before a word, the last one stands apart. That look-ahead keeps the regular expression
from being run as an automaton. It matters only where three blanks or more follow each
other, or two at the end of a text: of two blanks before a word, `\s+(?!\S)` takes one,
as `\s` does. So those runs are cut out first, each but its last blank, and what lies
between them is matched without it.
"""

from __future__ import annotations

import functools

import numpy as np
import tiktoken
from numpy.typing import NDArray

from nope_gpt.tokenization.byte_pairs import GPT2_PATTERN

WITHOUT_LOOKAHEAD = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s"

BLANKS = [*range(9, 14), 32, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B)]
BLANKS += [0x2028, 0x2029, 0x202F, 0x205F, 0x3000]
"""Unicode's White_Space, which is what `\\s` means to tiktoken."""

IS_BLANK = np.zeros(1 << 16, dtype=bool)
IS_BLANK[BLANKS] = True

LONGEST_KEPT = 64
"""Blanks in a run whose tokens are kept, for the next time."""

MARK = "\ufdd0\x00nope\x00\ufdd0"
"""What stands for a run while the rest is encoded; a text that holds it goes the slow way."""


class Splitter:
    """Encodes as an encoding does whose pattern is GPT-2's.

    Args:
        encoding: With `GPT2_PATTERN` as its pattern.
    """

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        assert encoding._pat_str == GPT2_PATTERN
        self.mark = encoding.n_vocab
        simple = tiktoken.Encoding(
            encoding.name,
            pat_str=WITHOUT_LOOKAHEAD,
            mergeable_ranks=encoding._mergeable_ranks,
            special_tokens={MARK: self.mark},
        )
        self.exact = encoding._core_bpe.encode_to_tiktoken_buffer
        self.simple = simple._core_bpe.encode_to_tiktoken_buffer
        self.tokens_of_short_run = functools.lru_cache(1 << 12)(self.tokens_of_run)

    def encode(self, text: str) -> NDArray[np.uint32]:
        """The tokens of a text; what looks like a control token stays text.

        Raises:
            UnicodeEncodeError: It has lone surrogates.
        """
        runs = blank_runs(text)
        if not runs:
            return np.frombuffer(self.simple(text, set()), np.uint32)
        if MARK in text:
            return np.frombuffer(self.exact(text, set()), np.uint32)
        between, apart, place = [], [], 0
        for start, end in runs:
            between.append(text[place:start])
            is_short = end - start <= LONGEST_KEPT
            tokens_of = self.tokens_of_short_run if is_short else self.tokens_of_run
            apart.append(tokens_of(text[start:end]))
            place = end
        between.append(text[place:])
        tokens = np.frombuffer(self.simple(MARK.join(between), {MARK}), np.uint32)
        return filled(tokens, np.flatnonzero(tokens == self.mark), apart)

    def tokens_of_run(self, blanks: str) -> list[int]:
        """The tokens of blanks that stand apart."""
        return list(map(int, np.frombuffer(self.exact(blanks, set()), np.uint32)))


def filled(
    tokens: NDArray[np.uint32], marks: NDArray[np.int64], apart: list[list[int]]
) -> NDArray[np.uint32]:
    """Tokens with every mark replaced by the tokens that belong there."""
    inserted = [token for each in apart for token in each]
    if len(inserted) == len(apart):
        result = tokens.copy()
        result[marks] = inserted
        return result
    sizes = np.ones(tokens.size, np.int64)
    sizes[marks] = [len(each) for each in apart]
    is_mark = np.zeros(tokens.size, dtype=bool)
    is_mark[marks] = True
    result = np.repeat(tokens, sizes)
    result[np.repeat(is_mark, sizes)] = inserted
    return result


def blank_runs(text: str) -> list[tuple[int, int]]:
    """Where blanks must be cut out: three or more without the last, two or more at the end."""
    blank = IS_BLANK[code_units(text)]
    size = len(text)
    first = np.flatnonzero(blank[2:] & blank[1:-1] & blank[:-2])  # Of three blanks.
    breaks = np.flatnonzero(first[1:] != first[:-1] + 1)
    starts = first[np.concatenate([[0], breaks + 1])] if first.size else first
    ends = first[np.concatenate([breaks, [-1]])] + 3 if first.size else first
    runs = [(int(a), int(b) - (b < size)) for a, b in zip(starts, ends, strict=True)]
    if size > 1 and blank[-1] and blank[-2] and not (size > 2 and blank[-3]):
        runs.append((size - 2, size))
    return runs


def code_units(text: str) -> NDArray[np.uint16] | NDArray[np.uint8]:
    """A number for each character, where those beyond 16 bits are some that is no blank."""
    if text.isascii():
        return np.frombuffer(text.encode(), np.uint8)
    units = np.frombuffer(text.encode("utf-16-le"), np.uint16)
    if units.size == len(text):
        return units
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    return np.minimum(points, np.uint32(0xFFFF)).astype(np.uint16)
