"""What is alive at the moments of a training step that can be the fullest.

A step goes through a few of them; each is a sum. They are those of this project's own step: chunked
loss, norms in float32, few tensors at a time in the optimizer. `nope size --verify` counts the same
on the real code.

In formulas, P is the parameters, V the vocabulary, L the layers, d the embedding dimensions, kv
the key (or value) dimensions, H the query heads, r the hidden ratio, N the tokens that pass
through at a time, and w the bytes of an activation in a matrix product.
"""

from __future__ import annotations

import dataclasses

from nope_gpt.config import CACHED_BYTES, LOSS_ROWS, RECALLED_FROM, Workload
from nope_gpt.sizing.arithmetic import Parts
from nope_gpt.sizing.holdings import FLOAT32, Holdings

INT64 = 8


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
        self.held = Holdings(work)
        self.count = self.held.count
        self.width = self.held.width
        self.waiting = self.held.waiting
        self.is_float32 = work.precision == "float32"

    def named(self) -> dict[str, MemoryPlan]:
        """Every moment."""
        held = self.held
        base = MemoryPlan(
            weights=held.weights(), gradients=held.gradients(), optimizer=held.shard(held.state())
        )
        # Of an update's only batch the gradients come to be on the way back.
        before = base if self.adds_up else dataclasses.replace(base, gradients=0)
        forward = dataclasses.replace(
            before, activations=self.kept() + self.batch(), copies=self.kept_copies()
        )
        return {
            **self.of_loss(forward),
            **self.of_backward(forward, base),
            "update": dataclasses.replace(base, transient=self.held.update()),
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
        saved = 2 if self.norms_save_products else 1
        head = tokens * (FLOAT32 * (saved * d + 1) + self.width * d)
        gradient = tokens * self.width * d
        scored = dataclasses.replace(forward, activations=forward.activations + head + gradient)
        is_joined = not work.trains_all and work.embeddings == "new"
        copy = self.width * self.count.embedding if is_joined or not self.is_float32 else 0
        chunk = min(tokens, work.loss_chunk)
        rows = min(work.vocabulary_size, LOSS_ROWS)
        widened = 0 if work.device == "cuda" or self.is_float32 else FLOAT32
        product = (self.width + widened) * rows * d if self.held.trains_embedding else 0
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
            "recall's norm": dataclasses.replace(
                again,
                activations=again.activations + tokens * self.recall_flight_per_token(),
                logits=0,
                copies=forward.copies,
                transient=self.waiting + self.recall_gradient(),
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
        return 2 * FLOAT32 * d if self.is_float32 else (3 * FLOAT32 + self.width) * d

    def recall_gradient(self) -> int:
        """Of the matrix of recall, where gradients come to be on the way back."""
        return 0 if self.adds_up else FLOAT32 * sum(a * b for a, b in self.held.recalling())

    def asked(self) -> int:
        """The gradient of what an early block was asked, until the way back comes to it."""
        return FLOAT32 * self.work.tokens * self.work.embedding_dimensions * self.work.recalls

    def of_backward(self, forward: MemoryPlan, base: MemoryPlan) -> dict[str, MemoryPlan]:
        """On the way back: the final norm, the last block and the first one, the embedding."""
        work, d, tokens = self.work, self.work.embedding_dimensions, self.work.tokens
        waiting = self.waiting if self.adds_up else 0  # Else it is among the gradients.
        asked = self.recall_gradient() + self.asked()
        last = dataclasses.replace(forward, transient=self.waiting + asked)
        if work.recomputed_blocks:  # When it comes to the last of them, those behind it are gone.
            behind = work.blocks_behind_the_recomputed
            again = self.block_per_token() - FLOAT32 * d
            last = dataclasses.replace(
                last,
                activations=last.activations
                + tokens * again
                - behind * tokens * self.block_per_token(),
                copies=last.copies + (1 - behind) * self.copies_of_block(),
            )
        if work.num_decoder_layers <= RECALLED_FROM + 1:  # It is a part of the stream's gradient.
            last = dataclasses.replace(last, transient=last.transient - self.asked())
        first = dataclasses.replace(
            base,
            gradients=base.gradients - (0 if self.adds_up else self.held.gradients_of_block()),
            activations=tokens * (self.block_per_token() - self.unsaved_per_token()) + self.batch(),
            copies=self.copies_of_block(),
            transient=waiting,
        )
        return {
            "norm": dataclasses.replace(
                forward,
                activations=forward.activations + tokens * FLOAT32 * 6 * d,
                transient=self.waiting + asked,
            ),
            **self.of_block("last", last),
            **self.of_block("first", first),
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

    def of_block(self, name: str, before: MemoryPlan) -> dict[str, MemoryPlan]:
        """On the way back through a block's MLP, at the gradients of its two matrices.

        Args:
            name: Of the block.
            before: With all that the block has saved, and without gradients of its own.
        """
        d, hidden = self.work.embedding_dimensions, self.work.hidden_dimensions
        tokens, matrix = self.work.tokens, self.matrix_gradient()

        def at(part: str, activations: int, copies: int, more: int) -> dict[str, MemoryPlan]:
            return {
                f"{name} block, {part}": dataclasses.replace(
                    before,
                    activations=before.activations + activations,
                    copies=before.copies - copies,
                    transient=before.transient + more,
                )
            }

        flight = tokens * self.flight_per_token()
        product = at("down", flight, 0, matrix)
        if self.is_float32 or not self.work.trains_all:
            return product
        # What was multiplied is gone when the product is widened.
        neurons, cast = tokens * self.width * hidden, tokens * self.width * d
        widened = at("down, widened", flight - neurons - cast, matrix, 3 * matrix)
        if self.adds_up:
            return product | widened
        stream = 2 * tokens * FLOAT32 * d - cast
        return product | widened | at("up, widened", stream - 2 * neurons, 2 * matrix, 5 * matrix)

    def rebuilt(self) -> int:
        """DDP lays its buckets anew in the second step, beside the first ones."""
        alone = self.work.gpus == 1 or self.work.sharding > 0
        return 0 if alone else FLOAT32 * self.held.num_trained()

    def scaled(self, gradient: int) -> int:
        """The gradients of a sum are known with it, and multiplied on the way back."""
        return self.waiting if self.work.method == "dpo" else 2 * self.waiting + gradient

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
            numbers = sum(a * b for a, b in self.held.adapters()) // layers
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
        adapters the norms are not trained and save no product, but each adapter its input; nor
        do they on a GPU, whose norms are one kernel.
        """
        work = self.work
        d, kv, hidden = work.embedding_dimensions, work.kv_dimensions, work.hidden_dimensions
        sums = 0 if work.device == "cpu" and not self.is_float32 else work.num_q_heads
        if work.device == "cuda" and (work.method == "pretrain") == self.is_float32:
            # These kernels take a key for each query head; those of a joint product stay.
            kv = kv + d if work.trains_all else d
        if not work.trains_all:
            inputs = 2 if self.is_float32 else 4  # Narrowed for each of the matrices.
            values = (2 + inputs) * d + 2 * kv + 2 * hidden + 6 * work.rank
            return FLOAT32 * (2 * d + 2 + sums) + self.width * values
        if work.compile == "on":
            return FLOAT32 * (d + 2 + sums) + self.width * (5 * d + 2 * kv + 2 * hidden)
        norms = 4 if self.norms_save_products else 2
        return FLOAT32 * (norms * d + 2 + sums) + self.width * (4 * d + 2 * kv + 2 * hidden)

    @property
    def norms_save_products(self) -> bool:
        """Whether a norm saves its input times one over the root mean square, beside its input."""
        return self.work.trains_all and self.work.device == "cpu"

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
        """Logits in float32: of a chunk, or on a CPU of some rows, twice if they were narrow. Those
        that are compiled for a GPU are as narrow as they came.
        """
        row = FLOAT32 * self.work.vocabulary_size
        if self.work.device == "cuda":
            if self.work.compile == "on":
                return chunk * self.width * self.work.vocabulary_size
            return chunk * row * (1 if self.is_float32 else 2)
        rows = min(chunk, max(CACHED_BYTES["cpu"] // row, 1))
        return rows * row * (1 if self.is_float32 else 2)
