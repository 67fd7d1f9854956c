"""The knobs of `tune`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from nope_gpt.config.knobs import WithoutEffect, knob, like
from nope_gpt.config.panels import DATA, EVALUATION, LORA, MODEL, OPTIMIZATION
from nope_gpt.config.preparing import PrepareConfig
from nope_gpt.config.training import LEARNING_RATES, SHOWN_RATES, TrainingConfig

CONTROL_TOKENS = ("<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>")
"""What tuning adds to a vocabulary, in this order."""

EXTENSION: dict[str, Any] = {
    "batch_size": 1,
    "gradient_accumulation_steps": 8,
    "max_steps": 200,
    "learning_rate": 5e-2,
    "schedule": "cosine",
    "warmup_fraction": 0.1,
    "run_name": "extend",
}
"""What --extend implies (Wang et al. 2024, appendix A)."""

EXTENSION_INTERVAL = 50
"""Steps between its evaluations, and between its checkpoints."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuneConfig(TrainingConfig):
    """Conversations to an assistant."""

    command: ClassVar[str] = "tune"
    without_effect: ClassVar[Mapping[str, WithoutEffect]] = {
        **TrainingConfig.without_effect,
        "num_dataset_processes": WithoutEffect(int, "prepared data needs no processing"),
    }

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
    max_tokens_per_sample: int = like(PrepareConfig, "max_tokens_per_sample", 4096, panel=DATA)
    filter_long_samples: bool = like(PrepareConfig, "filter_long_samples", panel=DATA)
    extend: str | None = knob(
        None,
        "Instead of answers, teach the model to reach so many times as far: one scale for each "
        "head of attention is learned on a data set of text, and folded into its weights. Unless "
        f"told otherwise in {EXTENSION['max_steps']} steps of "
        f"{EXTENSION['batch_size'] * EXTENSION['gradient_accumulation_steps']} samples, at a rate "
        f"of {EXTENSION['learning_rate']:g}; evaluations and checkpoints come every "
        f"{EXTENSION_INTERVAL}. What concerns conversations and adapters plays no part.",
        panel=DATA,
        choices=("2x", "4x"),
        shown_default="no",
    )
    packing: bool = knob(
        True,
        "Lay conversations end to end, each apart from the others, as many as fit into the "
        "tokens of a batch; otherwise pad them to the longest.",
        panel=DATA,
    )
    gradient_accumulation_steps: int = like(TrainingConfig, "gradient_accumulation_steps", 64)
    optimizer: str = like(TrainingConfig, "optimizer", "adamw")
    learning_rate: float | None = like(
        TrainingConfig,
        "learning_rate",
        shown_default=f"{SHOWN_RATES}; a tenth with --full; a tenth with dpo",
    )
    num_epochs: int = knob(2, "Passes over the data.", panel=OPTIMIZATION, minimum=1)
    max_steps: int | None = knob(
        None,
        "Updates of the weights, at most.",
        panel=OPTIMIZATION,
        minimum=1,
        shown_default="all passes",
    )
    weight_decay: float = like(TrainingConfig, "weight_decay", 0.0)
    max_gradient_norm: float = like(TrainingConfig, "max_gradient_norm", 1.0)
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
        "Rows of the embedding, and so of the head, to train: new ones, those of the control "
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
    run_name: str = like(TrainingConfig, "run_name", "tune")

    @property
    def default_learning_rate(self) -> float:
        """Adapters begin at nothing and move fast; whole weights, and preferences, do not."""
        rate = LEARNING_RATES[self.optimizer]
        return rate * (0.1 if self.full else 1.0) * (0.1 if self.objective == "dpo" else 1.0)
