"""Muon: momentum whose update of each matrix is made orthogonal.

After Keller Jordan, "Muon: an optimizer for hidden layers in neural networks" (2024).
Torch has one too, which always orthogonalizes in bfloat16, slow where the hardware has none,
and takes the rows that a rank holds for a whole matrix when the ranks share it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from nope_gpt.training.sharding import as_part, part, part_of, whole

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Jordan's coefficients, which drive every singular value to between 0.7 and 1.2."""

ITERATIONS = 5


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
            momentum = group["momentum"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                rows, gradient = part(weight), part(weight.grad)
                average = part(state["momentum_buffer"]).lerp_(gradient, 1 - momentum)
                ahead = as_part(gradient.lerp(average, momentum), weight)
                update = part_of(orthogonalized(whole(ahead), self.precision), weight)
                # A tall matrix gets a longer step, so that its outputs move as far.
                scale = math.sqrt(max(1.0, weight.size(0) / weight.size(1)))
                rows.mul_(1 - group["lr"] * group["weight_decay"])
                rows.add_(update.type_as(rows), alpha=-group["lr"] * scale)


def orthogonalized(matrix: Tensor, precision: torch.dtype) -> Tensor:
    """The matrix with its singular values near 1, by a Newton-Schulz iteration."""
    a, b, c = QUINTIC
    x = matrix.to(precision)
    is_tall = x.size(0) > x.size(1)
    x = x.T if is_tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.addmm(x, polynomial, x, beta=a)
    return x.T if is_tall else x
