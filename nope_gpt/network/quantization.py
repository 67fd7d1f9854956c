"""Weights as 8-bit integers: half the bytes of bfloat16 to read for each token.

Each row of a matrix has a scale of its own, so that W is about scale * integer, rounded to
the nearest of 255 values; activations keep their precision. The sums are in float32 and are
scaled once, after them.

Shapes: O outputs, I inputs, V vocabulary, C embedding dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LARGEST = 127


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a matrix [O, I] to integers [O, I] and their scales [O] in float32."""
    weight = weight.detach().float()
    scale = weight.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / LARGEST
    return (weight / scale[:, None]).round().to(torch.int8), scale


class Int8Linear(nn.Module):
    """A linear layer of integers.

    Args:
        linear: The layer to round.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scale = quantized(linear.weight)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] to [..., O]."""
        return F.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)


class Int8Embedding(nn.Module):
    """A token embedding of integers, which is the head too.

    Args:
        embedding: The table to round.
        dtype: Of the rows that it gives.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, embedding: nn.Embedding, dtype: torch.dtype) -> None:
        super().__init__()
        weight, scale = quantized(embedding.weight)
        self.num_embeddings, self.embedding_dim = embedding.weight.shape
        self.dtype = dtype
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def forward(self, tokens: Tensor) -> Tensor:
        """[...] to [..., C]."""
        rows = self.weight[tokens] * self.scale[tokens][..., None]
        return rows.to(self.dtype)

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The rows of the vocabulary as numbers [V, C]."""
        return ((self.weight * self.scale[:, None]).to(self.dtype),)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., C] to [..., V]."""
        return F.linear(hidden, self.weight.to(hidden.dtype)) * self.scale.to(hidden.dtype)


def round_linears(module: nn.Module) -> None:
    """Replace every `Linear` in a module by its rounded one, in place."""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear):
            setattr(module, name, Int8Linear(child))
        else:
            round_linears(child)
