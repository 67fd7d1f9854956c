"""The knobs of `tune`."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from nope_gpt.config.panels import DATA, EVALUATION, LORA, MODEL, OPTIMIZATION, RUN
from nope_gpt.config.training import LEARNING_RATES, OPTIMIZER_HELP, TrainingConfig
from nope_gpt.knobs import knob

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
    extend: str | None = knob(
        None,
        "Instead of answers, teach the model to reach so many times as far: one scale for each "
        "head of attention is learned on a data set of text, and folded into its weights. Unless "
        "told otherwise in 200 steps of 8 samples, at a rate of 5e-2; evaluations and checkpoints "
        "come every 50. What concerns conversations and adapters plays no part.",
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
