"""Which model a command opens, and how."""

from __future__ import annotations

import dataclasses

from nope_gpt.config.knobs import Knobs, knob
from nope_gpt.config.panels import MODEL, RUN


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelChoice(Knobs):
    """A model that is there, on a device."""

    model: str | None = knob(
        None,
        "A run, checkpoint or export directory, or a Hub id.",
        panel=MODEL,
        shown_default="required",
    )
    adapter: tuple[str, ...] = knob(
        (),
        "Adapter to fold into the model: a run of `nope tune`, or a checkpoint of one; may be "
        "given again, the older one first.",
        panel=MODEL,
    )
    device: str = knob("auto", "auto, cpu, cuda, cuda:N or mps.", panel=RUN)
    dtype: str = knob(
        "auto",
        "What the weights are kept in: float32, bfloat16 or int8. auto takes bfloat16 where "
        "the hardware has it, and float32 elsewhere.",
        panel=RUN,
        choices=("auto", "float32", "bfloat16", "int8"),
    )
