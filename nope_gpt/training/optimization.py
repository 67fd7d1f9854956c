"""The optimizers of a run."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from nope_gpt.config import TrainingConfig
from nope_gpt.training.adafactor import Adafactor
from nope_gpt.training.muon import Muon

BESIDE_MUON = 0.3
"""AdamW's learning rate for what Muon leaves to it, as a fraction of Muon's."""


def make_optimizers(
    model: nn.Module, config: TrainingConfig, precision: torch.dtype
) -> list[Optimizer]:
    """The optimizers of a run: one, or with Muon two, each for its part of what is trained.

    Matrices decay towards zero, but the embedding, which is the head too, and the norms
    do not. Every group remembers its `peak_lr`, which `set_learning_rate` scales.
    """
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            is_matrix = weight.dim() == 2 and "token_embeddings" not in name
            (matrices if is_matrix else rest).append(weight)
    decayed = {"params": matrices, "weight_decay": config.weight_decay}
    plain = {"params": rest, "weight_decay": 0.0}
    rate = config.peak_learning_rate
    optimizers: list[Optimizer]
    if config.optimizer == "adafactor":
        groups = [group for group in (decayed, plain) if group["params"]]
        optimizers = [Adafactor(groups, lr=rate)]
    elif config.optimizer == "muon" and matrices:
        optimizers = [Muon([decayed], lr=rate, precision=precision)]
        if rest:
            optimizers.append(adamw([plain], BESIDE_MUON * rate))
    else:
        optimizers = [adamw([decayed, plain], rate)]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def adamw(groups: list[dict[str, Any]], rate: float) -> Optimizer:
    """AdamW, fused: it is the fastest, and takes no memory on the way."""
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)


def set_learning_rate(optimizers: list[Optimizer], fraction: float) -> None:
    """Set every learning rate to a fraction of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = fraction * group["peak_lr"]
