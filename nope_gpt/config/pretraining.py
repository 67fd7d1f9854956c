"""The knobs of `pretrain`."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from nope_gpt.config.knobs import knob
from nope_gpt.config.panels import DATA, EVALUATION, MODEL, OPTIMIZATION
from nope_gpt.config.preparing import ENCODINGS
from nope_gpt.config.shape import ModelShape
from nope_gpt.config.training import TrainingConfig
from nope_gpt.errors import UsageError

LENGTH_GROWTH = 0.8

RECALLED_FROM = 2
"""Number of the block whose result recall asks, counted from 0: the first ones find out where a
token stands, the next can look for its neighbour."""

SHORTEST_PIECE = 16
"""Tokens that a growing sample begins with, at least."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig(ModelShape, TrainingConfig):
    """Text to a base model."""

    command: ClassVar[str] = "pretrain"

    dataset_subset: str | None = knob(
        None,
        "FineWeb subset whose data set to train on, `none` for the full 15T tokens.",
        panel=DATA,
        choices=("sample-10BT", "sample-100BT", "sample-350BT", "none"),
        shown_default="sample-10BT if it is prepared",
    )
    token_encoding: str | None = knob(
        None,
        "Encoding of that FineWeb data set.",
        panel=DATA,
        choices=ENCODINGS,
        shown_default="r50k_base if it is prepared",
    )
    tokens_per_sample: int = knob(
        4096,
        "Tokens in a training sequence: the context length that the model is trained on.",
        panel=DATA,
        minimum=1,
    )
    max_steps: int = knob(10000, "Updates of the weights.", panel=OPTIMIZATION, minimum=1)
    initialization: str = knob(
        "zero",
        "scaled starts near the loss of a uniform guess at any width; zero too, and no block adds "
        "anything at first; seed is torch's default, which starts near 1,000 nats.",
        panel=MODEL,
        choices=("zero", "scaled", "seed"),
    )
    anchor: bool | None = knob(
        None,
        "Let every sample, and every piece of one, begin with the end-of-text token, an anchor to "
        "count positions from; whatever the model reads later begins with it too.",
        panel=DATA,
        shown_default="on, but with --document-masking",
    )
    length_growth: float | None = knob(
        None,
        "Share of the steps, the first ones, in which samples are cut into pieces: by halves down "
        f"to {SHORTEST_PIECE} tokens or more, then into twice as long ones, and so on until they "
        "are whole.",
        panel=OPTIMIZATION,
        minimum=0.0,
        maximum=1.0,
        shown_default=f"{LENGTH_GROWTH:g}, where samples have halves of {SHORTEST_PIECE} tokens or "
        "more",
    )
    recall: float = knob(
        0.5,
        "Weight of a second loss: from what an early block makes of a token, the one before is "
        "to be told. It teaches attention where things are, and falls to nothing until the end.",
        panel=OPTIMIZATION,
        minimum=0.0,
    )
    rotary_until: float = knob(
        0.0,
        "Turn queries and keys by their position in this share of the steps, the first ones. Then "
        "it is dropped, and what is left is a model without positions.",
        panel=OPTIMIZATION,
        minimum=0.0,
        below=1.0,
    )
    tokens_per_step: int | None = knob(
        None,
        "Tokens for each update of the weights, over all ranks: the accumulation follows.",
        panel=OPTIMIZATION,
        minimum=1,
        shown_default="batch size x accumulation x tokens per sample",
    )
    document_masking: bool = knob(
        False, "Let no token see those of another document in its sample.", panel=DATA
    )
    sample_interval: int = knob(
        1000,
        "Continue a held-out text every this many steps, for TensorBoard; 0 for never.",
        panel=EVALUATION,
        minimum=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        head = self.embedding_dimensions // self.num_q_heads
        if self.rotary_until and head % 2:
            raise UsageError(
                f"--rotary-until turns pairs of dimensions, and a head has {head} of them",
                hint="leave it out, or choose other --embedding-dimensions or --num-q-heads",
            )
        can_grow = self.tokens_per_sample % 2 == 0 and self.tokens_per_sample >= 2 * SHORTEST_PIECE
        if self.length_growth is None:
            object.__setattr__(self, "length_growth", LENGTH_GROWTH if can_grow else 0.0)
        if self.anchor is None:
            object.__setattr__(self, "anchor", not self.document_masking)
        if self.length_growth and not can_grow:
            raise UsageError(
                f"--length-growth halves samples down to {SHORTEST_PIECE} tokens or more, and "
                f"{self.tokens_per_sample} tokens cannot be halved so",
                hint="leave it out, or choose another --tokens-per-sample",
            )
        if self.anchor and self.document_masking:
            raise UsageError(
                "--anchor is at the beginning of a sample, and with --document-masking the other "
                "documents in it would not see it",
                hint="leave one out",
            )
        if self.tokens_per_step is None:
            return
        tokens = self.batch_size * self.tokens_per_sample
        if self.tokens_per_step % tokens:
            below = self.tokens_per_step // tokens * tokens
            near = [str(count) for count in (below, below + tokens) if count]
            raise UsageError(
                f"--tokens-per-step is {self.tokens_per_step:,}, which batches of "
                f"{self.batch_size} samples of {self.tokens_per_sample} tokens, {tokens:,} in "
                f"each, do not divide",
                hint=f"--tokens-per-step {' or '.join(near)}",
            )
        steps = self.tokens_per_step // tokens
        object.__setattr__(self, "gradient_accumulation_steps", steps)
