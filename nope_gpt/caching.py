"""The key/value cache: what a model keeps of the tokens it has read.

Keys carry no position here, so the order of the entries does not matter to attention.
A full cache is therefore a ring: the newest entry overwrites the oldest, which is
sliding-window attention over the last `capacity` tokens.

Shapes: B batch, G key/value heads, T new tokens, N visible tokens, D head dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nope_gpt.config import ModelConfig


class KVCache:
    """Keys and values of every layer, preallocated.

    Args:
        config: The network's shape.
        batch_size: B.
        capacity: Tokens to keep.
        dtype, device: Those of the model.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        batch_size: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (batch_size, config.num_kv_heads, capacity, config.head_dimensions)
        self.capacity = capacity
        self.layers = [
            LayerCache(
                torch.zeros(shape, dtype=dtype, device=device),
                torch.zeros(shape, dtype=dtype, device=device),
            )
            for _ in range(config.num_decoder_layers)
        ]

    @property
    def num_tokens(self) -> int:
        """Tokens read so far, those that were overwritten included."""
        return self.layers[0].num_tokens

    def pieces(self, tokens: Tensor) -> Iterator[Tensor]:
        """Split new tokens [B, T] so that none overwrites what an earlier one of them may see.

        What fits in the free space goes in together, the rest one by one around the ring.
        """
        free = max(self.capacity - self.num_tokens, 0)
        if free:
            yield tokens[:, :free]
        for index in range(free, tokens.size(1)):
            yield tokens[:, index : index + 1]

    def mask(self, num_new: int) -> Tensor | None:
        """Which entries [T, N] each new token may see, or None where it may see all."""
        if num_new == 1:
            return None
        num_visible = self.num_tokens + num_new
        device = self.layers[0].keys.device
        allowed = torch.ones(num_new, num_visible, dtype=torch.bool, device=device)
        return allowed.tril(diagonal=self.num_tokens)


class LayerCache:
    """The keys and values of one layer, [B, G, capacity, D] each."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys = keys
        self.values = values
        self.num_tokens = 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values [B, G, T, D]; return all visible ones, [B, G, N, D]."""
        capacity = self.keys.size(2)
        start, num_new = self.num_tokens % capacity, keys.size(2)
        self.keys[:, :, start : start + num_new] = keys
        self.values[:, :, start : start + num_new] = values
        self.num_tokens += num_new
        num_visible = min(self.num_tokens, capacity)
        return self.keys[:, :, :num_visible], self.values[:, :, :num_visible]
