"""The knobs of `export`."""

from __future__ import annotations

import dataclasses
import re

from nope_gpt.config.knobs import Knobs, knob, like
from nope_gpt.config.model_choice import ModelChoice
from nope_gpt.config.panels import MODEL, RUN
from nope_gpt.errors import UsageError

FORMATS = ("hub", "transformers", "llama", "gguf")
"""What `nope export` writes."""

UNKNOWN_CONTEXT = 8192
"""Tokens that programs may plan for where nothing is recorded; what the published models have."""


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
    format: str = knob(
        "hub",
        "hub: the published layout; transformers: an Arcee; llama: a Llama, for vLLM and MLX-LM; "
        "gguf: for llama.cpp, Ollama and LM Studio. Several, with commas, make a directory each.",
        panel=RUN,
    )
    adapter: tuple[str, ...] = like(ModelChoice, "adapter")
    dtype: str = knob(
        "auto",
        "What the weights are written in; auto as they are.",
        panel=RUN,
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    quantize: str | None = knob(
        None,
        "Of gguf, the files to write instead of one in --dtype: q8_0, or through llama.cpp's own "
        "quantizer q4_k_m and others, with commas.",
        panel=RUN,
        shown_default="none",
    )
    dense: bool = knob(
        False,
        "Of gguf, write the MLP with a matrix of zeros more, for programs that refuse a mixture of "
        "one expert.",
        panel=RUN,
    )
    context_length: int | None = knob(
        None,
        "Tokens that other programs may plan for.",
        panel=MODEL,
        shown_default=f"what it was trained on, or {UNKNOWN_CONTEXT}",
        minimum=1,
    )
    license: str | None = knob(
        None,
        "License to name in the model card, such as apache-2.0.",
        panel=RUN,
        shown_default="none",
    )
    push_to_hub: str | None = knob(
        None,
        "Upload to this repository, OWNER/NAME, what has passed its comparison; of several formats "
        "each to OWNER/NAME-FORMAT.",
        panel=RUN,
        shown_default="none",
    )
    private: bool = knob(False, "Make the repository a private one.", panel=RUN)
    overwrite: bool = knob(False, "Replace a directory that is already there.", panel=RUN)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.formats:
            if name not in FORMATS:
                raise UsageError(f"--format is {name!r}, and must be one of {', '.join(FORMATS)}")
        gguf_alone = [flag for flag in ("quantize", "dense") if getattr(self, flag)]
        if gguf_alone and "gguf" not in self.formats:
            raise UsageError(f"--{gguf_alone[0]} is of --format gguf, which is not asked for")
        if self.license and not re.fullmatch(r"[\w.+-]+", self.license):
            raise UsageError(
                f"--license is {self.license!r}, and must be a short name such as apache-2.0"
            )
        if self.push_to_hub and not re.fullmatch(r"[\w.-]+/[\w.-]+", self.push_to_hub):
            raise UsageError(f"--push-to-hub is {self.push_to_hub!r}, and must be OWNER/NAME")

    @property
    def formats(self) -> list[str]:
        """Each format once, in the order that was asked for."""
        return list(dict.fromkeys(part.strip() for part in self.format.split(",")))

    @property
    def quantizations(self) -> list[str]:
        """Each quantization once."""
        parts = (part.strip().lower() for part in (self.quantize or "").split(","))
        return list(dict.fromkeys(part for part in parts if part))
