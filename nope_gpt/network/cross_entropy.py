"""The loss of a tied head without its logits: scored, differentiated and dropped in chunks.

The logits of all tokens are by far the largest tensor of a small model's training step.
Here at most a chunk of them exists at a time, in float32. The gradients of a sum are known
at once, so nothing is computed twice; for a loss of each token they are computed in the
backward pass, from the scores anew.

The vocabulary may come in parts, of which some are trained and others are not.

Shapes: N tokens, C embedding dimensions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nope_gpt.config import CACHED_BYTES, LOSS_CHUNK, LOSS_ROWS

IGNORED = -100
"""A target that is not trained on."""

ALIGNED_ROWS = 64
"""A GPU multiplies bfloat16 fast only where the rows of a matrix begin at multiples, which few
vocabularies are: with this one a step of 408M parameters on an H100 took 72 ms instead of 105.
"""

ToGradient = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""What turns scores into their gradient, as `to_gradient` does."""


def to_gradient(scores: Tensor, targets: Tensor, scales: Tensor | None) -> Tensor:
    """Turn logits [N, V] into the gradient of their losses, in place; returns those [N].

    The gradient is the probabilities, less one at the right token.

    Args:
        scores: Of any dtype; what is between is float32.
        targets: The right tokens [N], or `IGNORED`.
        scales: What each token's loss counts [N], or None for one.
    """
    kept = (targets != IGNORED).float()
    column = targets.clamp_min(0)[:, None]
    # On a GPU log_softmax widens them by itself.
    wide = scores if scores.is_cuda else scores.float()
    logs = torch.log_softmax(wide, dim=-1, dtype=torch.float32)
    right = logs.gather(1, column)
    weights = (kept if scales is None else kept * scales)[:, None]
    scores.copy_(logs.exp_().mul_(weights))
    # By index: on a CPU, to scatter into bfloat16 is to widen all of it.
    rows = torch.arange(len(scores), device=scores.device)
    scores[rows, column[:, 0]] = (right.exp() - 1.0).mul(weights).type_as(scores)[:, 0]
    return right[:, 0].mul(kept).neg()


def num_columns(size: int, device: torch.device, dtype: torch.dtype) -> int:
    """Columns of the scores for a vocabulary of some size."""
    is_aligned = device.type == "cuda" and dtype != torch.float32
    return size + (-size % ALIGNED_ROWS if is_aligned else 0)


def summed_cross_entropy(
    hidden: Tensor,
    parts: Sequence[Tensor],
    targets: Tensor,
    chunk: int = LOSS_CHUNK,
    gradient: ToGradient = to_gradient,
) -> Tensor:
    """Sum the cross entropies of `softmax(hidden @ cat(parts).T)`.

    Args:
        hidden: [N, C].
        parts: Rows of the vocabulary, V together, each [., C]. The products run in autocast's
            dtype, if it is on, the sums always in float32.
        targets: The right tokens [N], or `IGNORED`.
        chunk: Tokens whose logits exist at a time.
        gradient: `to_gradient`, or that compiled.

    Returns:
        The sum in nats [], float32.
    """
    hidden = _as_multiplied(hidden)
    return _applied(SummedCrossEntropy, hidden, parts, targets, chunk, gradient).sum()


def cross_entropies(
    hidden: Tensor,
    parts: Sequence[Tensor],
    targets: Tensor,
    chunk: int = LOSS_CHUNK,
    gradient: ToGradient = to_gradient,
) -> Tensor:
    """The cross entropy of each token, [N] in nats and float32; otherwise as their sum."""
    hidden = _as_multiplied(hidden)
    return _applied(CrossEntropies, hidden, parts, targets, chunk, gradient)


def _as_multiplied(hidden: Tensor) -> Tensor:
    """In the dtype of autocast, if it is on."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return hidden.to(torch.get_autocast_dtype(device))
    return hidden


def _applied(
    function: Any,
    hidden: Tensor,
    parts: Sequence[Tensor],
    targets: Tensor,
    chunk: int,
    gradient: ToGradient,
) -> Tensor:
    """Apply a function, or where no gradients are wanted compute the losses [N]."""
    needs_gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (hidden, *parts))
    with torch.autocast(hidden.device.type, enabled=False):
        if needs_gradients:
            loss: Tensor = function.apply(hidden, targets, chunk, gradient, *parts)
            return loss
        return _losses(hidden, parts, targets, chunk, gradient, None)


class SummedCrossEntropy(torch.autograd.Function):
    """Computes the gradients on the way forward, and scales them on the way back."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        chunk: int,
        gradient: ToGradient,
        *parts: Tensor,
    ) -> Tensor:
        gradients = Gradients(ctx.needs_input_grad, hidden, parts)
        loss = _losses(hidden, parts, targets, chunk, gradient, gradients).sum()
        ctx.save_for_backward(gradients.hidden, *gradients.parts)
        return loss

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, *d_parts = (
            None if gradient is None else gradient * scale.type_as(gradient)
            for gradient in ctx.saved_tensors
        )
        return d_hidden, None, None, None, *d_parts


