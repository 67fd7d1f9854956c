"""Optimizers, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from nope_gpt.config import TrainingConfig
from nope_gpt.training.muon import Muon

COSINE_FLOOR = 0.1
"""Where the cosine schedule ends, as a fraction of the peak (Hoffmann et al., 2022, App. B)."""

BESIDE_MUON = 0.3
"""AdamW's learning rate for what Muon leaves to it, as a fraction of Muon's."""


def make_optimizers(model: nn.Module, config: TrainingConfig) -> list[Optimizer]:
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
        foreach = not config.low_memory_optimizer
        groups = [group for group in (decayed, plain) if group["params"]]
        optimizers = [torch.optim.Adafactor(groups, lr=rate, foreach=foreach)]
    elif config.optimizer == "muon" and matrices:
        optimizers = [Muon([decayed], lr=rate), adamw([plain], BESIDE_MUON * rate, config)]
    else:
        optimizers = [adamw([decayed, plain], rate, config)]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def adamw(groups: list[dict[str, Any]], rate: float, config: TrainingConfig) -> Optimizer:
    """AdamW, fused unless memory matters more."""
    groups = [group for group in groups if group["params"]]
    betas = (0.9, 0.95)
    if config.low_memory_optimizer:
        return torch.optim.AdamW(groups, lr=rate, betas=betas, foreach=False)
    return torch.optim.AdamW(groups, lr=rate, betas=betas, fused=True)


def set_learning_rate(optimizers: list[Optimizer], fraction: float) -> None:
    """Set every learning rate to a fraction of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = fraction * group["peak_lr"]


def schedule(step: int, num_steps: int, config: TrainingConfig) -> float:
    """The learning rate of a step, counted from 0, as a fraction of its peak.

    1. While warming up it rises linearly, to reach the peak at the end.
    2. Constant: it stays there.
    3. Linear: it falls to zero just after the last step. Cosine: to a tenth.
    """
    warmup = round(config.warmup_fraction * num_steps)
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(num_steps - warmup, 1)
    if config.schedule == "linear":
        return 1.0 - progress
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return COSINE_FLOOR + (1.0 - COSINE_FLOOR) * cosine
