"""Shards to batches, in an order that is a pure function of the seed and the step.

There is no loader and so no loader state: which samples a step trains on follows from
the seed and the step alone, whatever the number of ranks and whatever was interrupted.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nope_gpt.artifacts import MANIFEST, is_leftover
from nope_gpt.data.shards import Dataset, EncodedDocument, Tokens, TokenStream, conversations
from nope_gpt.errors import MissingError, NopeError, UsageError
from nope_gpt.model import IGNORED

T = TypeVar("T")


class Batch(NamedTuple):
    """A micro-batch: token ids [B, T] and the token after each, or -100, [B, T]."""

    tokens: Tensor
    targets: Tensor

    @property
    def num_trained(self) -> int:
        """How many tokens count in the loss."""
        return int((self.targets != IGNORED).sum())


class Batches(Protocol):
    """What the training loop reads from."""

    @property
    def num_samples(self) -> int: ...

    @property
    def steps_per_epoch(self) -> int: ...

    def micro_batches(self, step: int, rank: int, world_size: int) -> list[Batch]:
        """The micro-batches of this rank in a step, as many as every other rank's."""
        ...

    def holdout(self, limit: int, rank: int, world_size: int) -> Iterator[Batch]:
        """The hold-out, at most `limit` samples over all ranks."""
        ...


def shuffled(index: NDArray[np.int64], size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Send each index below `size` to another: a random permutation that is never stored.

    Four rounds of a Feistel network over the smallest even number of bits that hold
    `size`; what falls outside goes round again until it falls inside (Black and Rogaway,
    "Ciphers with arbitrary finite domains", 2002).
    """
    half_bits = max((int(size - 1).bit_length() + 1) // 2, 1)
    mask = np.uint64((1 << half_bits) - 1)
    keys = np.random.SeedSequence([seed, epoch]).generate_state(4, np.uint64)
    result = index.astype(np.uint64)
    outside = np.ones(result.shape, dtype=bool)
    while outside.any():
        value = result[outside]
        left, right = value >> np.uint64(half_bits), value & mask
        for key in keys:
            left, right = right, left ^ (mixed(right ^ key) & mask)
        result[outside] = (left << np.uint64(half_bits)) | right
        outside = result >= size
    return result.astype(np.int64)


def mixed(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble 64 bits: the finalizer of splitmix64 (Steele, Lea and Flood, 2014)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


class TextBatches:
    """Samples of equal length from a stream of text, pass after pass.

    Args:
        dataset: Of text.
        tokens_per_sample: T.
        batch_size: B.
        micro_batches_per_step: Over all ranks.
        seed: Of the order.

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
    ) -> None:
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
        length = self.tokens_per_sample
        return [
            batch_of([self.train.read(int(i) * length, length + 1) for i in group], length)
            for group in groups[rank::world_size]
        ]

    def holdout(self, limit: int, rank: int, world_size: int) -> Iterator[Batch]:
        """The held-out text from its beginning, each token once; the last sample may be short."""
        length = self.tokens_per_sample
        starts = range(0, max(len(self.held_out) - 1, 0), length)[:limit]
        for group in groups_of(list(starts), self.batch_size, rank, world_size):
            yield batch_of([self.held_out.read(start, length + 1) for start in group], length)