class CrossEntropies(torch.autograd.Function):
    """Keeps its inputs, and scores them again on the way back."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        chunk: int,
        gradient: ToGradient,
        *parts: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(hidden, targets, *parts)
        ctx.chunk, ctx.gradient = chunk, gradient
        return _losses(hidden, parts, targets, chunk, gradient, None)

    @staticmethod
    def backward(ctx: Any, scales: Tensor) -> tuple[Tensor | None, ...]:
        hidden, targets, *parts = ctx.saved_tensors
        gradients = Gradients(ctx.needs_input_grad, hidden, parts, scales)
        _losses(hidden, parts, targets, ctx.chunk, ctx.gradient, gradients)
        return gradients.hidden, None, None, None, *gradients.parts


class Gradients:
    """Where the gradients go that are asked for: [N, C] and one like each part.

    Args:
        needed: For the hidden states, three that have none, and each part.
        hidden: [N, C].
        parts: Of the vocabulary.
        scales: What each token's loss counts [N], or None for one.
    """

    def __init__(
        self,
        needed: Sequence[bool],
        hidden: Tensor,
        parts: Sequence[Tensor],
        scales: Tensor | None = None,
    ) -> None:
        self.hidden = torch.empty_like(hidden) if needed[0] else None
        self.parts = [
            torch.zeros_like(part) if need else None
            for part, need in zip(parts, needed[4:], strict=True)
        ]
        self.sizes = [len(part) for part in parts]
        self.width = sum(self.sizes)
        self.scales = scales

    def add(self, chunk: slice, scores: Tensor, vocabulary: Tensor, hidden: Tensor) -> None:
        """Take in a chunk: the gradient of its scores, and what they were the products of."""
        if self.hidden is not None:
            self.hidden[chunk] = scores @ vocabulary
        for part, columns in zip(
            self.parts, torch.split(scores[:, : self.width], self.sizes, dim=1), strict=True
        ):
            if part is None:
                continue
            # Some rows at a time, as the product is another matrix, which a CPU widens, too.
            for own, some in zip(
                torch.split(part, LOSS_ROWS), torch.split(columns, LOSS_ROWS, dim=1), strict=True
            ):
                product = some.T @ hidden[chunk]
                own += product if own.is_cuda else product.type_as(own)
                del product


def _losses(
    hidden: Tensor,
    parts: Sequence[Tensor],
    targets: Tensor,
    size: int,
    gradient: ToGradient,
    gradients: Gradients | None,
) -> Tensor:
    """The loss of each token [N], and the gradients where they are wanted."""
    width = sum(map(len, parts))
    vocabulary = _joined(parts, hidden)
    rows = max(CACHED_BYTES.get(hidden.device.type, 1 << 40) // (4 * len(vocabulary)), 1)
    losses = torch.empty(len(hidden), device=hidden.device)
    for start in range(0, len(hidden), size):
        chunk = slice(start, start + size)
        scores = hidden[chunk] @ vocabulary.T
        scores[:, width:] = -torch.inf
        for first in range(0, len(scores), rows):
            some = slice(start + first, min(start + first + rows, start + size))
            scales = gradients.scales[some] if gradients and gradients.scales is not None else None
            losses[some] = gradient(scores[first : first + rows], targets[some], scales)
        if gradients:
            gradients.add(chunk, scores, vocabulary, hidden)
        del scores  # Before those of the next chunk are there.
    return losses


@torch.no_grad()
def _joined(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    """The rows of all parts in one matrix of another's dtype, and below them rows of zeros up to
    `num_columns`.
    """
    size = sum(map(len, parts))
    missing = num_columns(size, like.device, like.dtype) - size
    if len(parts) == 1 and not missing:
        return parts[0].to(like.dtype)
    ends = [like.new_zeros(missing, like.size(1))] if missing else []
    return torch.cat([*parts, *ends], out=like.new_empty(size + missing, like.size(1)))
