"""Conversations to batches: whole ones, end to end and kept apart, or padded side by side.

A step trains on so many conversations, whichever way they lie: without positions, and kept
apart, each is computed as if it were alone.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from nope_gpt.data.batches import Batch, batch_of, groups_of, share_of
from nope_gpt.data.encoding import EncodedDocument, cut, is_trained
from nope_gpt.data.mixture import mixture
from nope_gpt.data.ordering import shuffled
from nope_gpt.data.shards import Dataset, Shard
from nope_gpt.errors import NopeError
from nope_gpt.network.cross_entropy import IGNORED

Sample = tuple[EncodedDocument, ...]
"""A conversation, or the better and the worse one of a pair."""

SHOWN = 5
"""Conversations that an error names."""


class ChatBatches:
    """Conversations, pass after pass.

    A pass ends with a smaller step, so that no step mixes two passes.

    Args:
        dataset: Of conversations, or of pairs.
        subsets: Comma-separated names with their shares, or "all".
        max_tokens_per_sample: Longer conversations lose their last turns.
        filter_long_samples: Leave them out instead.
        message_start: The control token that begins a message.
        batch_size: Conversations, or pairs, in a micro-batch; packed ones are as many as fit
            into the tokens that so many of the longest would have.
        micro_batches_per_step: Over all ranks, of which each has `batch_size` conversations.
        seed: Of the order.
        packed: Lay conversations end to end, instead of padding them.
        in_pairs: Whether both sides of a pair are wanted, or the better one.

    Raises:
        NopeError: No conversation can be trained on.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        subsets: str,
        max_tokens_per_sample: int,
        filter_long_samples: bool,
        message_start: int,
        batch_size: int,
        micro_batches_per_step: int,
        seed: int,
        packed: bool = True,
        in_pairs: bool = False,
    ) -> None:
        self.limit = max_tokens_per_sample
        self.filter_long = filter_long_samples
        self.message_start = message_start
        self.batch_size = batch_size
        self.samples_per_step = batch_size * micro_batches_per_step
        self.seed = seed
        self.packed = packed
        self.in_pairs = in_pairs
        self.num_cut = 0
        self.refused: list[str] = []
        self.train = self.usable(mixture(dataset, subsets, seed))
        self.held_out = self.usable(mixture(dataset, subsets, seed, holdout=True))
        if not self.train:
            shown = ", ".join(self.refused[:SHOWN]) + ", ..." * (len(self.refused) > SHOWN)
            raise NopeError(
                f"no conversation can be trained on: {len(self.refused):,} have no answer within "
                f"{self.limit:,} tokens or are filtered out ({shown})",
                where=str(dataset.path),
                hint="raise --max-tokens-per-sample",
            )

    def usable(self, places: Iterator[tuple[tuple[Shard, ...], int]]) -> list[Sample]:
        """The conversations to train on, cut to whole turns; those without an answer noted."""
        result = []
        for sides, index in places:
            sides = sides if self.in_pairs else sides[:1]
            sample = tuple(side.document(index) for side in sides)
            is_long = max(document.tokens.size for document in sample) > self.limit + 1
            if is_long and not self.in_pairs:
                sample = (cut(sample[0], self.limit + 1, self.message_start),)
            is_refused = is_long and (self.filter_long or self.in_pairs)
            if is_refused or not all(map(is_trained, sample)):
                self.refused.append(f"{sides[0].name}:{index}")
            else:
                self.num_cut += is_long
                result.append(sample)
        return result

    @property
    def num_samples(self) -> int:
        return len(self.train)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_samples // self.samples_per_step)

    def sample_indices(self, step: int) -> NDArray[np.int64]:
        """Which conversations a step trains on, in order."""
        epoch, place = divmod(step, self.steps_per_epoch)
        first = place * self.samples_per_step
        last = min(first + self.samples_per_step, self.num_samples)
        drawn = np.arange(first, last, dtype=np.int64)
        return shuffled(drawn, self.num_samples, self.seed, epoch)

    def micro_batches(self, step: int, rank: int, world_size: int) -> list[Batch]:
        """The micro-batches of this rank in a step; empty ones fill up the last ones."""
        samples = [self.train[index] for index in self.sample_indices(step).tolist()]
        return list(self.batches(samples, rank, world_size))

    def holdout(self, limit: int, rank: int, world_size: int) -> Iterator[Batch]:
        """The held-out conversations."""
        return self.batches(self.held_out[:limit], rank, world_size)

    def batches(self, samples: Sequence[Sample], rank: int, world_size: int) -> Iterator[Batch]:
        """This rank's share of samples, in micro-batches as many as every other rank's."""
        if not self.packed:
            for group in groups_of(samples, self.batch_size, rank, world_size):
                yield end_to_end(group) if self.in_pairs else padded(group)
            return
        packs = packed(samples, self.batch_size * self.limit * (2 if self.in_pairs else 1))
        yield from map(end_to_end, share_of(packs, rank, world_size))


def packed(samples: Sequence[Sample], capacity: int) -> list[Sequence[Sample]]:
    """Put samples into as few packs of so many tokens as first-fit finds, the longest first."""
    packs: list[list[Sample]] = []
    room: list[int] = []
    for sample in sorted(samples, key=size_of, reverse=True):
        size = size_of(sample)
        place = next((i for i, left in enumerate(room) if left >= size), len(packs))
        if place == len(packs):
            packs.append([])
            room.append(capacity)
        packs[place].append(sample)
        room[place] -= size
    return list(packs)


def size_of(sample: Sample) -> int:
    """Tokens that a sample takes."""
    return sum(document.tokens.size - 1 for document in sample)


def end_to_end(samples: Sequence[Sample]) -> Batch:
    """All conversations in one row, each with its number; no samples give one idle token."""
    documents = [document for sample in samples for document in sample]
    if not documents:
        return padded([])._replace(documents=torch.zeros(1, 1, dtype=torch.int32))
    tokens = np.concatenate([document.tokens[:-1] for document in documents])
    targets = np.concatenate([document.tokens[1:] for document in documents])
    masks = [document.mask for document in documents]
    is_trained = np.concatenate([mask[1:] for mask in masks if mask is not None])
    targets = np.where(is_trained, targets, IGNORED)
    lengths = [document.tokens.size - 1 for document in documents]
    numbers = np.repeat(np.arange(len(documents), dtype=np.int32), lengths)
    rows = [torch.from_numpy(row)[None] for row in (tokens, targets, numbers)]
    return Batch(rows[0], rows[1], rows[2], len(documents))


def padded(samples: Sequence[Sample]) -> Batch:
    """A row for each conversation, as long as the longest."""
    documents = [document for sample in samples for document in sample]
    longest = max((document.tokens.size - 1 for document in documents), default=1)
    return batch_of(
        [document.tokens for document in documents],
        longest,
        [document.mask for document in documents],
    )
