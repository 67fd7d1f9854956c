"""Decoding on a GPU without waiting for Python: what a token takes is recorded once, and replayed.

A token keeps a GPU busy for a millisecond, and Python for several, with some hundred kernels to
start. A CUDA graph starts them all. Its kernels find their tensors where they were when they were
recorded, so all that changes from token to token lies in one.

Shapes: B rows, H query heads, G key/value heads, S pieces of P entries that are allocated,
D head dimensions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nope_gpt.errors import NopeError, first_line
from nope_gpt.network.attention import kernels_without_plans, mask_of_pieces, shared_attention
from nope_gpt.network.caching import PIECE, KVCache

WARM_UPS = 2
"""Before recording: the first time, libraries take memory, which a recording must not."""


class Step:
    """One token of each row into a cache, whatever the rows have read.

    Args:
        model: A NoPEGPT.
        cache: Its memory must stay where it is.

    Attributes:
        changing: For each row the token, where its entry goes, and how many entries it sees,
            itself included [3, B].
    """

    def __init__(self, model: Any, cache: KVCache) -> None:
        self.model = model
        self.memory = cache.memory
        self.growth = cache.growth
        device = cache.memory.device
        self.changing = torch.zeros(3, cache.num_rows, dtype=torch.long, device=device)
        self.rows = torch.arange(cache.num_rows, device=device)
        self.places = torch.arange(cache.num_allocated, device=device).view(-1, PIECE)

    def prepare(self, cache: KVCache, tokens: Tensor) -> None:
        """Be for the next tokens [B, 1]."""
        lengths = [len(read) for read in cache.tokens]
        slots = [cache.slot(length) for length in lengths]
        visible = [min(length + 1, cache.capacity) for length in lengths]
        self.changing.copy_(torch.tensor([tokens[:, 0].tolist(), slots, visible]))

    def run(self) -> Tensor:
        """Read them; returns the logits after each [B, V]."""
        tokens, _, visible = self.changing
        unseen = self.places >= visible[:, None, None]
        mask = mask_of_pieces(unseen, self.memory.size(3), self.memory.dtype)
        factors = self.growth.factors(visible) if self.growth else None
        hidden = self.model.token_embeddings(tokens[:, None])
        for index, layer in enumerate(self.model.decoder.layers):
            hidden = layer(hidden, attend=partial(self.attend, index, mask, factors))
        return self.model.logits(hidden[:, -1])  # type: ignore[no-any-return]

    def attend(
        self, layer: int, mask: Tensor, factors: Tensor | None, q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        """Store keys and values [B, G, 1, D], and attend with queries [B, H, 1, D] to all that the
        mask [B, G * S, 1, P] leaves; returns the heads' outputs side by side [B, 1, H * D].
        """
        if factors is not None:
            q = q * factors[:, None, None, None].type_as(q)
        keys, values = self.memory[layer]
        slots = self.changing[1]
        keys[self.rows, :, slots], values[self.rows, :, slots] = k[:, :, 0], v[:, :, 0]
        return shared_attention(q, keys, values, mask)


class ReplayingReader:
    """Reads one token of each row of a cache on an NVIDIA GPU.

    It uses the weights where they lie; they must stay there.

    Args:
        model: A NoPEGPT.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.step: Step | None = None

    def can_read(self, cache: KVCache, rows: Sequence[int], num_new: int) -> bool:
        """Whether it is one token of every row."""
        return num_new == 1 and list(rows) == list(range(cache.num_rows))

    def read(self, cache: KVCache, rows: Sequence[int], tokens: Tensor, *, every: bool) -> Tensor:  # noqa: ARG002
        """Read new tokens [B, 1] into a cache; returns the logits after each [B, V].

        Raises:
            NopeError: The GPU's driver cannot record.
        """
        cache.reserve(max(map(len, cache.tokens)) + 1)
        if self.step is None or self.step.memory is not cache.memory:
            try:
                self.record(cache, tokens)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise NopeError(
                    f"what a token takes cannot be recorded on {cache.memory.device}: "
                    f"{first_line(error)}",
                    hint="--compile off does without",
                ) from error
        assert self.step
        self.step.prepare(cache, tokens)
        self.graph.replay()
        return self.logits.clone()

    def record(self, cache: KVCache, tokens: Tensor) -> None:
        """Record a step into the memory that a cache has now; it stores what it is to store."""
        step = Step(self.model, cache)
        step.prepare(cache, tokens)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(cache.memory.device), kernels_without_plans(cache.memory.device):
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    step.run()
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(self.graph):
                self.logits = step.run()
        self.step = step
