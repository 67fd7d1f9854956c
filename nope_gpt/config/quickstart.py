"""The knobs of `quickstart`."""

from __future__ import annotations

import dataclasses

from nope_gpt.config.knobs import Knobs, knob, like
from nope_gpt.config.panels import OPTIMIZATION, RUN
from nope_gpt.config.training import TrainingConfig


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
    seed: int = like(TrainingConfig, "seed", 0)
