"""What a share of a source is, and which documents repeat an earlier one: exactly, in any cut."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nope_gpt.data import units
from nope_gpt.data.deduplication import BYTES_PER_DOCUMENT, repeated
from nope_gpt.data.digests import Digest
from nope_gpt.data.reading import PLAIN_TEXT, Selection, Span
from nope_gpt.data.report import statistics
from nope_gpt.data.sources import File, Share
from nope_gpt.data.units import DOCUMENTS, WorkFile, holdout
from nope_gpt.errors import UsageError


@pytest.mark.parametrize(
    ("text", "weight", "cap"),
    [
        ("", 1.0, None),
        (":0.5", 0.5, None),
        (":.25", 0.25, None),
        (":1", 1.0, None),
        ("@7", 1.0, 7),
        (":0.5@10000", 0.5, 10_000),
    ],
)
def test_a_share_is_a_weight_and_a_cap(text: str, weight: float, cap: int | None) -> None:
    share = Share.parse(text)
    assert (share.weight, share.cap) == (weight, cap)
    assert share.is_whole == (text in ("", ":1"))


@pytest.mark.parametrize(
    "text", [":0", ":2", ":1.5", "@0", ":", "@", "@5:0.5", ":-1", ":x", "@1.5"]
)
def test_what_is_no_share_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError, match="is no share of it") as caught:
        Share.parse(text)
    assert "NAME:0.5" in str(caught.value.hint)


def file(number: int) -> File:
    digest = hashlib.sha256(str(number).encode()).hexdigest()
    return File(str(number), 1, Digest.of("sha256", digest))


def span(first: int, count: int) -> Span:
    return Span(Path("x"), "x", "x", PLAIN_TEXT, 0, 1, 1, first, count)


@given(
    st.lists(st.integers(0, 200), min_size=1, max_size=6),
    st.floats(0.01, 1.0),
    st.none() | st.integers(1, 300),
    st.integers(1, 50),
)
@settings(max_examples=150, deadline=None)
def test_all_files_together_give_the_share_to_the_row(
    counts: list[int], weight: float, cap: int | None, length: int
) -> None:
    share, total, before, taken = Share(weight, cap), sum(counts), 0, 0
    for number, count in enumerate(counts):
        selection = share.selection(file(number), before, count, total)
        assert abs(selection.num_chosen - count / max(total, 1) * min(
            round(total * weight), cap if cap is not None else total
        )) <= 1, "every file gives its part"  # fmt: skip
        whole = selection.of(span(0, count))
        pieces = [selection.of(span(i, min(length, count - i))) for i in range(0, count, length)]
        assert np.array_equal(whole, np.concatenate([np.empty(0, bool), *pieces]))
        taken += int(whole.sum())
        before += count
    wanted = round(total * weight)
    assert taken == (wanted if cap is None else min(wanted, cap))


def test_a_selection_is_no_beginning_but_a_sample() -> None:
    chosen = np.flatnonzero(Selection(10_000, 1_000, seed=3).of(span(0, 10_000)))
    assert len(chosen) == 1_000
    assert abs(chosen.mean() - 5_000) < 400
    other = np.flatnonzero(Selection(10_000, 1_000, seed=4).of(span(0, 10_000)))
    assert 50 < len(np.intersect1d(chosen, other)) < 160, "another file, another choice"


@given(
    st.lists(
        st.lists(st.lists(st.integers(0, 12), max_size=8), min_size=1, max_size=3),
        min_size=0,
        max_size=5,
    ),
    st.integers(1, 40),
)
@settings(max_examples=100, deadline=None)
def test_a_document_repeats_if_an_earlier_one_is_the_same(
    tmp_path_factory: pytest.TempPathFactory, corpus: list[list[list[int]]], capacity: int
) -> None:
    directory = tmp_path_factory.mktemp("tables")
    tables, expected, seen = [], [], set()
    for number, files in enumerate(corpus):
        tables.append([])
        again: list[int] = []
        place = 0
        for index, documents in enumerate(files):
            hashes = [hashlib.sha256(bytes([each // 2])).digest() for each in documents]
            rows = [
                # Two that begin alike and go on differently are not the same.
                (int.from_bytes(digest[:8]), each % 2, (1, 0))
                for digest, each in zip(hashes, documents, strict=True)
            ]
            path = directory / f"{number}-{index}"
            np.array(rows, DOCUMENTS).tofile(path)
            tables[-1].append(path)
            for each in documents:
                if each in seen:
                    again.append(place)
                seen.add(each)
                place += 1
        expected.append(again)
    for memory in (capacity * BYTES_PER_DOCUMENT, 10**9):
        assert [found.tolist() for found in repeated(tables, memory)] == expected


@given(
    st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=60),
    st.floats(0.0, 0.5),
)
@settings(max_examples=150, deadline=None)
def test_the_hold_out_is_the_rule_of_the_manifest(hashes: list[int], fraction: float) -> None:
    positions = np.array(hashes, np.uint64)
    keep = np.ones(len(hashes), bool)
    held = holdout(positions, keep, fraction)
    if fraction == 0 or len(set(hashes)) == 1:
        assert not held.any()
        return
    for value, is_held in zip(hashes, held, strict=True):
        expected = value / 2**64 < fraction or value == min(hashes)
        assert is_held == (expected and value != max(hashes))
    assert 0 < held.sum() < len(hashes)


def test_what_is_left_out_is_not_held_out_either() -> None:
    positions = np.array([1, 2, 3, 4], np.uint64)
    keep = np.array([False, True, True, True])
    assert (holdout(positions, keep, 0.01) & keep).tolist() == [False, True, True, False]


@pytest.mark.parametrize("fraction", [0.01, 0.99])
def test_what_is_left_out_is_neither_the_lowest_nor_the_highest(fraction: float) -> None:
    positions = np.array([10, 2**63, 2**63 + 4096, 2**64 - 1], np.uint64)
    keep = np.array([False, True, True, False])
    assert (holdout(positions, keep, fraction) & keep).tolist() == [False, True, False, False]


def test_what_a_work_file_collects_is_written_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "WRITE_SIZE", 10)
    arrays = [np.arange(number, dtype=np.uint16) for number in range(9)]
    with WorkFile(tmp_path / "work") as file:
        for array in arrays:
            file.add(array)
    assert (tmp_path / "work").read_bytes() == np.concatenate(arrays).tobytes()


def test_statistics_add_up_units_of_any_lengths() -> None:
    counts = {"documents": 2, "holdout_documents": 1, "tokens": 9, "text_bytes": 30, "cut": 1}
    counts |= {"duplicates": 1, "dropped": 0}
    of_units = [
        counts | {"refused": {"no text": [2, "a:1"]}, "lengths": [1, 0, 1]},
        counts | {"refused": {"no text": [3, "b:7"], "no answer": [1, "b:9"]}, "lengths": [2]},
    ]
    found = statistics(of_units)
    assert found == {name: 2 * count for name, count in counts.items()} | {
        "refused": {
            "no text": {"count": 5, "first": "a:1"},
            "no answer": {"count": 1, "first": "b:9"},
        },
        "lengths": [3, 0, 1],
    }
