"""How spread out attention is, by position.

Where a context grows beyond what was trained, scores that were sharp among few tokens spread over
many; the position from which entropies rise is where the loss does (Wang et al. 2024, figure 1).

Shapes: L layers, H query heads, G key heads, D head dimensions, B batch, T tokens, P positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nope_gpt.model import NoPEGPT
from nope_gpt.network.attention import by_group


@torch.inference_mode()
def attention_entropies(model: NoPEGPT, tokens: Tensor, positions: Tensor) -> Tensor:
    """The entropy of the attention of some tokens, in nats, the mean of the batch.

    Args:
        model: In eval mode.
        tokens: [B, T].
        positions: Of the tokens that attend, each below T [P].

    Returns:
        [L, H, P]. The most a token at position i can have is ln(i + 1).
    """
    found: list[Tensor] = []
    hidden = model.token_embeddings(tokens)
    for layer in model.decoder.layers:
        attention = layer.attention
        projected = attention.projections(layer.attention_norm(hidden))
        q, k, _ = (attention.heads(part) for part in projected)
        if attention.growth:
            q = attention.growth.applied(q)
        found.append(_entropies(q[:, :, positions], k, positions).mean(dim=0))
        hidden = layer(hidden)
    return torch.stack(found)


def _entropies(q: Tensor, k: Tensor, positions: Tensor) -> Tensor:
    """Of queries [B, H, P, D] over the keys [B, G, T, D] up to their own place: [B, H, P]."""
    grouped = by_group(q, k.size(1)).float()
    batch, groups, repeats, count, size = grouped.shape
    keys = k.float()[:, :, None]
    scores = grouped @ keys.mT * size**-0.5
    hidden = torch.arange(k.size(2), device=k.device) > positions[:, None]
    logs = scores.masked_fill(hidden, -torch.inf).log_softmax(dim=-1)
    entropy: Tensor = torch.special.entr(logs.exp()).sum(dim=-1)
    return entropy.view(batch, groups * repeats, count)
