"""The knobs of `eval`."""

from __future__ import annotations

import dataclasses

from nope_gpt.config.knobs import knob, like
from nope_gpt.config.model_choice import ModelChoice
from nope_gpt.config.panels import DATA, EVALUATION
from nope_gpt.config.training import TrainingConfig
from nope_gpt.errors import UsageError


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig(ModelChoice):
    """A model to what it knows of a text, and how far it reaches."""

    library: str = knob(
        "nope",
        "Which library computes: nope, or transformers, for a model to compare with.",
        panel=EVALUATION,
        choices=("nope", "transformers"),
    )
    text: str | None = knob(
        None,
        "File of text to predict, - for standard input.",
        panel=DATA,
        shown_default="the hold-out of a data set",
    )
    dataset_path: str = like(TrainingConfig, "dataset_path")
    dataset: str | None = like(TrainingConfig, "dataset")
    num_tokens: int = knob(
        65_536, "Tokens to predict at each length, at most.", panel=EVALUATION, minimum=1
    )
    context_length: int | None = knob(
        None,
        "Tokens of context that the lengths are multiples of.",
        panel=EVALUATION,
        shown_default="what the model was trained on",
        minimum=8,
    )
    lengths: str = knob(
        "1,2,4,8", "Contexts to predict in, as multiples of the trained one.", panel=EVALUATION
    )
    stride: int | None = knob(
        None,
        "Tokens that a sliding window of the trained length moves by.",
        panel=EVALUATION,
        shown_default="a quarter of the length",
        minimum=1,
    )
    passkey_depths: int = knob(
        5, "Places in a text to hide a number at.", panel=EVALUATION, minimum=1, maximum=1000
    )
    passkey_keys: int = knob(
        2, "Numbers to hide at each of them, 0 for none.", panel=EVALUATION, minimum=0, maximum=1000
    )
    dtype: str = like(ModelChoice, "dtype", "float32")
    seed: int = like(TrainingConfig, "seed", 0, help="Seed of the hidden numbers.")

    def __post_init__(self) -> None:
        super().__post_init__()
        words = [word.strip() for word in self.lengths.split(",")]
        if not all(word.isdecimal() and 1 <= int(word) <= 1024 for word in words):
            raise UsageError(
                f"--lengths is {self.lengths!r}, and must be whole numbers from 1 to 1024 "
                "with commas",
                hint="--lengths 1,2,4",
            )

    @property
    def multiples(self) -> list[int]:
        """Of the trained length, each once; the trained length is always one."""
        return sorted({1, *(int(word) for word in self.lengths.split(","))})
