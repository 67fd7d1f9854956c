"""The weights that a network begins with."""

from __future__ import annotations

import math

from torch import nn

WRITERS = ("out_proj", "down")
"""The matrices that write to the residual stream."""


def scaled(network: nn.Module) -> None:
    """Draw the weights so that the first loss is near ln V at any width.

    Every matrix keeps the scale of its input, except that those which write to the residual
    stream share one unit of variance among the 2L of them (GPT-2, section 2.3), and that the
    embedding, being the head too, is half as large: at 1/sqrt(C) the logits would have unit
    variance, which alone costs 0.5 nats.
    """
    writers = sum(name.endswith(WRITERS) for name, _ in network.named_modules())
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear):
            gain = 1.0 / math.sqrt(writers) if name.endswith(WRITERS) else 1.0
            nn.init.normal_(module.weight, std=gain / math.sqrt(module.in_features))
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5 / math.sqrt(module.embedding_dim))


def zero(network: nn.Module) -> None:
    """Let no block add anything at first (Yang et al. 2022, appendix D.2); the rest stays."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(WRITERS):
            nn.init.zeros_(module.weight)


def seed(network: nn.Module) -> None:
    """As torch does by default, which the published models began with."""
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            module.reset_parameters()


CHANGES = {"scaled": lambda _: None, "zero": zero, "seed": seed}
"""What each kind changes of a network that was just made, whose weights are scaled."""
