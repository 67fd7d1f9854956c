"""Muon: momentum whose update of each matrix is made orthogonal.

After Keller Jordan, "Muon: an optimizer for hidden layers in neural networks" (2024).
torch has one too, which always orthogonalizes in bfloat16; most CPUs multiply that many
times slower than float32, so here the precision follows the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

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
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

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
                average = state["momentum_buffer"].lerp_(weight.grad, 1 - momentum)
                update = orthogonalized(weight.grad.lerp(average, momentum))
                # A tall matrix gets a longer step, so that its outputs move as far.
                scale = math.sqrt(max(1.0, weight.size(0) / weight.size(1)))
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update.type_as(weight), alpha=-group["lr"] * scale)


def orthogonalized(matrix: Tensor) -> Tensor:
    """The matrix with its singular values near 1, by a Newton-Schulz iteration."""
    a, b, c = QUINTIC
    x = matrix.bfloat16() if matrix.is_cuda else matrix.float()
    is_tall = x.size(0) > x.size(1)
    x = x.T if is_tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.addmm(x, polynomial, x, beta=a)
    return x.T if is_tall else x
