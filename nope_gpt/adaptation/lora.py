"""Low-rank adapters: attach them to a model, and fold them into its weights.

W' = W + alpha * B @ A, with A [rank, in] drawn and B [out, rank] zero at the start, on
the six matrices of every layer, as the published chat model was tuned (Hu et al.,
"LoRA", 2021, without its division by the rank). Beside them the last rows of the
embedding may be trained, those of new tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nope_gpt.errors import UsageError
from nope_gpt.model import NoPEGPT
from nope_gpt.network.embedding import LastRowsEmbedding, TiedEmbedding


class LoRALinear(nn.Linear):
    """A linear layer with an adapter beside its weight.

    Args:
        linear: The layer to adapt; its weight is shared, not copied.
        rank: Rows of A and columns of B.
        alpha: Strength of the adapter.
        dropout: Proportion of the adapter's inputs that training sets to zero.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float = 0.0) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight
        self.alpha = alpha
        self.dropout = nn.Dropout(dropout)
        self.is_active = True
        new = linear.weight.detach().float().new_empty
        self.lora_a = nn.Parameter(new(rank, linear.in_features).normal_() / math.sqrt(rank))
        self.lora_b = nn.Parameter(new(linear.out_features, rank).zero_())
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] to [..., O]."""
        own = F.linear(x, self.weight)
        if not self.is_active:
            return own
        adapter = F.linear(F.linear(self.dropout(x), self.lora_a), self.lora_b)
        return torch.add(own, adapter, alpha=self.alpha)


def attach(model: NoPEGPT, *, rank: int, alpha: float, dropout: float = 0.0) -> None:
    """Adapt the six matrices of every layer, and train nothing but the adapters.

    Raises:
        UsageError: The model has adapters already, or the rank exceeds a matrix.
    """
    largest = model.config.kv_dimensions
    if rank > largest:
        raise UsageError(f"--rank is {rank}, and the smallest matrix has rank {largest}")
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise UsageError("this model has adapters already: merge them first")
    model.freeze_model_parameters()
    for layer in model.decoder.layers:
        for block in (layer.attention, layer.feed_forward):
            for name, module in list(block.named_children()):
                if isinstance(module, nn.Linear):
                    setattr(block, name, LoRALinear(module, rank, alpha, dropout))


def adapt(
    model: NoPEGPT,
    rank: int,
    *,
    alpha: float = 1.0,
    dropout: float = 0.0,
    precision: torch.dtype,
    new_rows: int,
    embeddings: str,
) -> None:
    """Prepare a model to be tuned by adapters, and what of its embedding is trained beside them.

    Args:
        model: Its matrices stay as they are, and are kept in the precision they are multiplied in.
        rank: As for `attach`, like alpha and dropout.
        precision: Of the matrix products.
        new_rows: Last rows of the embedding that are new.
        embeddings: Which rows are trained: new, all or none.
    """
    attach(model, rank=rank, alpha=alpha, dropout=dropout)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.weight.data = module.weight.data.to(precision)
    if embeddings == "new":
        train_last_rows(model, new_rows)
    elif embeddings == "all":
        model.unfreeze_token_embeddings()


def train_last_rows(model: NoPEGPT, count: int) -> None:
    """Train the last rows of the embedding, and so of the head, and none of the others."""
    assert isinstance(model.token_embeddings, TiedEmbedding)
    model.token_embeddings = LastRowsEmbedding(model.token_embeddings, count)


@contextmanager
def adapters_off(model: NoPEGPT) -> Iterator[None]:
    """Let a model compute as it did before it was tuned."""
    parts = [m for m in model.modules() if isinstance(m, LoRALinear | LastRowsEmbedding)]
    for part in parts:
        part.is_active = False
    try:
        yield
    finally:
        for part in parts:
            part.is_active = True


@torch.no_grad()
def merged(base: dict[str, Tensor], adapter: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """Weights with an adapter folded in.

    Args:
        base: Weights by name; they stay as they are.
        adapter: `lora_a` and `lora_b` beside the names of matrices, the `rows` of the embedding,
            and weights that replace those of their name.
        alpha: Strength of the adapter.

    Returns:
        New weights for those that it changes, the others as they are.
    """
    result = dict(base)
    for name, tensor in adapter.items():
        module, _, part = name.rpartition(".")
        weight = f"{module}.weight"
        if part == "lora_a":
            update = adapter[f"{module}.lora_b"].float() @ tensor.float()
            result[weight] = (base[weight].float() + alpha * update).type_as(base[weight])
        elif part == "rows":
            result[weight] = torch.cat([base[weight][: -len(tensor)], tensor.type_as(base[weight])])
        elif part != "lora_b":
            result[name] = tensor.type_as(base[name])
    return result
