"""The loss of a tied head without its logits: scored, differentiated and dropped in chunks.

The logits of all tokens are by far the largest tensor of a small model's training step.
Here at most a chunk of them exists at a time, in float32, and since the loss is a sum its
gradients are known at once, so nothing is computed twice.

Shapes: N tokens, C embedding dimensions, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORED = -100
"""A target that is not trained on."""

CHUNK = 1024
"""Tokens in a chunk: enough for products at full speed and few sums of the weight's gradient."""

CACHED_BYTES = {"cpu": 4 << 20}
"""Of logits in float32 that a CPU takes at a time, so that its cache holds them throughout."""


def summed_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum the cross entropies of `softmax(hidden @ weight.T)`.

    Args:
        hidden: [N, C].
        weight: Rows of the vocabulary [V, C]. The products run in autocast's dtype, if it is
            on, the sums always in float32.
        targets: The right tokens [N], or `IGNORED`.

    Returns:
        The sum in nats [], float32.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    needs_gradients = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    with torch.autocast(device, enabled=False):
        if needs_gradients:
            apply: Any = SummedCrossEntropy.apply
            return apply(hidden, weight, targets)  # type: ignore[no-any-return]
        return _sums(hidden, weight, targets, None, None)


class SummedCrossEntropy(torch.autograd.Function):
    """Computes the gradients on the way forward, and scales them on the way back."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        needs_hidden, needs_weight, _ = ctx.needs_input_grad
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_weight = torch.zeros_like(weight) if needs_weight else None
        loss = _sums(hidden, weight, targets, d_hidden, d_weight)
        ctx.save_for_backward(d_hidden, d_weight)
        return loss

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        d_hidden, d_weight = ctx.saved_tensors
        return (
            None if d_hidden is None else d_hidden * scale.type_as(d_hidden),
            None if d_weight is None else d_weight * scale,
            None,
        )


def _sums(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    d_hidden: Tensor | None,
    d_weight: Tensor | None,
) -> Tensor:
    """The loss, and its gradients [N, C] and [V, C] where they are to be filled in."""
    vocabulary = weight.to(hidden.dtype)
    rows = max(CACHED_BYTES.get(hidden.device.type, 1 << 40) // (4 * len(weight)), 1)
    loss = torch.zeros((), device=hidden.device)
    for start in range(0, len(hidden), CHUNK):
        chunk = slice(start, start + CHUNK)
        scores = hidden[chunk] @ vocabulary.T
        for first in range(0, len(scores), rows):
            part = slice(first, first + rows)
            loss += _to_gradient(scores[part], targets[chunk][part])
        if d_hidden is not None:
            d_hidden[chunk] = scores @ vocabulary
        if d_weight is not None:
            d_weight += scores.T @ hidden[chunk]
    return loss


def _to_gradient(scores: Tensor, targets: Tensor) -> Tensor:
    """Turn logits [N, V] into the gradient of their loss, in place; returns the loss [].

    The gradient is the probabilities, less one at the right token.
    """
    kept = targets != IGNORED
    column = targets.clamp_min(0)[:, None]
    logs = torch.log_softmax(scores, dim=-1, dtype=torch.float32)
    loss = logs.gather(1, column)[:, 0].mul(kept).sum().neg()
    gradient = logs.exp_().scatter_add_(1, column, logs.new_full(column.shape, -1.0))
    scores.copy_(gradient.mul_(kept[:, None]))
    return loss
