"""The faster way to cut text gives tiktoken's own tokens, for every text."""

from __future__ import annotations

import itertools
import random
import sys

import numpy as np
import pytest
import tiktoken
from conftest import CORPUS
from hypothesis import given, settings
from hypothesis import strategies as st

from nope_gpt.tokenization import BaseTokenizer, resolve
from nope_gpt.tokenization.encodings import clean
from nope_gpt.tokenization.splitting import BLANKS, MARK, Splitter, blank_runs

FRAGMENTS = [
    *(" ", "  ", "   ", "    ", "\n", "\n\n", "\n\n\n", "\t", "\r\n", "\x0b", "\x1c", "\x1f"),
    *("\x85", "\xa0", "\u1680", "\u2003", "\u2028", "\u2029", "\u202f", "\u205f", "\u3000"),
    *("\u200b", "\ufeff", "a", "Z", "é", "e\u0301", "東京", "שלום", "7", "12345", "٣", "½", "_"),
    *("-", "...", "'", "'s", "'S", "'ll", "'re", "’s", "👩‍👩‍👧", "\U0001d400", "\x00"),
    *("<|endoftext|>", MARK, "hello", "  x", "x  ", "word " * 60),
]
WITH_RANKS = [pytest.param(name, marks=pytest.mark.ranks) for name in ("r50k_base", "p50k_base")]


@pytest.fixture(params=["bytes", "bpe:300", *WITH_RANKS])
def encoding(request: pytest.FixtureRequest) -> tiktoken.Encoding:
    return resolve(request.param, [CORPUS, "a   b\n\n\nc\n\n"]).encoding


def same(splitter: Splitter, encoding: tiktoken.Encoding, text: str) -> None:
    expected = encoding.encode_ordinary(text)
    found = splitter.encode(text)
    assert found.dtype == np.uint32
    assert found.tolist() == expected, repr(text)


def test_any_text(encoding: tiktoken.Encoding) -> None:
    splitter = Splitter(encoding)

    @settings(max_examples=300, deadline=None)
    @given(st.text().map(clean))
    def check(text: str) -> None:
        same(splitter, encoding, text)

    check()


def test_any_sequence_of_what_is_difficult(encoding: tiktoken.Encoding) -> None:
    splitter = Splitter(encoding)
    rng = random.Random(0)
    for _ in range(3000):
        same(splitter, encoding, "".join(rng.choices(FRAGMENTS, k=rng.randint(0, 12))))


def test_every_arrangement_of_blanks_between_words(encoding: tiktoken.Encoding) -> None:
    splitter = Splitter(encoding)
    blanks = (" ", "\n", "\t", "\u3000")
    for length in range(5):
        for run in map("".join, itertools.product(blanks, repeat=length)):
            for before, after in itertools.product(("", "a", "."), ("", "b", "1", "'s")):
                same(splitter, encoding, before + run + after)


def test_every_character_in_a_run_of_blanks(encoding: tiktoken.Encoding) -> None:
    splitter = Splitter(encoding)
    points = [p for p in range(0x3100) if not 0xD800 <= p < 0xE000]
    points += range(0x3100, sys.maxunicode, 997)
    for block in itertools.batched(points, 64) if sys.version_info >= (3, 12) else blocks(points):
        letters = [chr(point) for point in block if not 0xD800 <= point < 0xE000]
        for form in ("a{}b ", " {}  {}\n", "{0}{0}{0}c", "x {0}{0}'s", "  {}"):
            same(splitter, encoding, "".join(form.format(c, c) for c in letters))
            same(splitter, encoding, "".join(form.format(c, c) for c in letters[:1]))


def blocks(points: list[int]) -> list[list[int]]:
    return [points[start : start + 64] for start in range(0, len(points), 64)]


def test_a_blank_is_what_tiktoken_takes_for_one() -> None:
    pattern = tiktoken.Encoding(
        "blank", pat_str=r"\s", mergeable_ranks={bytes([b]): b for b in range(256)},
        special_tokens={"<|endoftext|>": 256},
    )  # fmt: skip
    points = [p for p in range(sys.maxunicode + 1) if not 0xD800 <= p < 0xE000]
    found = [p for p in points if pattern.encode_ordinary(chr(p))]
    assert found == sorted(BLANKS)


@pytest.mark.parametrize("blank", [" ", "\n", "\u3000"])
def test_long_runs_of_blanks(blank: str) -> None:
    tokenizer = BaseTokenizer.of_bytes()
    for size in (63, 64, 65, 1_000, 100_000):
        for text in (blank * size, f"a{blank * size}", f"{blank * size}b", f"a{blank * size}b"):
            assert tokenizer.encode(text).tolist() == list(text.encode())


def test_a_million_blanks_are_taken_where_tiktoken_gives_up() -> None:
    tokenizer = BaseTokenizer.of_bytes()
    text = "a" + " " * 2_000_000 + "b"
    assert tokenizer.encode(text).tolist() == list(text.encode())
    assert tokenizer.tokenize(text) == list(text.encode())


@pytest.mark.parametrize(
    ("text", "runs"),
    [
        ("", []), (" ", []), ("  ", [(0, 2)]), ("   ", [(0, 3)]), ("a  b", []), ("a   b", [(1, 3)]),
        ("a  ", [(1, 3)]), ("a   b  ", [(1, 3), (5, 7)]), ("    a", [(0, 3)]),
        ("🙂   🙂  ", [(1, 3), (5, 7)]), ("a\n\n\n\nb\t\t\tc", [(1, 4), (6, 8)]),
        ("a\U00012000\U00012000\U00012000b", []),  # Letters, whose lower bits are a blank's.
    ],
)  # fmt: skip
def test_the_runs_that_stand_apart(text: str, runs: list[tuple[int, int]]) -> None:
    assert blank_runs(text) == runs
