"""What the model makes of texts and questions, to be read while it trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from nope_gpt.config import SamplingConfig
from nope_gpt.data.batches import TextBatches
from nope_gpt.data.chats import ChatBatches
from nope_gpt.device import seed_of
from nope_gpt.generation.sampling import Draws
from nope_gpt.tokenization import BaseTokenizer, ChatTokenizer

PROMPT_TOKENS = 16
SAMPLE_TOKENS = 64
ANSWERS = 3
GROWTH = 64
"""Tokens, of which a padded text has a multiple."""


@dataclass(frozen=True)
class Sampler:
    """Continues the same texts again and again, as the seed and the step draw them.

    Attributes:
        prompts: Token ids.
        tokenizer: The model's.
        seed: Of the run.
        sampling: How to draw.
        show: A prompt and what was added to it, for people.
    """

    prompts: Sequence[list[int]]
    tokenizer: BaseTokenizer
    seed: int
    sampling: SamplingConfig
    show: Callable[[list[int], list[int]], str]

    @classmethod
    def of_text(
        cls,
        batches: TextBatches,
        tokenizer: BaseTokenizer,
        seed: int,
        first_token: int | None = None,
    ) -> Self:
        """One text, which begins as the hold-out does, or without one as the text does."""
        stream = batches.held_out if len(batches.held_out) >= PROMPT_TOKENS else batches.train
        prompt = stream.read(0, PROMPT_TOKENS).tolist()
        if first_token is not None:
            prompt = [first_token, *prompt]
        sampling = SamplingConfig()
        return cls([prompt], tokenizer, seed, sampling, lambda a, b: tokenizer.decode_tokens(a + b))

    @classmethod
    def of_chats(cls, batches: ChatBatches, tokenizer: ChatTokenizer, seed: int) -> Self:
        """The likeliest answers to some held-out conversations, up to their first answer."""
        prompts = []
        for document, *_ in (batches.held_out or batches.train)[:ANSWERS]:
            assert document.mask is not None
            prompts.append(document.tokens[: int(np.argmax(document.mask))].tolist())

        def show(prompt: list[int], answer: list[int]) -> str:
            asked = tokenizer.decode_tokens(prompt).strip()
            return f"{asked}\n{tokenizer.decode_tokens(answer).strip()}"

        return cls(prompts, tokenizer, seed, SamplingConfig(temperature=0.0), show)

    @torch.no_grad()
    def continued(self, network: nn.Module, step: int) -> str:
        """The texts and what the network, in eval mode, adds to them; all ranks must ask.

        Reads everything anew for each token, since a network that ranks share answers to a
        plain call alone.
        """
        device = next(network.parameters()).device
        generator = torch.Generator().manual_seed(seed_of(self.seed, step))
        draws = [Draws(self.sampling, generator) for _ in self.prompts]
        added: list[list[int]] = [[] for _ in self.prompts]
        open_rows = list(range(len(self.prompts)))
        with torch.compiler.set_stance("force_eager"):
            for _ in range(SAMPLE_TOKENS):
                texts = [self.prompts[row] + added[row] for row in open_rows]
                logits = network(padded(texts, device))
                for place, row in enumerate(list(open_rows)):
                    token = int(draws[row].next(logits[place, len(texts[place]) - 1]).token)
                    if token in self.tokenizer.stop_tokens:
                        open_rows.remove(row)
                    else:
                        added[row].append(token)
                if not open_rows:
                    break
        return "\n\n".join(map(self.show, self.prompts, added))


def padded(texts: Sequence[list[int]], device: torch.device) -> Tensor:
    """Texts of unequal length as [B, T]; what lies behind one's end changes nothing in it.

    T grows in steps: for each size of a product, a CPU's library keeps code and memory of its own.
    """
    longest = -(-max(map(len, texts)) // GROWTH) * GROWTH
    rows = [text + [0] * (longest - len(text)) for text in texts]
    return torch.tensor(rows, device=device)
