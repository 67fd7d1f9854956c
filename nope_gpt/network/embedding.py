"""A token embedding that is the head too, and one of which only the last rows are trained.

Shapes: C embedding dimensions, V vocabulary, N trained rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TiedEmbedding(nn.Embedding):
    """A vector for each token on the way in, and the score of each token on the way out."""

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The rows of the vocabulary, one matrix below the other: each [., C]."""
        return (self.weight,)

    def logits(self, hidden: Tensor) -> Tensor:
        """Score every token of the vocabulary: [..., C] to [..., V]."""
        return F.linear(hidden, self.weight)

    @torch.no_grad()
    def resized(self, num_rows: int) -> TiedEmbedding:
        """One of another number of rows, with those that remain.

        New rows are drawn around the mean of the old ones with their spread, so that new
        tokens are neither likelier nor rarer than others before they are trained. The
        weight keeps its dtype, device and whether it is trained.
        """
        old = self.weight
        new = old.new_empty(num_rows, self.embedding_dim)
        kept = min(num_rows, old.size(0))
        new[:kept] = old[:kept]
        if num_rows > kept:
            new[kept:] = old.mean(dim=0) + old.std(dim=0) * torch.randn_like(new[kept:])
        result = TiedEmbedding(num_rows, self.embedding_dim, device="meta")
        result.weight = nn.Parameter(new, requires_grad=old.requires_grad)
        return result


class LastRowsEmbedding(TiedEmbedding):
    """One whose last rows alone are trained: those of new tokens.

    They are a parameter of their own. To mask the gradient of the whole matrix instead would let
    the others move by weight decay, and by what Adafactor knows of a row and a column.

    Args:
        source: Its weight [V, C] is shared, not copied, and frozen.
        count: N.
    """

    def __init__(self, source: TiedEmbedding, count: int) -> None:
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
        """[...] to [..., C]."""
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
