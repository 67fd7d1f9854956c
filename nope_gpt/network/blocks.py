"""The body of the network: blocks on one residual stream.

Each adds grouped-query attention and a two-layer SiLU MLP to the stream, each behind an
RMSNorm.

Shapes: B batch, T tokens, C embedding dimensions, H query heads, G key/value heads,
D head dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nope_gpt.config import ModelConfig
from nope_gpt.network.attention import Documents, causal_attention
from nope_gpt.network.caching import Reading
from nope_gpt.network.rotary import turned
from nope_gpt.network.sharpening import Growth

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries, keys and values of new tokens to the heads' outputs, as `Reading.attend` has them."""

NORM_EPSILON = torch.finfo(torch.float32).eps
"""What torch.nn.RMSNorm takes by default in float32; explicit, so that bfloat16 agrees."""


class Decoder(nn.Module):
    """The body of the network: blocks on one residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        blocks = [DecoderBlock(config) for _ in range(config.num_decoder_layers)]
        self.layers: Iterable[DecoderBlock] = nn.ModuleList(blocks)  # type: ignore[assignment]
        self.recomputed: list[bool] = [False] * len(blocks)

    def enable_activation_checkpointing(self, fraction: float = 1.0) -> None:
        """Keep only the input of some blocks and recompute the rest in the backward pass.

        Args:
            fraction: Of the blocks, spread evenly.
        """
        count = len(self.recomputed)
        self.recomputed = [int((i + 1) * fraction) > int(i * fraction) for i in range(count)]

    def set_rotary(self, rotary: bool) -> None:
        """Turn queries and keys by their position, or no longer; in training alone."""
        for layer in self.layers:
            layer.attention.rotary = rotary

    @property
    def growth(self) -> Growth | None:
        """What the scores of attention grow by, the same in every layer."""
        return next(iter(self.layers)).attention.growth

    def set_growth(self, growth: Growth | None) -> None:
        """Let the scores of attention grow with the keys that a token sees, or no longer."""
        for layer in self.layers:
            layer.attention.growth = growth

    def compile_blocks(self) -> None:
        """Fuse what each block does between its matrix products; all share one compilation."""
        for layer in self.layers:
            layer.compile()

    def uncompile_blocks(self) -> None:
        """Undo `compile_blocks`."""
        for layer in self.layers:
            layer._compiled_call_impl = None

    def forward(
        self,
        hidden: Tensor,
        documents: Documents | None = None,
        *,
        reading: Reading | None = None,
        seen: dict[int, Tensor] | None = None,
    ) -> Tensor:
        """[B, T, C] to [B, T, C], for training or into a cache.

        Args:
            hidden: Embeddings.
            documents: Which tokens belong together.
            reading: Into which cache, where that is so.
            seen: Takes what the blocks that it has numbers of make of them.
        """
        if reading:
            for index, layer in enumerate(self.layers):
                hidden = layer(hidden, attend=partial(reading.attend, index))
            return hidden
        for index, layer in enumerate(self.layers):
            if self.recomputed[index] and self.training:
                hidden = checkpoint(layer, hidden, documents, use_reentrant=False)
            else:
                hidden = layer(hidden, documents)
            if seen and index in seen:
                seen[index] = hidden
        return hidden


class DecoderBlock(nn.Module):
    """Attention and an MLP, each normalized at its input and added to the stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.embedding_dimensions, eps=NORM_EPSILON)
        self.attention = SelfAttention(config)
        self.feed_forward_norm = nn.RMSNorm(config.embedding_dimensions, eps=NORM_EPSILON)
        self.feed_forward = FeedForward(config)

    def forward(
        self,
        x: Tensor,
        documents: Documents | None = None,
        *,
        attend: Attend | None = None,
    ) -> Tensor:
        """[B, T, C] to [B, T, C]."""
        x = x + self.attention(self.attention_norm(x), documents, attend)
        return x + self.feed_forward(self.feed_forward_norm(x))  # type: ignore[no-any-return]


class SelfAttention(nn.Module):
    """Grouped-query causal attention without positions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size, kv_size = config.embedding_dimensions, config.kv_dimensions
        self.head_dimensions = config.head_dimensions
        self.dropout = config.dropout
        self.rotary = False
        self.growth: Growth | None = None
        self.q_proj = nn.Linear(size, size, bias=False)
        self.k_proj = nn.Linear(size, kv_size, bias=False)
        self.v_proj = nn.Linear(size, kv_size, bias=False)
        self.out_proj = nn.Linear(size, size, bias=False)

    def forward(self, x: Tensor, documents: Documents | None, attend: Attend | None) -> Tensor:
        """[B, T, C] to [B, T, C], over what `attend` sees, or over the tokens so far."""
        q, k, v = (self.heads(part) for part in self.projections(x))  # [B, H or G, T, D]
        if self.rotary:
            q, k = turned(q), turned(k)
        if attend:
            out = attend(q, k, v)
        else:
            if self.growth:
                q = self.growth.applied(q)
            out = causal_attention(q, k, v, documents, self.dropout if self.training else 0.0)
        return self.out_proj(out)  # type: ignore[no-any-return]

    def projections(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values: in training by one product, if the layers are but weights.

        Joining the weights takes longer than it saves where there are few tokens.
        """
        layers = (self.q_proj, self.k_proj, self.v_proj)
        if not self.training or any(type(layer) is not nn.Linear for layer in layers):
            return tuple(layer(x) for layer in layers)
        weight = torch.cat([layer.weight for layer in layers])
        return torch.split(F.linear(x, weight), [layer.out_features for layer in layers], dim=-1)

    def heads(self, x: Tensor) -> Tensor:
        """Split [B, T, H*D] into heads, [B, H, T, D]."""
        return x.view(*x.shape[:2], -1, self.head_dimensions).transpose(1, 2)


class FeedForward(nn.Module):
    """Two layers with SiLU between them.

    Dropout silences whole tokens, not single neurons: so were the published models trained.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.embedding_dimensions, config.hidden_dimensions, bias=False)
        self.dropout = nn.Dropout1d(config.dropout)
        self.down = nn.Linear(config.hidden_dimensions, config.embedding_dimensions, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] to [B, T, C]."""
        return self.down(self.dropout(F.silu(self.up(x))))  # type: ignore[no-any-return]
