"""Adafactor: an adaptive rate for every weight from the means of its row and column.

After Shazeer and Stern, "Adafactor" (2018), as torch.optim.Adafactor computes it. Torch's
own cannot see a whole matrix when the ranks share it, and asks the GPU for two numbers for
each tensor in each step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from nope_gpt.training.sharding import as_part, part, total

DECAY_POWER = -0.8
"""How fast the averages forget: the newest gradient counts step ** -0.8 (section 7.2)."""

SMALLEST_SCALE = 1e-3
"""A tensor whose weights are smaller moves as if they were this large (section 8)."""


class Adafactor(Optimizer):
    """Adafactor with hardly any state: a row and a column for each matrix.

    Args:
        params: Weights, or groups of them.
        lr: The rate relative to the size of the weights, which 1 / sqrt(step) caps.
        weight_decay: Decoupled.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move every weight that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self.move(weight, weight.grad, group["lr"], group["weight_decay"])

    def move(self, weight: Tensor, gradient: Tensor, lr: float, weight_decay: float) -> None:
        """Update one weight."""
        state, rows, gradient = self.state[weight], part(weight), part(gradient)
        state["step"] = state.get("step", torch.tensor(0.0)) + 1
        step = int(state["step"])
        newest = step**DECAY_POWER
        rate = min(lr, 1 / math.sqrt(step))
        size = total(rows.square().sum(), weight).div(weight.numel()).sqrt()
        if weight_decay:
            rows.mul_(1 - lr * weight_decay)
        square = self.squares(weight, gradient.square(), newest)
        update = square.clamp_min(torch.finfo(rows.dtype).eps ** 2).rsqrt_().mul_(gradient)
        spread = total(update.square().sum(), weight).div(weight.numel()).sqrt()
        rows.sub_(update * (rate * size.clamp_min(SMALLEST_SCALE) / spread.clamp_min(1.0)))

    def squares(self, weight: Tensor, square: Tensor, newest: float) -> Tensor:
        """The running mean of the squared gradient, for a matrix from its rows and columns."""
        state = self.state[weight]
        if square.dim() == 1:
            if "variance" not in state:
                state["variance"] = as_part(torch.zeros_like(square), weight)
            return part(state["variance"]).lerp_(square, newest).clone()
        if "row_var" not in state:
            state["row_var"] = as_part(square.new_zeros(square.size(0), 1), weight)
            state["col_var"] = square.new_zeros(1, square.size(1))
        by_row, by_column = part(state["row_var"]), state["col_var"]
        by_row.lerp_(square.mean(dim=1, keepdim=True), newest)
        column_sum = total(square.sum(dim=0, keepdim=True), weight)
        by_column.lerp_(column_sum / weight.size(0), newest)
        mean = total(by_row.sum(), weight) / weight.size(0)
        estimate: Tensor = (by_row @ by_column) / mean.clamp_min(torch.finfo(square.dtype).eps)
        return estimate
