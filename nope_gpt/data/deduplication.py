"""Documents that repeat an earlier one anywhere in a data set, found in bounded memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nope_gpt.data.units import DOCUMENTS

MEMORY = 256 * 1000 * 1000
"""Bytes that the search takes, about, however many documents there are."""

BYTES_PER_DOCUMENT = 96
"""While they are sorted: hash, unit, number, and the sort's own."""


def repeated(tables: list[list[Path]], memory: int = MEMORY) -> list[NDArray[np.int64]]:
    """Find the documents that are the same as an earlier one.

    The hashes are looked at in as many ranges as keep within the memory, one range at a
    time over all units.

    Args:
        tables: For each unit its files of documents, in order.
        memory: Bytes to stay within, about.

    Returns:
        For each unit the numbers of those documents in it, rising.
    """
    total = sum(path.stat().st_size for files in tables for path in files) // DOCUMENTS.itemsize
    num_ranges = max(-(-total * BYTES_PER_DOCUMENT // memory), 1)
    found: list[list[NDArray[np.int64]]] = [[] for _ in tables]
    for index in range(num_ranges):
        low, high = (2**64 * place // num_ranges for place in (index, index + 1))
        units, numbers = repeated_between(tables, low, high - 1)
        order = np.argsort(units, kind="stable")
        cuts = np.searchsorted(units[order], np.arange(1, len(tables)))
        for unit, part in enumerate(np.split(numbers[order], cuts) if tables else []):
            found[unit].append(part)
    return [np.sort(np.concatenate(parts)) for parts in found]


def repeated_between(
    tables: list[list[Path]], low: int, high: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Unit and number of every repeated document whose hash begins between two numbers."""
    parts = []
    for unit, files in enumerate(tables):
        first = 0
        for path in files:
            table = np.fromfile(path, DOCUMENTS)
            inside = (table["position"] >= np.uint64(low)) & (table["position"] <= np.uint64(high))
            numbers = np.flatnonzero(inside) + first
            units = np.full(numbers.size, unit)
            parts.append((table["position"][inside], table["rest"][inside], units, numbers))
            first += table.size
    if not parts:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    position, rest, units, numbers = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.lexsort((numbers, units, rest, position))
    position, rest = position[order], rest[order]
    again = np.zeros(order.size, dtype=bool)
    again[1:] = (position[1:] == position[:-1]) & (rest[1:] == rest[:-1])
    return units[order][again], numbers[order][again]
