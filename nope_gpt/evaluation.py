"""How well a model predicts text that it was not trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from nope_gpt.data.batches import Batch
from nope_gpt.device import autocast
from nope_gpt.model import NoPEGPT


@torch.no_grad()
def summed_loss(
    model: NoPEGPT,
    batches: Iterable[Batch],
    precision: torch.dtype = torch.float32,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[float, int]:
    """Sum the cross entropy over batches.

    Args:
        model: Left in the mode it was in.
        batches: Tokens and targets.
        precision: Of the matrix products.
        stop: Asked before each batch; True ends early.

    Returns:
        The sum in nats and the number of tokens it is over.
    """
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for batch in batches:
        if stop():
            break
        with autocast(model.device, precision):
            loss = model(batch.tokens.to(model.device), batch.targets.to(model.device))
        total += loss.item()
        count += batch.num_trained
    model.train(was_training)
    return total, count
