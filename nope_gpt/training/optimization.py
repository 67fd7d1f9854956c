"""Optimizers, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from nope_gpt.config import TrainingConfig

COSINE_FLOOR = 0.1
"""Where the cosine schedule ends, as a fraction of the peak (Hoffmann et al., 2022, App. B)."""


def make_optimizer(model: nn.Module, config: TrainingConfig) -> Optimizer:
    """The optimizer of a run, over the parameters that are trained.

    Matrices decay towards zero, but the embedding, which is the head too, and the
    norms do not.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            is_matrix = weight.dim() == 2 and "token_embeddings" not in name
            (decayed if is_matrix else plain).append(weight)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    rate = config.peak_learning_rate
    if config.optimizer == "adafactor":
        return torch.optim.Adafactor(groups, lr=rate, foreach=not config.low_memory_optimizer)
    fused = not config.low_memory_optimizer
    return torch.optim.AdamW(
        groups, lr=rate, betas=(0.9, 0.95), fused=fused, foreach=False if not fused else None
    )


def learning_rate(step: int, num_steps: int, config: TrainingConfig) -> float:
    """The learning rate of a step, counted from 0.

    1. While warming up it rises linearly, to reach the peak at the end.
    2. Constant: it stays there.
    3. Linear: it falls to zero just after the last step. Cosine: to a tenth.
    """
    peak = config.peak_learning_rate
    warmup = round(config.warmup_fraction * num_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    if config.schedule == "constant":
        return peak
    progress = (step - warmup) / max(num_steps - warmup, 1)
    if config.schedule == "linear":
        return peak * (1.0 - progress)
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak * (COSINE_FLOOR + (1.0 - COSINE_FLOOR) * cosine)
