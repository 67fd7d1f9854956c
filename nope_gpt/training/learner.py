"""What a training step does to a network: gradients, their norm, and the weights moved."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nope_gpt.config import TrainingConfig
from nope_gpt.data.batches import Batch
from nope_gpt.device import Ranks, autocast
from nope_gpt.model import NoPEGPT
from nope_gpt.training import distribution
from nope_gpt.training.objectives import Objective, Outcome
from nope_gpt.training.optimization import make_optimizers, set_learning_rate
from nope_gpt.training.sharding import whole


class Learner:
    """A network with its optimizers.

    Args:
        model: On its device, with `requires_grad` set on what is trained.
        objective: What is made smaller.
        config: The run's settings.
        precision: Of the matrix products.
        ranks: This process among its peers.
    """

    def __init__(
        self,
        model: NoPEGPT,
        objective: Objective,
        config: TrainingConfig,
        precision: torch.dtype,
        ranks: Ranks,
    ) -> None:
        self.config = config
        self.ranks = ranks
        self.objective = objective
        self.precision = precision
        self.device = model.device
        self.network = distribution.distribute(model, config, ranks, self.device)
        self.optimizers = make_optimizers(model, config, precision)
        self.trained = [weight for weight in model.parameters() if weight.requires_grad]

    def forward_backward(self, batch: Batch, count: float) -> Outcome:
        """The micro-batch: add its gradients; returns its sums.

        Args:
            batch: On any device.
            count: What the sums of the whole step are divided by.
        """
        with autocast(self.device, self.precision):
            outcome = self.objective.outcome(self.network, batch.to(self.device))
        # The ranks' gradients are averaged, and the loss is a sum over them.
        whole = outcome.loss if outcome.beside is None else outcome.loss + outcome.beside
        torch.autograd.backward(whole * (self.ranks.world_size / count))
        return Outcome(outcome.loss.detach(), outcome.figures)

    def clipped_norm(self) -> Tensor:
        """Clip the gradients of all ranks together; returns their norm before, []."""
        norm = nn.utils.clip_grad_norm_(self.trained, self.config.max_gradient_norm)
        return whole(norm)

    def update(self, rate: float) -> None:
        """Move the weights, at a fraction of the peak learning rate."""
        set_learning_rate(self.optimizers, rate)
        for optimizer in self.optimizers:
            optimizer.step()

    def forget_gradients(self) -> None:
        """Begin the next step's gradients at nothing.

        Those of DDP stay where they are: in its buckets, beside which others would be made.
        """
        in_buckets = isinstance(self.network, DistributedDataParallel)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=not in_buckets)
