"""The knobs that `pretrain` and `tune` share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Self

from nope_gpt.config.knobs import Knobs, WithoutEffect, knob, like
from nope_gpt.config.model_choice import ModelChoice
from nope_gpt.config.panels import DATA, EVALUATION, OPTIMIZATION, RANKS, RUN

LEARNING_RATES = {"muon": 2e-2, "adamw": 1e-3, "adafactor": 1e-2}

SHOWN_RATES = ", ".join(f"{name} {rate:g}" for name, rate in LEARNING_RATES.items())

LOSS_CHUNK = 1024
"""Tokens whose scores exist at a time: enough for products at full speed."""

LOSS_ROWS = 8192
"""Of the vocabulary, whose gradients are added at a time: enough for products at full speed."""

MATRICES_TOGETHER = {"cuda": 8}
"""Of one shape, that Muon makes orthogonal at a time, elsewhere one: a GPU would wait for Python,
which has some thirty kernels to start for each of them. To move 408M parameters takes 36 ms on an
H100, and 78 one by one.
"""

CACHED_BYTES = {"cpu": 4 << 20}
"""Of scores in float32 that a CPU takes at a time, so that its cache holds them throughout."""

DEFAULT_SHARDING = 2
"""Level of several ranks: they share the optimizer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig(Knobs):
    """What pretraining and tuning share: one loop, one set of knobs."""

    command: ClassVar[str]
    without_effect: ClassVar[Mapping[str, WithoutEffect]] = {
        "low_memory_optimizer": WithoutEffect(bool, "every optimizer updates few tensors at a time")
    }

    dataset_path: str = knob(
        "./datasets", "Root directory of the data sets, or one data set's directory.", panel=DATA
    )
    dataset: str | None = knob(
        None, "Name of the data set in the root.", panel=DATA, shown_default="the only one there"
    )
    batch_size: int = knob(
        2,
        "Samples that pass through the network at a time, or auto.",
        panel=OPTIMIZATION,
        minimum=1,
    )
    auto_batch_size: bool = knob(
        False,
        "What --batch-size auto means: as many as fit in the device's memory by plan, and as many "
        "fewer batches for each update, so that it is the same.",
        panel=OPTIMIZATION,
    )
    gradient_accumulation_steps: int = knob(
        128,
        "Batches for each update of the weights, over all ranks.",
        panel=OPTIMIZATION,
        minimum=1,
    )
    optimizer: str = knob(
        "muon",
        "muon for the matrices, adamw for the rest; adamw; or adafactor, with hardly any memory.",
        panel=OPTIMIZATION,
        choices=tuple(LEARNING_RATES),
    )
    learning_rate: float | None = knob(
        None,
        "Peak learning rate.",
        panel=OPTIMIZATION,
        above=0.0,
        shown_default=SHOWN_RATES,
    )
    schedule: str = knob(
        "linear",
        "Learning rate after the warm-up: constant, linear to zero, cosine to a tenth, or wsd: "
        "constant, then linear to zero.",
        panel=OPTIMIZATION,
        choices=("constant", "linear", "cosine", "wsd"),
    )
    decay_fraction: float = knob(
        0.2,
        "Fraction of the steps over which --schedule wsd falls to zero.",
        panel=OPTIMIZATION,
        above=0.0,
        maximum=1.0,
    )
    warmup_fraction: float = knob(
        0.02,
        "Fraction of the steps over which the learning rate rises from zero.",
        panel=OPTIMIZATION,
        minimum=0.0,
        maximum=1.0,
    )
    weight_decay: float = knob(
        0.1, "Decoupled weight decay of the matrices.", panel=OPTIMIZATION, minimum=0.0
    )
    max_gradient_norm: float = knob(
        10.0, "Clip the global gradient norm above this.", panel=OPTIMIZATION, above=0.0
    )
    loss_chunk: int = knob(
        LOSS_CHUNK,
        "Tokens whose scores for the whole vocabulary exist at a time: fewer take less memory.",
        panel=OPTIMIZATION,
        minimum=1,
    )
    activation_checkpointing: bool = knob(
        False,
        "Recompute activations in the backward pass: far less memory, about a third more time.",
        panel=OPTIMIZATION,
    )
    checkpointed_fraction: float = knob(
        1.0,
        "Fraction of the blocks that --activation-checkpointing recomputes.",
        panel=OPTIMIZATION,
        above=0.0,
        maximum=1.0,
    )
    max_non_finite_steps: int = knob(
        3,
        "End after so many steps in a row whose loss or gradient is no finite number; none of "
        "them changes the weights.",
        panel=OPTIMIZATION,
        minimum=1,
    )
    loss_spike: str = knob(
        "warn",
        "When the loss jumps far out of its recent range: warn; skip the update; or rewind to "
        "the last checkpoint and leave out the samples since.",
        panel=OPTIMIZATION,
        choices=("ignore", "warn", "skip", "rewind"),
    )
    eval_interval: int = knob(
        100, "Evaluate on the hold-out every this many steps.", panel=EVALUATION, minimum=1
    )
    num_eval_samples: int = knob(
        2048, "Hold-out samples to evaluate on, at most.", panel=EVALUATION, minimum=1
    )
    checkpoint_interval: int = knob(
        100, "Save a checkpoint every this many steps.", panel=EVALUATION, minimum=1
    )
    checkpoint_path: str | None = knob(
        None,
        "Directory of the checkpoints. A name that ends in .pt means the directory of that "
        "name without the suffix.",
        panel=EVALUATION,
        shown_default="checkpoints in the run",
    )
    keep_checkpoints: int = knob(
        3, "Checkpoints to keep, the newest ones.", panel=EVALUATION, minimum=2
    )
    keep_every: int | None = knob(
        None,
        "Keep those of every so many steps for good, too.",
        panel=EVALUATION,
        minimum=1,
        shown_default="none",
    )
    run_dir_path: str = knob("./runs", "Root directory of the runs.", panel=RUN)
    run_name: str = knob("pretrain", "Name of the run in the root.", panel=RUN)
    device: str = like(ModelChoice, "device")
    precision: str = knob(
        "auto",
        "float32, or bfloat16 autocast; auto takes bfloat16 where the hardware has it.",
        panel=RUN,
        choices=("auto", "float32", "bfloat16"),
    )
    compile: str = knob(
        "auto",
        "Fuse what the blocks do between matrix products, by torch.compile. auto does so for "
        "pretraining that is long enough, where there is a compiler; tuning never does.",
        panel=RUN,
        choices=("auto", "on", "off"),
    )
    ddp_sharding_level: int | None = knob(
        None,
        "With more than one rank: 0 gives each a whole copy of the model (DDP), 2 shards the "
        "optimizer, 3 the weights and gradients too (FSDP2).",
        panel=RANKS,
        choices=(0, 2, 3),
        shown_default=f"{DEFAULT_SHARDING} with more than one rank",
    )
    hybrid_sharding: bool = knob(
        False, "Shard within each node, and replicate across nodes.", panel=RANKS
    )
    rank_timeout: float = knob(
        600.0,
        "End the run when a rank has stood still for so many seconds, and say which.",
        panel=RANKS,
        above=0.0,
    )
    seed: int | None = knob(
        None,
        "Seed of every random choice.",
        panel=RUN,
        minimum=0,
        maximum=(1 << 63) - 1,
        shown_default="drawn and recorded",
    )

    @property
    def sharding(self) -> int:
        """What several ranks share: 0 nothing, 2 the optimizer, 3 the weights and gradients too."""
        level = self.ddp_sharding_level
        return DEFAULT_SHARDING if level is None else level

    @property
    def peak_learning_rate(self) -> float:
        return self.learning_rate or self.default_learning_rate

    def settled(self) -> Self:
        """With the learning rate that is taken, so that another default changes no stored run."""
        return self.changed(learning_rate=self.peak_learning_rate)

    @property
    def default_learning_rate(self) -> float:
        """What is taken if none is given."""
        return LEARNING_RATES[self.optimizer]
