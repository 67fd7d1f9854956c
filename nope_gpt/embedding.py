"""A token embedding of which only the last rows are trained: those of new tokens.

They are a parameter of their own. To mask the gradient of the whole matrix instead would let
the others move by weight decay, and by what Adafactor knows of a row and a column.

Shapes: C embedding dimensions, V vocabulary, N trained rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LastRowsEmbedding(nn.Embedding):
    """An embedding, and the head that is tied to it, whose last rows alone are trained.

    Args:
        source: Its weight [V, C] is shared, not copied, and frozen.
        count: N.
    """

    def __init__(self, source: nn.Embedding, count: int) -> None:
        super().__init__(source.num_embeddings, source.embedding_dim, device="meta")
        self.weight = source.weight.requires_grad_(False)
        self.rows = nn.Parameter(source.weight.detach()[-count:].clone())
        self.register_buffer("original", self.rows.detach().clone(), persistent=False)
        self.is_active = True

    original: Tensor

    @property
    def num_frozen(self) -> int:
        return self.num_embeddings - len(self.rows)

    def forward(self, tokens: Tensor) -> Tensor:
        frozen = F.embedding(tokens, self.weight)
        last = F.embedding((tokens - self.num_frozen).clamp_min(0), self.newest)
        return torch.where((tokens >= self.num_frozen)[..., None], last, frozen)

    @property
    def newest(self) -> Tensor:
        """The last rows, as they are trained or as they were."""
        return self.rows if self.is_active else self.original

    @property
    def parts(self) -> tuple[Tensor, Tensor]:
        """The rows of the vocabulary, those that are not trained and those that are."""
        return self.weight[: self.num_frozen], self.newest

    def logits(self, hidden: Tensor) -> Tensor:
        """Score every token of the vocabulary: [..., C] to [..., V]."""
        return torch.cat([F.linear(hidden, part) for part in self.parts], dim=-1)
