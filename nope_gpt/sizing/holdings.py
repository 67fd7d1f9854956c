"""What a rank holds throughout a training step: weights, gradients and the optimizer's memory.

In formulas, d is the embedding dimensions and kv the key (or value) dimensions.
"""

from __future__ import annotations

import math
from collections import Counter

from nope_gpt.config import CONTROL_TOKENS, MATRICES_TOGETHER, Workload
from nope_gpt.sizing.arithmetic import count_parameters

FLOAT32 = 4
"""In both precisions: weights, gradients, optimizer, residual stream, norms and loss."""

MATMUL_BYTES = {"float32": 4, "bfloat16": 2}

NEW_ROWS = len(CONTROL_TOKENS)
"""Of the embedding, that tuning adds: those of the control tokens."""


class Holdings:
    """What is there all the time, in bytes unless it says otherwise.

    Args:
        work: What a step is made of.
    """

    def __init__(self, work: Workload) -> None:
        self.work = work
        self.count = count_parameters(work)
        self.width = MATMUL_BYTES[work.precision]
        self.trains_embedding = work.trains_all or work.embeddings == "all"
        # The head's gradient waits for that of the embedding, which is the same matrix.
        self.waiting = FLOAT32 * self.count.embedding if self.trains_embedding else 0

    def shard(self, size: int) -> int:
        """What one rank has of what all share."""
        return -(-size // self.work.gpus) if self.work.sharding else size

    def gathered(self) -> int:
        """Weights that are whole on each rank while it computes: at level 3 those outside of the
        blocks, a block, and the next one.
        """
        if self.work.sharding < 3:
            return self.stored()
        blocks = min(2, self.work.num_decoder_layers)
        return self.waiting + blocks * FLOAT32 * self.count.matrices // self.work.num_decoder_layers

    def weights(self) -> int:
        """At level 2 and 3 a rank has its shard, what is gathered, and FSDP2's buffers: of two
        blocks that are gathered, and of two whose gradients are shared.
        """
        if not self.work.sharding:
            return self.stored()
        buffers = 4 * FLOAT32 * self.count.matrices // self.work.num_decoder_layers
        return self.shard(self.stored()) + self.gathered() + buffers

    def gradients(self) -> int:
        """From the second batch of an update on, they are there all the time; at level 3 a rank has
        its shard, and whole ones of what is in flight.
        """
        if self.work.sharding < 3:
            return FLOAT32 * self.num_trained()
        return self.shard(FLOAT32 * self.num_trained()) + self.gathered()

    def stored(self) -> int:
        """The weights in float32, but for matrices that only their adapters change."""
        if self.work.trains_all:
            return FLOAT32 * (self.count.total + sum(a * b for a, b in self.recalling()))
        frozen = self.width * self.count.matrices
        return frozen + FLOAT32 * (self.count.total - self.count.matrices) + self.added_weights()

    def added_weights(self) -> int:
        """Adapters, and the new rows of the embedding as they are trained and as they were."""
        rows = 2 * self.new_rows()
        return FLOAT32 * (sum(a * b for a, b in self.adapters()) + rows)

    def new_rows(self) -> int:
        is_new = self.work.embeddings == "new"
        return NEW_ROWS * self.work.embedding_dimensions if is_new else 0

    def matrices(self) -> list[tuple[int, int]]:
        """The sides of the six matrices of a block."""
        d, kv, hidden = (
            self.work.embedding_dimensions,
            self.work.kv_dimensions,
            self.work.hidden_dimensions,
        )
        return [(d, d), (d, kv), (d, kv), (d, d), (d, hidden), (hidden, d)]

    def adapters(self) -> list[tuple[int, int]]:
        """The sides of the matrices of all adapters."""
        rank, layers = self.work.rank, self.work.num_decoder_layers
        pairs = [((rank, inner), (outer, rank)) for inner, outer in self.matrices()]
        return [sides for pair in pairs for sides in pair] * layers

    def trained(self) -> tuple[list[tuple[int, int]], int]:
        """The sides of the matrices that are trained, those of the blocks first, and how many other
        numbers are.
        """
        if self.work.trains_all:
            count, blocks = self.count, self.matrices() * self.work.num_decoder_layers
            return blocks + self.recalling(), count.embedding + count.norms
        whole = self.count.embedding if self.trains_embedding else 0
        return self.adapters(), whole + self.new_rows()

    def recalling(self) -> list[tuple[int, int]]:
        """The sides of the matrix that belongs to recall."""
        return [(self.work.embedding_dimensions,) * 2] if self.work.recalls else []

    def num_trained(self) -> int:
        """Numbers that are trained."""
        matrices, others = self.trained()
        return sum(a * b for a, b in matrices) + others

    def gradients_of_block(self) -> int:
        """Of all that is trained of a block."""
        matrices, _ = self.trained()
        blocks = matrices[: len(matrices) - len(self.recalling())]
        return FLOAT32 * sum(a * b for a, b in blocks) // self.work.num_decoder_layers

    def state(self) -> int:
        """AdamW: two averages for each number; Muon: one for those of the blocks' matrices.
        Adafactor: a row and a column for each matrix.
        """
        matrices, others = self.trained()
        if self.work.optimizer == "adamw":
            return 2 * FLOAT32 * self.num_trained()
        if self.work.optimizer == "muon":
            return FLOAT32 * (sum(a * b for a, b in matrices) + 2 * others)
        sides = sum(a + b for a, b in matrices)
        if self.trains_embedding:
            sides += self.work.vocabulary_size + self.work.embedding_dimensions
        elif self.new_rows():
            sides += NEW_ROWS + self.work.embedding_dimensions
        return FLOAT32 * (sides + (self.count.norms if self.work.trains_all else 0))

    def update(self) -> int:
        """AdamW is fused. The others write a matrix's update several times before applying it."""
        matrices, others = self.trained()
        if self.work.optimizer == "adamw":
            return 0
        if self.work.optimizer == "adafactor":
            largest = max(map(math.prod, matrices))
            return 3 * FLOAT32 * max(others if self.trains_embedding else 0, largest)
        most = MATRICES_TOGETHER.get(self.work.device, 1)
        return max(
            self.orthogonalized(shape, min(count, most))
            for shape, count in Counter(matrices).items()
        )

    def orthogonalized(self, shape: tuple[int, int], count: int) -> int:
        """Where so many matrices are moved at a time by Muon: what they are to be moved by, the
        last of it in float32 too, or two of them and two of products with themselves.
        """
        size, product = math.prod(shape), min(shape) ** 2
        last = 0 if self.width == FLOAT32 else FLOAT32 * size
        return max(self.width * count * size + last, 2 * self.width * count * (size + product))
