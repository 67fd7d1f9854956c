"""What is alive at the moments of a training step that can be the fullest.

A step goes through a few of them; each is a sum. They are those of this project's own step: chunked
loss, norms in float32, one tensor at a time in the optimizer. `nope size --verify` counts the same
on the real code.

In formulas, P is the parameters, V the vocabulary, L the layers, d the embedding dimensions, kv
the key (or value) dimensions, H the query heads, r the hidden ratio, N the tokens that pass
through at a time, and w the bytes of an activation in a matrix product.
"""

from __future__ import annotations

import dataclasses
import math

from nope_gpt.config import Workload
from nope_gpt.sizing.arithmetic import Parts, count_parameters

FLOAT32 = 4
"""In both precisions: weights, gradients, optimizer, residual stream, norms and loss."""

MATMUL_BYTES = {"float32": 4, "bfloat16": 2}

INT64 = 8

CACHED_ROWS = 4 << 20
"""Bytes of logits that a CPU widens at a time: `nope_gpt.cross_entropy.CACHED_BYTES`."""

GRADIENT_ROWS = 8192
"""Of the embedding, whose gradients are added at a time: `nope_gpt.cross_entropy.ROWS`."""

NEW_ROWS = 4
"""Of the embedding, that tuning adds: the control tokens."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryPlan(Parts):
    """Bytes alive on each rank at one moment of a training step.

    Attributes:
        weights: With adapters, of the frozen ones and of the adapters.
        gradients: Of what is trained.
        optimizer: What it remembers.
        activations: Kept for the backward pass, and in flight.
        logits: Of a chunk of the loss.
        copies: Of weights, in the precision of the products or joined.
        transient: What is alive for that moment only.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int = 0
    logits: int = 0
    copies: int = 0
    transient: int = 0

    @property
    def peak(self) -> int:
        return self.total


