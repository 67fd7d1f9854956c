"""The key/value cache: what a model keeps of the tokens it has read.

Keys carry no position here, so the order of the entries does not matter to attention.
A full cache is therefore a ring: the newest entry overwrites the oldest, which is
sliding-window attention over the last `capacity` tokens. The first ones can be pinned: they
stay, and are seen by all ("attention sinks", Xiao et al., 2023). For the same reason rows of
unequal length share a batch without any account of positions.

Shapes: L layers, B rows, G key/value heads, H query heads, T new tokens, N entries,
D head dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from nope_gpt.config import ModelConfig
from nope_gpt.network.attention import causal_attention
from nope_gpt.network.sharpening import Growth

P = TypeVar("P", int, Tensor)

BLOCK = 512
"""Entries that are allocated first; then as many again whenever they are full."""

PIECE = 64
"""Entries of which whole multiples are allocated, so that many parts of a GPU can share a row."""


class Reader(Protocol):
    """A faster way than the network's own modules to read few tokens into a cache."""

    def can_read(self, cache: KVCache, rows: Sequence[int], num_new: int) -> bool:
        """Whether it can read so many new tokens of each of these rows."""
        ...

    def read(self, cache: KVCache, rows: Sequence[int], tokens: Tensor, *, every: bool) -> Tensor:
        """Read tokens [B, T]; returns logits [B, V] after the last ones, or [B * T, V]."""
        ...


