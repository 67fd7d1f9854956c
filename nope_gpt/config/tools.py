"""The knobs of `export`, `size` and `quickstart`."""

from __future__ import annotations

import dataclasses

from nope_gpt.config.panels import DATA, MODEL, OPTIMIZATION, RUN
from nope_gpt.config.shape import ModelConfig
from nope_gpt.config.training import LEARNING_RATES
from nope_gpt.knobs import Knobs, knob


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig(Knobs):
    """A trained model to a directory that other programs read."""

    model: str | None = knob(
        None,
        "A run, checkpoint or export directory, a Hub id, or a .pt file of the old scripts.",
        panel=MODEL,
        shown_default="required",
    )
    output: str | None = knob(
        None,
        "Directory to make.",
        panel=RUN,
        shown_default="exports/ and the model's name",
    )
    format: str = knob("hub", "hub: the published layout.", panel=RUN, choices=("hub",))
    overwrite: bool = knob(False, "Replace a directory that is already there.", panel=RUN)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SizeConfig(ModelConfig):
    """A shape to its parameters, memory and time."""

    tokens_per_sample: int = knob(4096, "Tokens in a training sequence.", panel=DATA, minimum=1)
    batch_size: int = knob(
        1, "Samples that pass through the network at a time.", panel=OPTIMIZATION, minimum=1
    )
    optimizer: str = knob(
        "muon",
        "muon, adamw or adafactor.",
        panel=OPTIMIZATION,
        choices=tuple(LEARNING_RATES),
    )
    precision: str = knob(
        "bfloat16",
        "float32, or bfloat16 autocast.",
        panel=RUN,
        choices=("float32", "bfloat16"),
    )
    activation_checkpointing: bool = knob(
        False, "Recompute activations in the backward pass.", panel=OPTIMIZATION
    )
    memory: str | None = knob(
        None,
        "Memory to train in, such as 24GB or 24GiB: answers with the largest published shape "
        "that trains in it.",
        panel=RUN,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuickstartConfig(Knobs):
    """The whole family in a row."""

    directory: str = knob("./quickstart", "Where everything goes.", panel=RUN)
    pretrain_steps: int = knob(
        700, "Updates of the base model's weights.", panel=OPTIMIZATION, minimum=1
    )
    tune_steps: int = knob(
        250, "Updates of the assistant's adapters.", panel=OPTIMIZATION, minimum=1
    )
    seed: int = knob(0, "Seed of every random choice.", panel=RUN, minimum=0, maximum=(1 << 63) - 1)
