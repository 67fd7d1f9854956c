"""What is evaluated: anything that scores the next token.

Shapes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor

from nope_gpt.adaptation.reach import sharpened
from nope_gpt.model import NoPEGPT
from nope_gpt.network.sharpening import Sharpening, for_context


class Scorer(Protocol):
    """A causal language model, of this project or another."""

    @property
    def device(self) -> torch.device: ...

    def losses(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The cross entropy of each target [B, T] after its tokens [B, T]: nats [B, T]."""
        ...

    def last_logits(self, tokens: Tensor, count: int) -> Tensor:
        """The logits after each of the last tokens: [B, T] to [B, count, V]."""
        ...

    def planned(self, length: int) -> AbstractContextManager[Sharpening]:
        """As it is when a context of so many tokens is planned."""
        ...


class Vocabulary(Protocol):
    """A scorer's tokenizer."""

    def tokenize(self, text: str) -> list[int]:
        """The tokens of a text."""
        ...

    def num_bytes(self, tokens: list[int]) -> int:
        """Of the text that some tokens stand for."""
        ...


class OwnScorer:
    """A NoPE GPT.

    Args:
        model: In eval mode, on its device.
    """

    def __init__(self, model: NoPEGPT) -> None:
        self.model = model

    @property
    def device(self) -> torch.device:
        return self.model.device

    @torch.inference_mode()
    def losses(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return self.model(self.begun(tokens), targets, each=True)  # type: ignore[no-any-return]

    @torch.inference_mode()
    def last_logits(self, tokens: Tensor, count: int) -> Tensor:
        hidden = self.model.decoder(self.model.token_embeddings(self.begun(tokens)))
        return self.model.logits(hidden[:, -count:])

    @contextmanager
    def planned(self, length: int) -> Iterator[Sharpening]:
        model = self.model
        trained = model.trained_context_length
        found = for_context(model.sharpenings, trained, length)
        with sharpened(model, found, trained or length):
            yield found

    def begun(self, tokens: Tensor) -> Tensor:
        """Contexts that begin as the model was trained to see them."""
        return beginning_with(self.model.first_token, tokens)


def beginning_with(token: int | None, tokens: Tensor) -> Tensor:
    """Contexts [B, T] with another first token in each row, if one is given."""
    if token is None:
        return tokens
    tokens = tokens.clone()
    tokens[:, 0] = token
    return tokens
