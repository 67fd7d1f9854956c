"""The recall scaffold: an early block is to tell the token before, while a model begins to learn.

A model without positions finds the token before the present one by attention alone, and for long
it does not: the loss of the next token hardly rewards the first steps on that way. A second loss
asks for it directly, and is taken away before the end. What belongs to it is no part of the model.

Shapes: B batch, T tokens, C embedding dimensions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nope_gpt.network.blocks import NORM_EPSILON
from nope_gpt.network.cross_entropy import IGNORED


class Recall(nn.Linear):
    """A matrix between the residual stream and the head: [B, T, C] to [B, T, C]."""

    def __init__(self, size: int) -> None:
        super().__init__(size, size, bias=False)
        nn.init.normal_(self.weight, std=1.0 / math.sqrt(size))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] to [B, T, C], which the head is to score the token before with."""
        return super().forward(F.rms_norm(x, x.shape[-1:], eps=NORM_EPSILON))


def before_each(tokens: Tensor, documents: Tensor | None) -> Tensor:
    """The token before each one of [B, T], and `IGNORED` where there is none in its document."""
    before = torch.full_like(tokens, IGNORED)
    before[:, 1:] = tokens[:, :-1]
    if documents is not None:
        before[:, 1:][documents[:, 1:] != documents[:, :-1]] = IGNORED
    return before
