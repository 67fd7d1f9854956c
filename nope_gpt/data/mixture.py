"""Which conversations of which subsets to train on, and how many of each."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from nope_gpt.data.ordering import shuffled
from nope_gpt.data.shards import Dataset, Shard
from nope_gpt.data.sources import Share, named_share
from nope_gpt.errors import MissingError

ALL = "all"

CHOICE = (1 << 32) - 1
"""Stands where the number of a pass does in the order of the samples, so that no pass has it."""


def mixture(
    dataset: Dataset, subsets: str, seed: int, *, holdout: bool = False
) -> Iterator[tuple[tuple[Shard, ...], int]]:
    """Every conversation of a pass as its shard, or those of both sides of a pair, and its place.

    The hold-out of a subset is whole, whatever its share.

    Args:
        dataset: Of conversations, or of pairs.
        subsets: Comma-separated names, each with `:WEIGHT` and `@COUNT` if wished.
        seed: Of the choice.
        holdout: Those that are held out, instead.

    Raises:
        MissingError: A subset is not in the data set; lists those that are.
        UsageError: What stands behind a name is no share of it.
    """
    words = [named_share(word) for word in subsets.split(",")]
    shares = {name: Share.parse(share) for name, share in words}
    names = list(dict.fromkeys(sides[0].source for sides in dataset.sides))
    unknown = sorted(shares.keys() - {*names, ALL})
    if unknown:
        raise MissingError(
            f"there is no subset {unknown[0]!r}; there are {', '.join(sorted(names))}",
            where=str(dataset.path),
            hint="choose with --dataset-subset, or take `all`",
        )
    for name in names:
        share = shares.get(name) or shares.get(ALL)
        if share is None:
            continue
        places = [
            (sides, index)
            for sides in dataset.sides
            if sides[0].source == name
            for index in range(*sides[0].split(holdout))
        ]
        chosen = np.arange(len(places) if holdout else share.wanted(len(places)))
        if chosen.size < len(places):
            chosen = np.sort(shuffled(chosen, len(places), seed, CHOICE))
        yield from (places[index] for index in chosen.tolist())
