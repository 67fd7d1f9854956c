"""The knobs of `generate` and `chat`."""

from __future__ import annotations

import dataclasses
import functools
import math

from nope_gpt.config.knobs import Knobs, knob, like
from nope_gpt.config.model_choice import ModelChoice
from nope_gpt.config.panels import MODEL, RUN, SAMPLING
from nope_gpt.config.training import TrainingConfig
from nope_gpt.errors import UsageError


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig(Knobs):
    """How the next token is drawn: penalty, bias, then top-k, temperature, top-p, min-p."""

    max_tokens: int = knob(2000, "Tokens to generate, at most.", panel=SAMPLING, minimum=1)
    context_length: int = knob(
        4096, "Tokens that the model may look back on.", panel=SAMPLING, minimum=1
    )
    temperature: float = knob(
        0.9,
        "Spread of the distribution; 0 always takes the likeliest token.",
        panel=SAMPLING,
        minimum=0.0,
    )
    top_k: int = knob(
        500, "Draw from the k likeliest tokens, 0 for all.", panel=SAMPLING, minimum=0
    )
    top_p: float = knob(
        0.9,
        "Draw from the likeliest tokens whose probabilities sum to p.",
        panel=SAMPLING,
        above=0.0,
        maximum=1.0,
    )
    repeat_penalty: float = knob(
        0.1,
        "Share of its logit that a token loses for each recent use.",
        panel=SAMPLING,
        minimum=0.0,
        maximum=1.0,
    )
    repeat_window: int = knob(
        50, "Generated tokens that count as recent.", panel=SAMPLING, minimum=1
    )
    min_p: float = knob(
        0.0,
        "Draw from tokens of at least this share of the likeliest one's probability.",
        panel=SAMPLING,
        minimum=0.0,
        maximum=1.0,
    )
    logit_bias: str | None = knob(
        None,
        "ID:BIAS,... adds to the logits of tokens; a bias of -100 rules one out.",
        panel=SAMPLING,
        shown_default="none",
    )
    stop: tuple[str, ...] = knob(
        (), "End before this text; may be given several times.", panel=SAMPLING
    )
    pin_tokens: int = knob(
        0,
        "When the context is full, forget the oldest tokens but never the first so many.",
        panel=SAMPLING,
        minimum=0,
    )
    draft_tokens: int = knob(
        0,
        "Tokens to guess ahead from what was seen before, for texts that repeat themselves: the "
        "same text, sooner.",
        panel=SAMPLING,
        minimum=0,
        maximum=7,
    )
    compile: str = knob(
        "auto",
        "On a CPU, decode by code that is compiled for it: auto once it is there, compiling it "
        "in the background; on waits for it; off never. On a GPU, record a token's kernels once "
        "and replay them, but for off.",
        panel=RUN,
        choices=("auto", "on", "off"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if "" in self.stop:
            raise UsageError("--stop is an empty text, and must be one that ends the answer")
        if self.pin_tokens >= self.context_length:
            raise UsageError(
                f"--pin-tokens is {self.pin_tokens}, and must be less than --context-length, "
                f"which is {self.context_length}"
            )
        _ = self.biases  # Refused now, and not at the first token.

    @functools.cached_property
    def biases(self) -> dict[int, float]:
        """What is added to the logits of tokens.

        Raises:
            UsageError: --logit-bias is not written as it should be.
        """
        try:
            pairs = [part.split(":") for part in (self.logit_bias or "").split(",") if part]
            result = {int(token): float(bias) for token, bias in pairs}
        except ValueError:
            result = {-1: 0.0}
        if min(result, default=0) < 0 or not all(map(math.isfinite, result.values())):
            raise UsageError(
                f"--logit-bias is {self.logit_bias!r}, and must be ID:BIAS pairs",
                hint="--logit-bias 198:-100,50256:2.5",
            )
        return result


@dataclasses.dataclass(frozen=True, kw_only=True)
class WritingConfig(SamplingConfig, ModelChoice):
    """What `generate` and `chat` share: a model, how it draws, and how that is shown."""

    colorize_tokens: bool = knob(
        False, "Colour each token by its probability, green to red.", panel=SAMPLING
    )
    seed: int | None = like(
        TrainingConfig, "seed", help="Seed of the draws.", shown_default="drawn"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig(WritingConfig):
    """A prompt to its continuation."""

    num_samples: int = knob(
        1, "Continuations of each prompt.", panel=SAMPLING, minimum=1, maximum=1 << 16
    )
    batch_size: int = knob(
        8, "Continuations that are written at a time.", panel=RUN, minimum=1, maximum=1 << 12
    )
    num_beams: int = knob(
        1,
        "Search for the likeliest continuation with so many beams, instead of drawing one.",
        panel=SAMPLING,
        minimum=1,
        maximum=1 << 10,
    )
    length_penalty: float = knob(
        1.0,
        "Beams are compared by their log-probability over length to this power: 0 prefers "
        "short ones, 1 the likeliest tokens.",
        panel=SAMPLING,
        minimum=0.0,
    )
    log_probabilities: int | None = knob(
        None,
        "With --json: the log-probability of every token, and of so many likeliest ones.",
        panel=SAMPLING,
        minimum=0,
        maximum=1 << 10,
        shown_default="none",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatConfig(WritingConfig):
    """A conversation in the terminal."""

    temperature: float = like(SamplingConfig, "temperature", 0.7)
    max_message_history: int = knob(
        4, "Messages of the conversation that the model sees.", panel=SAMPLING, minimum=1
    )
    system_message: str = knob(
        "You are a friendly AI assistant.", "What the model is told before you speak.", panel=MODEL
    )
    tools: tuple[str, ...] = knob(
        (),
        "Functions that the model may ask for: a file of Python, or examples for a calculator and "
        "a clock; may be given several times.",
        panel=MODEL,
    )
    yes_tools: bool = knob(False, "Run what the model asks for without asking you.", panel=MODEL)
    markdown: bool = knob(
        True, "On a terminal, show each finished block of an answer as Markdown.", panel=RUN
    )
    history: bool = knob(True, "Keep what you type, in a file that only you can read.", panel=RUN)
