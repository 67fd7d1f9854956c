"""What the model makes of a held-out text, to be read while it trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from nope_gpt.config import SamplingConfig
from nope_gpt.data.batches import TextBatches
from nope_gpt.device import seed_of
from nope_gpt.sampling import Draws
from nope_gpt.tokenization import BaseTokenizer

PROMPT_TOKENS = 16
SAMPLE_TOKENS = 64


@dataclass(frozen=True)
class Sampler:
    """Continues one and the same text, as the seed and the step draw it.

    Attributes:
        prompt: Token ids [T].
        tokenizer: The model's.
        seed: Of the run.
    """

    prompt: Tensor
    tokenizer: BaseTokenizer
    seed: int

    @classmethod
    def of(cls, batches: TextBatches, tokenizer: BaseTokenizer, seed: int) -> Self:
        """One that begins as the hold-out does, or without one as the text does."""
        stream = batches.held_out if len(batches.held_out) >= PROMPT_TOKENS else batches.train
        return cls(torch.from_numpy(stream.read(0, PROMPT_TOKENS)), tokenizer, seed)

    @torch.no_grad()
    def continued(self, network: nn.Module, step: int) -> str:
        """The text and what the network, in eval mode, adds to it; all ranks must ask.

        Reads everything anew for each token, since a network that ranks share answers to a
        plain call alone.
        """
        device = next(network.parameters()).device
        generator = torch.Generator(device).manual_seed(seed_of(self.seed, step))
        draws = Draws(SamplingConfig(), generator)
        ids = self.prompt.tolist()
        with torch.compiler.set_stance("force_eager"):
            for _ in range(SAMPLE_TOKENS):
                logits = network(torch.tensor([ids], device=device))[0, -1]
                token = int(draws.next(logits).token)
                if token in self.tokenizer.stop_tokens:
                    break
                ids.append(token)
        return self.tokenizer.decode_tokens(ids)
