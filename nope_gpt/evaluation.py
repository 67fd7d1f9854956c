"""How well a model predicts text that it was not trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from nope_gpt.data.batches import Batch
from nope_gpt.device import autocast


@torch.no_grad()
def summed_loss(
    network: nn.Module,
    batches: Iterable[Batch],
    precision: torch.dtype = torch.float32,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[float, int]:
    """Sum the cross entropy over batches.

    Args:
        network: A NoPEGPT, or what the ranks share of one; left in the mode it was in.
        batches: Tokens and targets.
        precision: Of the matrix products.
        stop: Asked before each batch; True ends early.

    Returns:
        The sum in nats and the number of tokens it is over.
    """
    was_training = network.training
    network.eval()
    device = next(network.parameters()).device
    total, count = 0.0, 0
    for batch in batches:
        if stop():
            break
        with autocast(device, precision):
            loss = network(*batch.to(device))
        total += loss.item()
        count += batch.num_trained
    network.train(was_training)
    return total, count