class KVCache:
    """Keys and values of every layer for some rows of tokens, each row of its own length.

    Args:
        config: The network's shape.
        capacity: Entries of a row, at most.
        batch_size: B.
        pinned: First tokens of a row that are never overwritten, fewer than the capacity.
        dtype, device: Those of the model.
        growth: Of the scores, where the model has one.
        reader: How few tokens are read, chosen once for all that the cache will hold, so that
            a seeded stream does not change its arithmetic on the way.

    Attributes:
        memory: Keys and values [L, 2, B, G, N, D]; N grows with what is read, in whole pieces.
        tokens: What each row has read, those that were overwritten included.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        capacity: int,
        batch_size: int = 1,
        pinned: int = 0,
        dtype: torch.dtype,
        device: torch.device,
        growth: Growth | None = None,
        reader: Reader | None = None,
    ) -> None:
        assert 0 <= pinned < capacity
        self.capacity = capacity
        self.pinned = pinned
        self.growth = growth
        self.reader = reader
        shape = (config.num_decoder_layers, 2, batch_size, config.num_kv_heads)
        size = in_pieces(min(capacity, BLOCK))
        self.memory = torch.zeros(*shape, size, config.head_dimensions, dtype=dtype, device=device)
        self.tokens: list[list[int]] = [[] for _ in range(batch_size)]

    @property
    def num_rows(self) -> int:
        return len(self.tokens)

    @property
    def num_allocated(self) -> int:
        """N."""
        return self.memory.size(4)

    def num_visible(self, row: int) -> int:
        """Entries of a row."""
        return min(len(self.tokens[row]), self.capacity)

    def slot(self, position: P) -> P:
        """Where the entry of a token goes; several positions lie beyond the pinned ones."""
        if isinstance(position, int) and position < self.pinned:
            return position
        return self.pinned + (position - self.pinned) % (self.capacity - self.pinned)

    def remember(self, rows: Sequence[int], tokens: Tensor) -> None:
        """Note what rows have read, [B, T]."""
        for row, ids in zip(rows, tokens.tolist(), strict=True):
            self.tokens[row] += ids

    def reserve(self, num_entries: int) -> None:
        """Allocate for so many entries of each row, or for the capacity if that is less."""
        needed = min(num_entries, self.capacity)
        if needed > self.num_allocated:
            size = in_pieces(min(max(needed, 2 * self.num_allocated), self.capacity))
            grown = self.memory.new_zeros(*self.memory.shape[:4], size, self.memory.size(5))
            grown[:, :, :, :, : self.num_allocated] = self.memory
            self.memory = grown

    def is_even(self, rows: Sequence[int]) -> bool:
        """Whether rows lie side by side and have read equally many tokens."""
        lengths = {len(self.tokens[row]) for row in rows}
        return len(lengths) == 1 and list(rows) == list(range(rows[0], rows[0] + len(rows)))

    def pieces(self, tokens: Tensor, row: int) -> Iterator[Tensor]:
        """Split new tokens [B, T] so that none overwrites what another of its piece put in.

        What fits in the free space goes in together, the rest in rounds of the ring.
        """
        start = max(self.capacity - len(self.tokens[row]), 0)
        if start:
            yield tokens[:, :start]
        for first in range(start, tokens.size(1), self.capacity - self.pinned):
            yield tokens[:, first : first + self.capacity - self.pinned]

    def truncate(self, row: int, length: int) -> None:
        """Forget what a row has read beyond so many tokens; it must not have gone round."""
        assert len(self.tokens[row]) <= self.capacity or length == 0
        del self.tokens[row][length:]

    def num_shared(self, row: int, prompt: Sequence[int]) -> int:
        """How many tokens of a prompt need not be read again, because a row begins with them.

        Never all of them, since the last one's logits are still to be computed; and none of
        a row that has gone round.
        """
        if len(self.tokens[row]) > self.capacity:
            return 0
        pairs = zip(self.tokens[row], prompt[:-1], strict=False)
        return next(
            (i for i, (a, b) in enumerate(pairs) if a != b),
            min(len(self.tokens[row]), len(prompt) - 1),
        )

    def reuse(self, row: int, prompt: Sequence[int]) -> int:
        """Keep of a row what begins a prompt, and forget the rest; returns how much is kept."""
        kept = self.num_shared(row, prompt)
        self.truncate(row, kept)
        return kept

    def select(self, rows: Sequence[int]) -> None:
        """Give each row the content of another, its own or not."""
        used = max(map(self.num_visible, rows))
        index = torch.tensor(rows, device=self.memory.device)
        now = self.memory[:, :, :, :, :used]
        now.copy_(now.index_select(2, index))
        self.tokens = [self.tokens[row].copy() for row in rows]


def in_pieces(num_entries: int) -> int:
    """So many entries, or a few more that make whole pieces."""
    return -(-num_entries // PIECE) * PIECE


def window(cache: KVCache, new: Tensor) -> Tensor:
    """What new tokens at positions [T] beyond the capacity see of the entries that are there
    and of each other, [T, N + T].
    """
    start = int(new[0])
    there = torch.arange(min(start, cache.capacity), device=new.device)
    ring = torch.arange(max(start - len(there), 0) + cache.pinned, start, device=new.device)
    there[cache.slot(ring)] = ring
    keys, queries = torch.cat([there, new])[None], new[:, None]
    is_near = keys > queries - (cache.capacity - cache.pinned)
    return (keys <= queries) & (is_near | (keys < cache.pinned))


class Reading:
    """New tokens on their way into a cache: where their entries go, and what they see.

    Args:
        cache: Where to.
        rows: Those that read, B of them; even ones, if each reads several tokens.
        num_new: Tokens that each reads, T.
    """

    def __init__(self, cache: KVCache, rows: Sequence[int], num_new: int) -> None:
        lengths = [len(cache.tokens[row]) for row in rows]
        cache.reserve(max(lengths) + num_new)
        device = cache.memory.device
        self.memory = cache.memory
        self.rows: slice | Tensor = slice(rows[0], rows[-1] + 1)
        if num_new == 1:
            self.rows = torch.tensor(rows, device=device)
        is_all = list(rows) == list(range(cache.num_rows))
        self.seen = slice(None) if is_all else self.rows
        self.mask: Tensor | None = None
        self.start, self.num_visible = lengths[0], min(max(lengths) + num_new, cache.capacity)
        self.num_there = min(lengths[0], cache.capacity)
        self.factors: Tensor | None = None
        if cache.growth:
            places = [range(length + 1, length + num_new + 1) for length in lengths]
            num_keys = torch.tensor(places, device=device).clamp(max=cache.capacity)
            self.factors = cache.growth.factors(num_keys)[:, None, :, None]  # [B, 1, T, 1]
        self.is_one_each = num_new == 1
        self.goes_round = lengths[0] + num_new > cache.capacity
        if self.is_one_each:
            self.slots = torch.tensor([cache.slot(length) for length in lengths], device=device)
            if len(set(lengths)) > 1:
                sizes = torch.tensor(lengths, device=device)[:, None, None, None]
                self.mask = torch.arange(self.num_visible, device=device) <= sizes
        elif self.goes_round:
            new = torch.arange(lengths[0], lengths[0] + num_new, device=device)
            self.slots = cache.slot(new)
            self.mask = window(cache, new)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store new keys and values, and attend to all that is visible.

        Args:
            layer: Which one's.
            q: Queries [B, H, T, D].
            k, v: Keys and values [B, G, T, D].

        Returns:
            The heads' outputs side by side [B, T, H * D].
        """
        if self.factors is not None:
            q = q * self.factors.type_as(q)
        keys, values = self.memory[layer]
        if self.is_one_each:
            keys[self.rows, :, self.slots] = k[:, :, 0]
            values[self.rows, :, self.slots] = v[:, :, 0]
            k, v = (x[self.seen, :, : self.num_visible] for x in (keys, values))
            return self.attend_masked(q, k, v)
        if self.goes_round:
            old = (x[self.rows, :, : self.num_there] for x in (keys, values))
            seen = [torch.cat(pair, dim=2) for pair in zip(old, (k, v), strict=True)]
            out = self.attend_masked(q, *seen)
            keys[self.rows, :, self.slots] = k
            values[self.rows, :, self.slots] = v
            return out
        new = slice(self.start, self.start + k.size(2))
        keys[self.rows, :, new], values[self.rows, :, new] = k, v
        k, v = (x[self.rows, :, : new.stop] for x in (keys, values))
        return causal_attention(q, k, v)

    def attend_masked(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention under the mask."""
        grouped = q.size(1) != k.size(1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, enable_gqa=grouped)
        return out.transpose(1, 2).flatten(2)
