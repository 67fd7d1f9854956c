"""Muon: momentum whose update of each matrix is made orthogonal.

After Keller Jordan, "Muon: an optimizer for hidden layers in neural networks" (2024).
Torch has one too, which always orthogonalizes in bfloat16, slow where the hardware has none,
and takes the rows that a rank holds for a whole matrix when the ranks share it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from nope_gpt.config import MATRICES_TOGETHER
from nope_gpt.training.sharding import as_part, part, part_of, whole

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Jordan's coefficients, which drive every singular value to between 0.7 and 1.2."""

ITERATIONS = 5

Group = dict[str, Any]
"""Of an optimizer: its matrices, and the numbers that they move by."""


class Muon(Optimizer):
    """Muon for matrices.

    Args:
        params: Matrices, or groups of them.
        lr: How far each matrix moves, in units of its spectral norm.
        weight_decay: Decoupled.
        momentum: Of the gradient, with Nesterov's look ahead.
        precision: That the updates are made orthogonal in.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        precision: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.precision = precision

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move every matrix that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for weights in alike([weight for weight in group["params"] if weight.grad is not None]):
                self.move(weights, group)

    def move(self, weights: list[Tensor], group: Group) -> None:
        """Move some matrices of one shape."""
        moves = orthogonalized(torch.stack(self.looked_ahead(weights, group["momentum"])))
        # A tall matrix gets a longer step, so that its outputs move as far.
        scale = math.sqrt(max(1.0, weights[0].size(0) / weights[0].size(1)))
        for weight, move in zip(weights, moves, strict=True):
            rows = part(weight)
            rows.mul_(1 - group["lr"] * group["weight_decay"])
            rows.add_(part_of(move, weight), alpha=-group["lr"] * scale)

    def looked_ahead(self, weights: list[Tensor], momentum: float) -> list[Tensor]:
        """Where the gradients go on average, a step from now, whole and in the precision."""
        found = []
        for weight in weights:
            state = self.state[weight]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(weight)
            assert weight.grad is not None
            gradient = part(weight.grad)
            average = part(state["momentum_buffer"]).lerp_(gradient, 1 - momentum)
            # Without a name, so that it is gone before the next one is there.
            found.append(
                whole(as_part(gradient.lerp(average, momentum), weight)).to(self.precision)
            )
        return found


def alike(weights: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """The matrices of each shape, as many at a time as their device is to have."""
    shapes: dict[torch.Size, list[Tensor]] = {}
    for weight in weights:
        shapes.setdefault(weight.shape, []).append(weight)
    for same in shapes.values():
        count = MATRICES_TOGETHER.get(same[0].device.type, 1)
        yield from (same[first : first + count] for first in range(0, len(same), count))


def orthogonalized(x: Tensor) -> Tensor:
    """Matrices [M, ., .] with their singular values near 1, by a Newton-Schulz iteration."""
    a, b, c = QUINTIC
    is_one = len(x) == 1  # Of it a CPU would make copies as a batch.
    x, multiplied = (x[0], torch.addmm) if is_one else (x, torch.baddbmm)
    is_tall = x.size(-2) > x.size(-1)
    x = x.mT if is_tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        polynomial = multiplied(gram, gram, gram, beta=b, alpha=c)
        x = multiplied(x, polynomial, x, beta=a)
    x = x.mT if is_tall else x
    return x[None] if is_one else x
