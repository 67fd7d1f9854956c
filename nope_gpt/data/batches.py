"""Shards to batches, in an order that is a pure function of the seed and the step.

There is no loader and so no loader state: which samples a step trains on follows from
the seed and the step alone, whatever the number of ranks and whatever was interrupted.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nope_gpt.data.encoding import Tokens
from nope_gpt.data.ordering import shuffled
from nope_gpt.data.shards import Dataset, TokenStream
from nope_gpt.errors import NopeError
from nope_gpt.network.cross_entropy import IGNORED

T = TypeVar("T")


class Batch(NamedTuple):
    """A micro-batch: token ids, the token after each or -100, and the number of its document
    where documents are kept apart; all of them [B, T].

    `num_documents` is how many lie end to end, where that is what the batch was made of.
    """

    tokens: Tensor
    targets: Tensor
    documents: Tensor | None = None
    num_documents: int = 0

    @property
    def num_trained(self) -> int:
        """How many tokens count in the loss."""
        return int((self.targets != IGNORED).sum())

    def to(self, device: torch.device) -> Batch:
        """The same on a device; a copy from pinned memory does not wait."""
        return self.each(lambda x: x.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """The same in memory that a GPU can read by itself."""
        return self.each(Tensor.pin_memory)

    def in_pieces(self, length: int) -> Batch:
        """The same tokens as rows of another length, which divides theirs."""
        return self.each(lambda x: x.view(-1, length))

    def beginning_with(self, token: int | None) -> Batch:
        """The same with another first token in each row, if one is given."""
        if token is None:
            return self
        tokens = self.tokens.clone()
        tokens[:, 0] = token
        return self._replace(tokens=tokens.pin_memory() if self.tokens.is_pinned() else tokens)

    def each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        documents = None if self.documents is None else change(self.documents)
        return Batch(change(self.tokens), change(self.targets), documents, self.num_documents)


class Batches(Protocol):
    """What the training loop reads from."""

    @property
    def num_samples(self) -> int: ...

    @property
    def steps_per_epoch(self) -> int: ...

    def sample_indices(self, step: int) -> NDArray[np.int64]:
        """Which samples a step trains on, in order."""
        ...

    def micro_batches(self, step: int, rank: int, world_size: int) -> list[Batch]:
        """The micro-batches of this rank in a step, as many as every other rank's."""
        ...

    def holdout(self, limit: int, rank: int, world_size: int) -> Iterator[Batch]:
        """The hold-out, at most `limit` samples over all ranks."""
        ...


class TextBatches:
    """Samples of equal length from a stream of text, pass after pass.

    Args:
        dataset: Of text.
        tokens_per_sample: T.
        batch_size: B.
        micro_batches_per_step: Over all ranks.
        seed: Of the order.
        separate_documents: Number the documents, so that attention can keep them apart.

    Raises:
        NopeError: The text is shorter than one sample.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        tokens_per_sample: int,
        batch_size: int,
        micro_batches_per_step: int,
        seed: int,
        separate_documents: bool = False,
    ) -> None:
        self.separate_documents = separate_documents
        self.train = TokenStream(dataset)
        self.held_out = TokenStream(dataset, holdout=True)
        self.tokens_per_sample = tokens_per_sample
        self.batch_size = batch_size
        self.samples_per_step = batch_size * micro_batches_per_step
        self.seed = seed
        if self.num_samples < 1:
            raise NopeError(
                f"the data set has {len(self.train):,} tokens to train on, and a sample needs "
                f"{tokens_per_sample + 1:,}",
                where=str(dataset.path),
                hint=f"--tokens-per-sample {max(len(self.train) // 8, 1)}, or prepare more text",
            )

    @property
    def num_samples(self) -> int:
        return (len(self.train) - 1) // self.tokens_per_sample

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_samples // self.samples_per_step)

    def sample_indices(self, step: int) -> NDArray[np.int64]:
        """Which samples a step trains on, in order."""
        first = step * self.samples_per_step
        drawn = np.arange(first, first + self.samples_per_step, dtype=np.int64)
        epochs, positions = np.divmod(drawn, self.num_samples)
        for epoch in np.unique(epochs):
            now = epochs == epoch
            positions[now] = shuffled(positions[now], self.num_samples, self.seed, int(epoch))
        return positions

    def micro_batches(self, step: int, rank: int, world_size: int) -> list[Batch]:
        """The micro-batches of this rank in a step."""
        groups = self.sample_indices(step).reshape(-1, self.batch_size)
        starts = (groups[rank::world_size] * self.tokens_per_sample).tolist()
        return [self.batch(self.train, group) for group in starts]

    def holdout(self, limit: int, rank: int, world_size: int) -> Iterator[Batch]:
        """The held-out text from its beginning, each token once; the last sample may be short."""
        length = self.tokens_per_sample
        starts = range(0, max(len(self.held_out) - 1, 0), length)[:limit]
        for group in groups_of(list(starts), self.batch_size, rank, world_size):
            yield self.batch(self.held_out, group)

    def batch(self, stream: TokenStream, starts: Sequence[int]) -> Batch:
        """The samples that begin at some places of a stream."""
        length = self.tokens_per_sample
        result = batch_of([stream.read(start, length + 1) for start in starts], length)
        if not self.separate_documents:
            return result
        documents = np.full(result.tokens.shape, -1, dtype=np.int32)
        for row, start in enumerate(starts):
            numbers = stream.documents(start, length)
            documents[row, : numbers.size] = numbers
        return result._replace(documents=torch.from_numpy(documents))


def groups_of(items: Sequence[T], size: int, rank: int, world_size: int) -> list[Sequence[T]]:
    """This rank's share of items in groups; every rank has as many groups, some empty."""
    groups: list[Sequence[T]] = [items[i : i + size] for i in range(0, len(items), size)]
    return share_of(groups, rank, world_size)


def share_of(groups: list[Sequence[T]], rank: int, world_size: int) -> list[Sequence[T]]:
    """This rank's share of groups; every rank has as many of them, some empty."""
    idle: list[Sequence[T]] = [[]] * (-len(groups) % world_size)
    return [*groups, *idle][rank::world_size]


def batch_of(
    samples: Sequence[Tokens],
    length: int,
    masks: Sequence[NDArray[np.uint8] | None] = (),
) -> Batch:
    """Stack samples of up to `length` + 1 tokens, padding on the right with what is ignored."""
    tokens = np.zeros((max(len(samples), 1), length), dtype=np.int64)
    targets = np.full_like(tokens, IGNORED)
    for row, sample in enumerate(samples):
        tokens[row, : sample.size - 1] = sample[:-1]
        targets[row, : sample.size - 1] = sample[1:]
    for row, mask in enumerate(masks):
        if mask is not None:
            targets[row, : mask.size - 1][mask[1:] == 0] = IGNORED
    return Batch(torch.from_numpy(tokens), torch.from_numpy(targets))