class Moments:
    """What is alive when.

    Args:
        work: What a step is made of.
    """

    def __init__(self, work: Workload) -> None:
        self.work = work
        self.count = count_parameters(work)
        self.width = MATMUL_BYTES[work.precision]
        self.is_float32 = work.precision == "float32"
        self.trains_embedding = work.trains_all or work.embeddings == "all"
        # The head's gradient waits for that of the embedding, which is the same matrix.
        self.waiting = FLOAT32 * self.count.embedding if self.trains_embedding else 0

    def named(self) -> dict[str, MemoryPlan]:
        """Every moment."""
        base = MemoryPlan(
            weights=self.weights(), gradients=self.gradients(), optimizer=self.shard(self.state())
        )
        # Of an update's only batch the gradients come to be on the way back.
        before = base if self.adds_up else dataclasses.replace(base, gradients=0)
        forward = dataclasses.replace(
            before, activations=self.kept() + self.batch(), copies=self.kept_copies()
        )
        return {
            **self.of_loss(forward),
            **self.of_backward(forward, base),
            "update": dataclasses.replace(base, transient=self.update()),
            "ranks": dataclasses.replace(base, transient=self.rebuilt()),
        }

    @property
    def adds_up(self) -> bool:
        """Whether there are gradients already when a batch begins; in DDP's buckets always."""
        in_buckets = self.work.gpus > 1 and not self.work.sharding
        return in_buckets or self.work.gradient_accumulation_steps > self.work.gpus

    def of_loss(self, forward: MemoryPlan) -> dict[str, MemoryPlan]:
        """While the loss and its gradients are computed."""
        work, d, tokens = self.work, self.work.embedding_dimensions, self.work.tokens
        # The final norm's input, what it saves if it is trained, and its output as multiplied.
        saved = 2 if work.trains_all else 1
        head = tokens * (FLOAT32 * (saved * d + 1) + self.width * d)
        gradient = tokens * self.width * d
        scored = dataclasses.replace(forward, activations=forward.activations + head + gradient)
        is_joined = not work.trains_all and work.embeddings == "new"
        copy = self.width * self.count.embedding if is_joined or not self.is_float32 else 0
        chunk = min(tokens, work.loss_chunk)
        rows = min(work.vocabulary_size, GRADIENT_ROWS)
        widened = 0 if work.device == "cuda" or self.is_float32 else FLOAT32
        product = (self.width + widened) * rows * d if self.trains_embedding else 0
        chunked = dataclasses.replace(
            scored,
            logits=self.width * chunk * work.vocabulary_size,
            copies=forward.copies + copy,
            transient=self.waiting,
        )
        again = self.recalled(chunked)
        return {
            "loss": dataclasses.replace(again, logits=again.logits + self.widened(chunk)),
            "head": dataclasses.replace(
                chunked, transient=self.waiting + max(product, self.width * chunk * d)
            ),
            "recall": dataclasses.replace(again, transient=self.waiting + self.width * chunk * d),
            "recall's norm": self.recalled(
                dataclasses.replace(
                    scored,
                    activations=scored.activations + tokens * self.recall_flight_per_token(),
                    transient=self.waiting + self.recall_gradient(),
                )
            ),
            "scaling": dataclasses.replace(
                scored, transient=self.scaled(gradient) + self.asked() + self.recall_gradient()
            ),
        }

    def recalled(self, moment: MemoryPlan) -> MemoryPlan:
        """With what the second loss keeps: its norm's output, one over the root mean square, and
        the gradient of what it told.
        """
        if not self.work.recalls:
            return moment
        d, copy = self.work.embedding_dimensions, 0 if self.is_float32 else self.width
        return dataclasses.replace(
            moment,
            activations=moment.activations + self.work.tokens * (2 * self.width * d + FLOAT32),
            copies=moment.copies + copy * d * d,
        )

    def recall_flight_per_token(self) -> int:
        """What the way back through the norm of the second loss adds at its fullest."""
        d = self.work.embedding_dimensions if self.work.recalls else 0
        return 3 * FLOAT32 * d if self.is_float32 else (3 * FLOAT32 + 2 * self.width) * d

    def recall_gradient(self) -> int:
        """Of the matrix of recall, where gradients come to be on the way back."""
        return 0 if self.adds_up else FLOAT32 * sum(a * b for a, b in self.recalling())

    def asked(self) -> int:
        """The gradient of what an early block was asked, until the way back comes to it."""
        return FLOAT32 * self.work.tokens * self.work.embedding_dimensions * self.work.recalls

    def of_backward(self, forward: MemoryPlan, base: MemoryPlan) -> dict[str, MemoryPlan]:
        """On the way back: the final norm, the last block and the first one, the embedding."""
        work, d, tokens = self.work, self.work.embedding_dimensions, self.work.tokens
        flight = tokens * self.flight_per_token()
        asked = self.recall_gradient() + self.asked()
        block = dataclasses.replace(
            forward,
            activations=forward.activations + flight,
            transient=self.waiting + self.matrix_gradient() + asked,
        )
        if work.recomputed_blocks:  # When it comes to the last of them, those behind it are gone.
            behind = work.blocks_behind_the_recomputed
            again = self.block_per_token() - FLOAT32 * d
            block = dataclasses.replace(
                block,
                activations=block.activations
                + tokens * again
                - behind * tokens * self.block_per_token(),
                copies=block.copies + (1 - behind) * self.copies_of_block(),
            )
        waiting = self.waiting if self.adds_up else 0  # Else it is among the gradients.
        yet_to_come = 0 if self.adds_up else FLOAT32 * self.num_trained_of_block()
        is_gradient = self.is_float32 and not self.adds_up  # What the product gives is kept as is.
        added = 0 if is_gradient else self.matrix_gradient()
        return {
            "norm": dataclasses.replace(
                forward,
                activations=forward.activations + tokens * FLOAT32 * 6 * d,
                transient=self.waiting + asked,
            ),
            "backward": block,
            "first block": dataclasses.replace(
                base,
                gradients=base.gradients - yet_to_come,
                activations=tokens * (self.block_per_token() - self.unsaved_per_token())
                + self.batch()
                + flight,
                copies=self.copies_of_block(),
                transient=waiting + added,
            ),
            "first attention": dataclasses.replace(
                base,
                activations=tokens * self.attention_per_token(),
                transient=waiting + self.joined_gradient(),
            ),
            "embedding": dataclasses.replace(
                base,
                activations=tokens * FLOAT32 * d + self.batch(),
                transient=self.waiting + waiting,
            ),
        }

    def rebuilt(self) -> int:
        """DDP lays its buckets anew in the second step, beside the first ones."""
        alone = self.work.gpus == 1 or self.work.sharding > 0
        return 0 if alone else FLOAT32 * self.num_trained()

    def scaled(self, gradient: int) -> int:
        """The gradients of a sum are known with it, and multiplied on the way back."""
        return self.waiting if self.work.method == "dpo" else 2 * self.waiting + gradient

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
        return [(side, rank) for pair in self.matrices() for side in pair] * layers

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

    def num_trained_of_block(self) -> int:
        """Numbers of a block that are trained, but for the MLP's second matrix."""
        matrices, _ = self.trained()
        blocks = len(matrices) - len(self.recalling())
        *others, _ = matrices[: blocks // self.work.num_decoder_layers]
        return sum(a * b for a, b in others)

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
        largest = max(a * b for a, b in matrices)
        if self.work.optimizer == "adamw":
            return 0
        if self.work.optimizer == "adafactor":
            return 3 * FLOAT32 * max(others if self.trains_embedding else 0, largest)
        return (FLOAT32 + 3 * self.width) * largest + 2 * self.width * self.smallest_side() ** 2

    def smallest_side(self) -> int:
        """Of the largest matrix that is trained."""
        matrices, _ = self.trained()
        return min(max(matrices, key=math.prod))

    def batch(self) -> int:
        """Tokens, targets and the numbers of their documents."""
        documents = {"pretrain": 0, "full": 4, "lora": 4, "dpo": 4 + INT64}[self.work.method]
        return (2 * INT64 + documents) * self.work.tokens

    def kept(self) -> int:
        """What the blocks save; a recomputed one its input alone."""
        recomputed = self.work.recomputed_blocks
        whole = self.work.num_decoder_layers - recomputed
        d = self.work.embedding_dimensions
        kept = whole * self.block_per_token() + recomputed * FLOAT32 * d
        return self.work.tokens * (kept - self.unsaved_per_token())

    def unsaved_per_token(self) -> int:
        """What the first block's norm saves elsewhere, if nothing before it is trained."""
        if self.work.trains_all or self.work.embeddings != "none" or self.work.recomputed_blocks:
            return 0
        return FLOAT32 * (self.work.embedding_dimensions + 1)

    def kept_copies(self) -> int:
        """Copies of matrices that the backward pass needs; recomputed blocks make theirs again."""
        whole = self.work.num_decoder_layers - self.work.recomputed_blocks
        return whole * self.copies_of_block()

    def copies_of_block(self) -> int:
        """The three matrices of attention's input are joined, and autocast copies them all."""
        d, kv, layers = (
            self.work.embedding_dimensions,
            self.work.kv_dimensions,
            self.work.num_decoder_layers,
        )
        if not self.work.trains_all:
            numbers = sum(a * b for a, b in self.adapters()) // layers
            return 0 if self.is_float32 else self.width * numbers
        if self.is_float32:
            return FLOAT32 * d * (d + 2 * kv)
        return self.width * self.count.matrices // layers

    def block_per_token(self) -> int:
        """What autograd saves of a block: 16 d + 8 + 4 H + w (4 d + 2 kv + 2 r d) for each token.

        Each norm saves its input, one over its root mean square, and their product: 8 d + 4.
        In w bytes the products save the norms' outputs, q, k, v and attention's output, which
        also has the log-sum-exp of each head, and both sides of the MLP's SiLU. Compiled, the
        norms' products and the stream between attention and MLP are computed again. With
        adapters the norms are not trained and save no product, but each adapter its input.
        """
        work = self.work
        d, kv, hidden = work.embedding_dimensions, work.kv_dimensions, work.hidden_dimensions
        sums = 0 if work.device == "cpu" and not self.is_float32 else work.num_q_heads
        if work.device == "cuda" and work.method != "pretrain" and not self.is_float32:
            kv = d  # The kernel that keeps documents apart takes a key for each query head.
        if not work.trains_all:
            inputs = 2 if self.is_float32 else 4  # Narrowed for each of the matrices.
            values = (2 + inputs) * d + 2 * kv + 2 * hidden + 6 * work.rank
            return FLOAT32 * (2 * d + 2 + sums) + self.width * values
        if work.compile == "on":
            return FLOAT32 * (d + 2 + sums) + self.width * (5 * d + 2 * kv + 2 * hidden)
        return FLOAT32 * (4 * d + 2 + sums) + self.width * (4 * d + 2 * kv + 2 * hidden)

    def flight_per_token(self) -> int:
        """What the backward pass of a block adds at its fullest, in the second matrix of the MLP.

        The gradient of the residual stream, its cast under autocast and the gradient of the
        hidden neurons.
        """
        d, hidden = self.work.embedding_dimensions, self.work.hidden_dimensions
        cast = 0 if self.is_float32 else d
        ways = 1 if self.work.trains_all else 2  # Around the adapter, and through it.
        return FLOAT32 * d + self.width * (cast + ways * hidden)

    def attention_per_token(self) -> int:
        """What is alive once the product that made queries, keys and values is undone: the stream's
        gradient and theirs, and what the norm saved.
        """
        d, kv = self.work.embedding_dimensions, self.work.kv_dimensions
        return FLOAT32 * (3 * d + 1) + self.width * (2 * d + 2 * kv)

    def joined_gradient(self) -> int:
        """That of the three matrices of attention's input, before it is taken apart."""
        if not self.work.trains_all:
            return 0
        d, kv = self.work.embedding_dimensions, self.work.kv_dimensions
        return self.width * d * (d + 2 * kv)

    def matrix_gradient(self) -> int:
        """That of the MLP's second matrix, before it is added to the others."""
        if not self.work.trains_all:
            return 0
        return self.width * self.work.embedding_dimensions * self.work.hidden_dimensions

    def widened(self, chunk: int) -> int:
        """Logits in float32: of a chunk, or on a CPU of some rows, twice if they were narrow."""
        row = FLOAT32 * self.work.vocabulary_size
        if self.work.device == "cuda":
            return chunk * row
        rows = min(chunk, max(CACHED_ROWS // row, 1))
        return rows * row * (1 if self.is_float32 else 2)