class ChatBatches:
    """Conversations padded to the longest of their micro-batch.

    A pass ends with a smaller step, so that no step mixes two passes.

    Args:
        dataset: Of conversations.
        subsets: Comma-separated names, or "all".
        max_tokens_per_sample: Longer conversations lose their last turns.
        filter_long_samples: Leave them out instead.
        message_start: The control token that begins a message.
        batch_size: B.
        micro_batches_per_step: Over all ranks.
        seed: Of the order.

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
    ) -> None:
        self.limit = max_tokens_per_sample
        self.message_start = message_start
        self.batch_size = batch_size
        self.samples_per_step = batch_size * micro_batches_per_step
        self.seed = seed
        self.num_cut = 0
        self.num_refused = 0
        self.train = self.usable(dataset, False, subsets, filter_long_samples)
        self.held_out = self.usable(dataset, True, subsets, filter_long_samples)
        if not self.train:
            raise NopeError(
                f"no conversation can be trained on: {self.num_refused:,} have no answer within "
                f"{self.limit:,} tokens or are filtered out",
                where=str(dataset.path),
                hint="raise --max-tokens-per-sample",
            )

    def usable(
        self, dataset: Dataset, holdout: bool, subsets: str, filter_long: bool
    ) -> list[EncodedDocument]:
        """The conversations to train on, cut to whole turns; those without an answer counted."""
        result = []
        for shard, index in conversations(dataset, holdout=holdout, subsets=subsets):
            document = shard.document(index)
            is_long = document.tokens.size > self.limit + 1
            if is_long:
                document = cut(document, self.limit + 1, self.message_start)
            if (is_long and filter_long) or not trained(document):
                self.num_refused += 1
            else:
                self.num_cut += is_long
                result.append(document)
        return result

    @property
    def num_samples(self) -> int:
        return len(self.train)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_samples // self.samples_per_step)

    def micro_batches(self, step: int, rank: int, world_size: int) -> list[Batch]:
        """The micro-batches of this rank in a step; empty ones fill up the last of a pass."""
        epoch, place = divmod(step, self.steps_per_epoch)
        first = place * self.samples_per_step
        last = min(first + self.samples_per_step, self.num_samples)
        drawn = np.arange(first, last, dtype=np.int64)
        indices = shuffled(drawn, self.num_samples, self.seed, epoch).tolist()
        groups = groups_of(indices, self.batch_size, rank, world_size)
        return [self.batch([self.train[index] for index in group]) for group in groups]

    def holdout(self, limit: int, rank: int, world_size: int) -> Iterator[Batch]:
        """The held-out conversations."""
        documents = self.held_out[:limit]
        for group in groups_of(documents, self.batch_size, rank, world_size):
            yield self.batch(group)

    def batch(self, documents: Sequence[EncodedDocument]) -> Batch:
        longest = max((document.tokens.size - 1 for document in documents), default=1)
        return batch_of(
            [document.tokens for document in documents],
            longest,
            [document.mask for document in documents],
        )


def groups_of(items: Sequence[T], size: int, rank: int, world_size: int) -> list[Sequence[T]]:
    """This rank's share of items in groups; every rank has as many groups, some empty."""
    groups: list[Sequence[T]] = [items[i : i + size] for i in range(0, len(items), size)]
    groups += [[]] * (-len(groups) % world_size)
    return groups[rank::world_size]


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


def cut(document: EncodedDocument, size: int, message_start: int) -> EncodedDocument:
    """Keep the whole messages among the first `size` tokens."""
    starts = np.flatnonzero(document.tokens == message_start)
    inside = starts[starts <= size]
    end = int(inside[-1]) if inside.size else 0
    assert document.mask is not None
    return EncodedDocument(document.tokens[:end], document.mask[:end])


def trained(document: EncodedDocument) -> bool:
    """Whether a conversation has a token to train on after its first."""
    return document.mask is not None and bool(document.mask[1:].any())


def find_dataset(
    root: Path,
    name: str | None,
    fineweb: tuple[str | None, str | None] = (None, None),
    content: str = "text",
) -> Path:
    """The directory of the data set that a command means.

    Args:
        root: The root of the data sets, or one data set's own directory.
        name: The one in the root.
        fineweb: Subset and encoding, where those name it.
        content: "text" or "chat": what it must hold if nobody names it.

    Raises:
        MissingError: It is not there, or none is; lists those that are.
        UsageError: There are several and none was named.
    """
    if (root / MANIFEST).is_file():
        if name and name != root.name:
            raise UsageError(
                f"--dataset is {name!r}, and --dataset-path is another data set",
                where=str(root),
                hint="give the root of the data sets, or leave --dataset out",
            )
        return root
    manifests = root.glob(f"*/{MANIFEST}")
    present = sorted(path.parent.name for path in manifests if not is_leftover(path.parent))
    if not name and content == "text":
        subset, encoding = fineweb
        parts = ["fineweb", subset or "sample-10BT", encoding or "r50k_base"]
        fineweb_name = "-".join(part for part in parts if part != "none")
        if subset or encoding or fineweb_name in present:
            name = fineweb_name
    if name:
        if name not in present:
            listing = f"there are {', '.join(present)}" if present else "nor any other"
            raise MissingError(
                f"there is no data set {name!r}; {listing}",
                where=str(root),
                hint="nope prepare FILE, or choose one with --dataset",
            )
        return root / name
    fitting = [name for name in present if Dataset.open(root / name).content == content]
    if not fitting:
        held = {"text": "text", "chat": "conversations"}[content]
        raise MissingError(
            f"there is no data set of {held}", where=str(root), hint="nope prepare python-docs"
        )
    if len(fitting) > 1:
        raise UsageError(
            f"there are several data sets: {', '.join(fitting)}",
            where=str(root),
            hint=f"choose one: --dataset {fitting[0]}",
        )
    return root / fitting[0]
