"""The knobs of `pretrain` and `tune`."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from nope_gpt.config.panels import DATA, EVALUATION, LORA, MODEL, OPTIMIZATION, RANKS, RUN
from nope_gpt.config.shape import ModelShape
from nope_gpt.errors import UsageError
from nope_gpt.knobs import Knobs, knob

ENCODINGS = ("r50k_base", "p50k_base", "cl100k_base", "o200k_base")

LEARNING_RATES = {"muon": 2e-2, "adamw": 1e-3, "adafactor": 1e-2}

OPTIMIZER_HELP = (
    "muon for the matrices, adamw for the rest; adamw; or adafactor, with hardly any memory."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig(Knobs):
    """What pretraining and tuning share: one loop, one set of knobs."""

    command: ClassVar[str]

    dataset_path: str = knob(
        "./datasets", "Root directory of the data sets, or one data set's directory.", panel=DATA
    )
    dataset: str | None = knob(
        None, "Name of the data set in the root.", panel=DATA, shown_default="the only one there"
    )
    batch_size: int = knob(
        2, "Samples that pass through the network at a time.", panel=OPTIMIZATION, minimum=1
    )
    gradient_accumulation_steps: int = knob(
        128,
        "Batches for each update of the weights, over all ranks.",
        panel=OPTIMIZATION,
        minimum=1,
    )
    optimizer: str = knob(
        "muon",
        OPTIMIZER_HELP,
        panel=OPTIMIZATION,
        choices=tuple(LEARNING_RATES),
    )
    learning_rate: float | None = knob(
        None,
        "Peak learning rate.",
        panel=OPTIMIZATION,
        above=0.0,
        shown_default="muon 2e-2, adamw 1e-3, adafactor 1e-2",
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
    low_memory_optimizer: bool = knob(
        False,
        "Update one tensor at a time: less memory, slightly slower.",
        panel=OPTIMIZATION,
    )
    max_gradient_norm: float = knob(
        10.0, "Clip the global gradient norm above this.", panel=OPTIMIZATION, above=0.0
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
    device: str = knob("auto", "auto, cpu, cuda, cuda:N or mps.", panel=RUN)
    precision: str = knob(
        "auto",
        "float32, or bfloat16 autocast; auto takes bfloat16 where the hardware has it.",
        panel=RUN,
        choices=("auto", "float32", "bfloat16"),
    )
    compile: str = knob(
        "auto",
        "Fuse what the blocks do between matrix products, by torch.compile. auto does so for a "
        "run that is long enough, where there is a compiler.",
        panel=RUN,
        choices=("auto", "on", "off"),
    )
    ddp_sharding_level: int | None = knob(
        None,
        "With more than one rank: 0 gives each a whole copy of the model (DDP), 2 shards "
        "gradients and optimizer, 3 the weights too (FSDP2).",
        panel=RANKS,
        choices=(0, 2, 3),
        shown_default="2 with more than one rank",
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
    def peak_learning_rate(self) -> float:
        return self.learning_rate or self.default_learning_rate

    @property
    def default_learning_rate(self) -> float:
        """What is taken if none is given."""
        return LEARNING_RATES[self.optimizer]


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
        "scaled",
        "scaled starts near the loss of a uniform guess at any width; seed is torch's default, "
        "which starts near 1,000 nats.",
        panel=MODEL,
        choices=("scaled", "seed"),
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuneConfig(TrainingConfig):
    """Conversations to an assistant."""

    command: ClassVar[str] = "tune"

    model: str | None = knob(
        None,
        "Base model: a run, checkpoint or export directory, or a Hub id.",
        panel=MODEL,
        shown_default="required",
    )
    dataset_subset: str = knob(
        "all",
        "Comma-separated subsets of the data set (a source file's name without its suffix), "
        "NAME:0.5 for half of one, NAME@1000 for at most so many conversations.",
        panel=DATA,
    )
    max_tokens_per_sample: int = knob(
        4096,
        "Tokens of a conversation, at most; a longer one loses its last turns.",
        panel=DATA,
        minimum=2,
    )
    filter_long_samples: bool = knob(
        False, "Leave longer conversations out instead of cutting them.", panel=DATA
    )
    num_dataset_processes: int = knob(
        8,
        "Accepted for old command lines: prepared data needs no processing.",
        panel=DATA,
        minimum=1,
    )
    packing: bool = knob(
        True,
        "Lay conversations end to end, each apart from the others, as many as fit into the "
        "tokens of a batch; otherwise pad them to the longest.",
        panel=DATA,
    )
    gradient_accumulation_steps: int = knob(
        64,
        "Batches for each update of the weights, over all ranks.",
        panel=OPTIMIZATION,
        minimum=1,
    )
    optimizer: str = knob(
        "adamw", OPTIMIZER_HELP, panel=OPTIMIZATION, choices=tuple(LEARNING_RATES)
    )
    learning_rate: float | None = knob(
        None,
        "Peak learning rate.",
        panel=OPTIMIZATION,
        above=0.0,
        shown_default="muon 2e-2, adamw 1e-3, adafactor 1e-2; a tenth with --full; a tenth with "
        "dpo",
    )
    num_epochs: int = knob(2, "Passes over the data.", panel=OPTIMIZATION, minimum=1)
    max_steps: int | None = knob(
        None,
        "Updates of the weights, at most.",
        panel=OPTIMIZATION,
        minimum=1,
        shown_default="all passes",
    )
    weight_decay: float = knob(
        0.0, "Decoupled weight decay of the matrices.", panel=OPTIMIZATION, minimum=0.0
    )
    max_gradient_norm: float = knob(
        1.0, "Clip the global gradient norm above this.", panel=OPTIMIZATION, above=0.0
    )
    rank: int = knob(
        8, "Rank of the decomposition matrices.", panel=LORA, minimum=1, maximum=1 << 16
    )
    alpha: float = knob(1.0, "Strength of the LoRA signal: W + alpha * B * A.", panel=LORA)
    dropout: float = knob(
        0.0,
        "Proportion of the adapters' inputs that training sets to zero; with --full, of the "
        "signals in the network.",
        panel=LORA,
        minimum=0.0,
        below=1.0,
    )
    embeddings: str = knob(
        "new",
        "Rows of the embedding, and so of the head, to train: new ones, those of the four control "
        "tokens; all; or none.",
        panel=LORA,
        choices=("new", "all", "none"),
    )
    full: bool = knob(False, "Train all weights, and no adapters.", panel=LORA)
    objective: str = knob(
        "auto",
        "sft trains on the answers, of a pair on the better one; dpo to prefer the better answer; "
        "auto takes dpo for pairs.",
        panel=OPTIMIZATION,
        choices=("auto", "sft", "dpo"),
    )
    beta: float = knob(
        0.1,
        "With dpo, how dear it is to move away from the base model.",
        panel=OPTIMIZATION,
        above=0.0,
    )
    length_normalized: bool = knob(
        False, "With dpo, compare log-probabilities by token.", panel=OPTIMIZATION
    )
    eval_interval: int = knob(
        1, "Evaluate on the hold-out every this many epochs.", panel=EVALUATION, minimum=1
    )
    checkpoint_interval: int = knob(
        1, "Save a checkpoint every this many epochs.", panel=EVALUATION, minimum=1
    )
    run_name: str = knob("tune", "Name of the run in the root.", panel=RUN)

    @property
    def default_learning_rate(self) -> float:
        """Adapters begin at nothing and move fast; whole weights, and preferences, do not."""
        rate = LEARNING_RATES[self.optimizer]
        return rate * (0.1 if self.full else 1.0) * (0.1 if self.objective == "dpo" else 1.0)
