"""Reading an artefact as those will who use it: with the real library, if it is installed.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from nope_gpt import __version__
from nope_gpt.export.source import in_float32
from nope_gpt.hub import storage
from nope_gpt.memory import Message
from nope_gpt.model import NoPEGPT
from nope_gpt.tokenization import BaseTokenizer, ChatTokenizer, tokenizer_of


@dataclass(frozen=True)
class Tolerance:
    """How far an artefact may be from its source.

    Attributes:
        error: Of a logit, as a share of the largest one, or None where it is rounded by design.
        divergence: Nats between the distributions of the next token, in the mean.
    """

    error: float | None
    divergence: float


EXACT = Tolerance(1e-5, 1e-8)
"""The same computation in another order of sums, all of it in float32."""


class Reader(Protocol):
    """An artefact as some program has read it."""

    name: str
    tolerance: Tolerance

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """The logits after each token: [T, V] in float32."""

    def continuation(self, tokens: Sequence[int], count: int) -> list[int]:
        """The likeliest tokens that follow, one after the other, with the program's own cache."""

    def tokenize(self, text: str) -> list[int]:
        """The tokens of a text as the network is to see it."""

    def tokenize_prompt(self, messages: list[Message]) -> list[int]:
        """The tokens of a conversation and the header of the answer to come."""


class OwnReader:
    """What this package reads: the published layout, and the others where nobody else is there."""

    name = f"nope-gpt {__version__}"
    tolerance = EXACT

    def __init__(self, model: NoPEGPT, tokenizer: BaseTokenizer) -> None:
        self.model = model
        self.tokenizer = tokenizer

    @classmethod
    def of(cls, directory: Path) -> OwnReader:
        """Read a directory."""
        model = in_float32(storage.load(directory))
        tokenizer = tokenizer_of(BaseTokenizer.load(directory), model.vocabulary_size)
        return cls(model, tokenizer)

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int]) -> Tensor:
        return self.model(torch.tensor([tokens]))[0]  # type: ignore[no-any-return]

    @torch.inference_mode()
    def continuation(self, tokens: Sequence[int], count: int) -> list[int]:
        cache = self.model.new_cache(len(tokens) + count)
        result: list[int] = []
        new = torch.tensor([tokens])
        for _ in range(count):
            result.append(int(self.model.predict(new, cache).argmax()))
            new = torch.tensor([[result[-1]]])
        return result

    def tokenize(self, text: str) -> list[int]:
        first = self.model.first_token
        return [*([] if first is None else [first]), *self.tokenizer.tokenize(text)]

    def tokenize_prompt(self, messages: list[Message]) -> list[int]:
        assert isinstance(self.tokenizer, ChatTokenizer)
        return self.tokenizer.tokenize_prompt(messages)


class TransformersReader:
    """transformers, as its users load a model."""

    tolerance = EXACT

    def __init__(self, directory: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        self.tokenizer: Any = AutoTokenizer.from_pretrained(directory)
        self.model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        self.model.generation_config.eos_token_id = None  # Compared beyond the end of a text.
        version = importlib.metadata.version("transformers")
        self.name = f"transformers {version} ({type(self.model).__name__})"

    @staticmethod
    def is_there() -> bool:
        """Whether transformers is installed."""
        return importlib.util.find_spec("transformers") is not None

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int]) -> Tensor:
        """The logits after each token; the second half is read far away from the first.

        A text has no place there, so a network that turns by positions would show it at once.
        """
        length = len(tokens)
        places = torch.arange(length) + (torch.arange(length) >= length // 2) * FAR
        mask = torch.ones(1, length)  # Without one, it takes a gap for the end of a text.
        answer = self.model(torch.tensor([tokens]), position_ids=places[None], attention_mask=mask)
        return answer.logits[0].float()  # type: ignore[no-any-return]

    @torch.inference_mode()
    def continuation(self, tokens: Sequence[int], count: int) -> list[int]:
        found = self.model.generate(
            torch.tensor([tokens]),
            max_new_tokens=count,
            do_sample=False,
        )
        return [int(token) for token in found[0, len(tokens) :]]

    def tokenize(self, text: str) -> list[int]:
        return list(self.tokenizer(text, split_special_tokens=True)["input_ids"])

    def tokenize_prompt(self, messages: list[Message]) -> list[int]:
        found = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True
        )
        return list(found["input_ids"])


FAR = 1 << 16
"""Positions that a part of the compared text is moved by."""
