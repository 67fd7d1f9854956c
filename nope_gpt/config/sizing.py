"""The knobs of `size`."""

from __future__ import annotations

import dataclasses

from nope_gpt.config.generating import GenerateConfig
from nope_gpt.config.knobs import knob, like
from nope_gpt.config.panels import MODEL, OPTIMIZATION, PLANNING, RANKS, RUN
from nope_gpt.config.pretraining import PretrainConfig
from nope_gpt.config.shape import ModelConfig
from nope_gpt.config.training import DEFAULT_SHARDING
from nope_gpt.config.tuning import TuneConfig

COMPUTE_OPTIMAL_RATIO = 20.0
"""Tokens for each parameter that buy the lowest loss for their compute (Hoffmann et al.,
"Training Compute-Optimal Large Language Models", 2022, table 3)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload(ModelConfig):
    """What a training step works on, as far as its memory and its time depend on it."""

    method: str = knob(
        "pretrain",
        "pretrain or full: all weights are trained; lora: adapters; dpo: adapters, on pairs of "
        "answers.",
        panel=OPTIMIZATION,
        choices=("pretrain", "full", "lora", "dpo"),
    )
    tokens_per_sample: int = like(PretrainConfig, "tokens_per_sample")
    batch_size: int = like(PretrainConfig, "batch_size")
    gradient_accumulation_steps: int = like(PretrainConfig, "gradient_accumulation_steps")
    optimizer: str = like(PretrainConfig, "optimizer")
    precision: str = knob(
        "bfloat16",
        "float32, or bfloat16 autocast.",
        panel=RUN,
        choices=("float32", "bfloat16"),
    )
    recall: float = like(PretrainConfig, "recall")
    loss_chunk: int = like(PretrainConfig, "loss_chunk")
    activation_checkpointing: bool = like(PretrainConfig, "activation_checkpointing")
    checkpointed_fraction: float = like(PretrainConfig, "checkpointed_fraction")
    compile: str = knob(
        "auto",
        "on counts what compiled blocks keep, off what others do; auto means off, which is never "
        "less.",
        panel=RUN,
        choices=("auto", "on", "off"),
    )
    rank: int = like(TuneConfig, "rank")
    embeddings: str = like(TuneConfig, "embeddings")
    device: str = knob("cuda", "What computes: cuda or cpu.", panel=RUN, choices=("cuda", "cpu"))
    gpus: int = knob(1, "Ranks that share the work.", panel=RANKS, minimum=1, maximum=1 << 16)
    ddp_sharding_level: int | None = like(PretrainConfig, "ddp_sharding_level")

    @property
    def trains_all(self) -> bool:
        """Whether every weight is trained, rather than adapters."""
        return self.method in ("pretrain", "full")

    @property
    def recalls(self) -> bool:
        """Whether the token before is asked for, too."""
        return self.method == "pretrain" and self.recall > 0.0

    @property
    def recomputed_blocks(self) -> int:
        """Blocks of which the backward pass recomputes everything but their input."""
        if not self.activation_checkpointing:
            return 0
        return int(self.num_decoder_layers * self.checkpointed_fraction)

    @property
    def blocks_behind_the_recomputed(self) -> int:
        """Blocks after the last one that is recomputed; they are spread evenly."""
        count, fraction = self.recomputed_blocks, self.checkpointed_fraction
        blocks = range(1, self.num_decoder_layers + 1)
        return sum(int(index * fraction) == count for index in blocks) - 1

    @property
    def sharding(self) -> int:
        """What the ranks share: 0 nothing, 2 the optimizer, 3 the weights and gradients too."""
        level = self.ddp_sharding_level
        return 0 if self.gpus == 1 else DEFAULT_SHARDING if level is None else level

    @property
    def tokens(self) -> int:
        """That pass through the network at a time, on each rank; a pair has two samples."""
        sides = 2 if self.method == "dpo" else 1
        return sides * self.batch_size * self.tokens_per_sample

    @property
    def tokens_per_step(self) -> int:
        """Of an update of the weights, over all ranks."""
        return self.tokens * self.gradient_accumulation_steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class SizeConfig(Workload):
    """A shape to its parameters, memory and time."""

    model: str | None = knob(
        None,
        "Size this one: a run, checkpoint or export directory, or a Hub id.",
        panel=MODEL,
        shown_default="none",
    )
    context_length: int = like(GenerateConfig, "context_length")
    sequences: int = knob(
        1, "Sequences that are generated at a time.", panel=PLANNING, minimum=1, maximum=1 << 20
    )
    tokens_per_parameter: float = knob(
        COMPUTE_OPTIMAL_RATIO,
        f"Tokens to train on for each parameter: {COMPUTE_OPTIMAL_RATIO:g} buys the lowest loss "
        "for the compute, more a smaller model that is as good.",
        panel=PLANNING,
        above=0.0,
        maximum=1e6,
    )
    memory: str | None = knob(
        None,
        "Plan what to train in so much memory of each device, such as 24GB or 24GiB.",
        panel=PLANNING,
        shown_default="that of --gpu",
    )
    gpu: str | None = knob(
        None,
        "Plan for this GPU, such as rtx4090: its memory and its speed.",
        panel=PLANNING,
        shown_default="none",
    )
    peak_tflops: float | None = knob(
        None,
        "Of a device that is not known: dense bfloat16 operations, in 10^12 a second.",
        panel=PLANNING,
        above=0.0,
        maximum=1e6,
        shown_default="none",
    )
    utilization: float = knob(
        0.4,
        "Share of the peak that training gets, as PaLM counts it.",
        panel=PLANNING,
        above=0.0,
        maximum=1.0,
    )
    days: float | None = knob(
        None,
        "Plan the best model for so many days, too.",
        panel=PLANNING,
        above=0.0,
        maximum=1e5,
        shown_default="none",
    )
    price: float | None = knob(
        None,
        "Of each device for an hour, in any currency: the cost follows.",
        panel=PLANNING,
        minimum=0.0,
        shown_default="none",
    )
