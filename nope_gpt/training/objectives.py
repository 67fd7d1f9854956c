"""What training makes smaller: the loss of a micro-batch, and what to count it in.

A step's loss is the sum over its micro-batches divided by the number of what they hold, of all
ranks, so that accumulation, packing and ranks never change it.

Shapes: B batch, T tokens, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nope_gpt.adaptation import lora
from nope_gpt.data.batches import Batch
from nope_gpt.device import autocast
from nope_gpt.model import NoPEGPT
from nope_gpt.network.cross_entropy import IGNORED
from nope_gpt.network.recall import before_each
from nope_gpt.training.reporting import CROSS_ENTROPY


class Outcome(NamedTuple):
    """Of a micro-batch.

    Attributes:
        loss: The sum of its losses [].
        figures: Sums of other figures by name.
        beside: What is made smaller too, though it is not the loss [], or None.
    """

    loss: Tensor
    figures: dict[str, Tensor]
    beside: Tensor | None = None


class Objective(Protocol):
    """What training makes smaller."""

    @property
    def name(self) -> str:
        """Of the mean loss, for people."""
        ...

    @property
    def figures(self) -> tuple[str, ...]:
        """Names of the other figures."""
        ...

    def begin(self, done: float) -> None:
        """Be told before each step which share of them is done."""
        ...

    def count(self, batch: Batch) -> int:
        """How many losses are summed."""
        ...

    def outcome(self, network: nn.Module, batch: Batch) -> Outcome:
        """Compute a micro-batch."""
        ...


class CrossEntropy:
    """That of the tokens the model is to write."""

    name = CROSS_ENTROPY
    figures: tuple[str, ...] = ()

    def begin(self, done: float) -> None: ...

    def count(self, batch: Batch) -> int:
        return batch.num_trained

    def outcome(self, network: nn.Module, batch: Batch) -> Outcome:
        return Outcome(network(batch.tokens, batch.targets, batch.documents), {})


class Recalling(CrossEntropy):
    """That of the next token, and beside it that of the token before; see `network/recall.py`.

    Args:
        weight: Of the second one at the beginning; it falls evenly to nothing at the end.
    """

    figures = ("Recall Loss",)

    def __init__(self, weight: float) -> None:
        self.weight_at_first = self.weight = weight

    def begin(self, done: float) -> None:
        self.weight = self.weight_at_first * (1.0 - done)

    def outcome(self, network: nn.Module, batch: Batch) -> Outcome:
        both = network(batch.tokens, batch.targets, batch.documents, recalls=True)
        loss, again = both.unbind()
        # The first token of a document has none before it: the mean is of the others.
        asked = (before_each(batch.tokens, batch.documents) != IGNORED).sum().clamp(min=1)
        figure = again.detach() / asked * (batch.targets != IGNORED).sum()
        return Outcome(loss, {"Recall Loss": figure}, self.weight * again)


@dataclass(frozen=True)
class Preference:
    """That the better answer of a pair is preferred more than the untuned model prefers it.

    Rafailov et al., "Direct Preference Optimization", 2023, equation 7: the mean over pairs of
    -log sigmoid(beta * (r_chosen - r_rejected)), where r is the log-probability that the model
    gives an answer less that which it gave it before it was tuned.

    Attributes:
        model: Gives the log-probabilities of before with its adapters left out.
        beta: How dear it is to move away from the untuned model.
        by_length: Divide log-probabilities by the tokens of their answer (Lambert et al.,
            "Tulu 3", 2024, section 5.1.2).
    """

    model: NoPEGPT
    beta: float
    by_length: bool = False
    name = "Preference Loss"
    figures = ("Reward Accuracy", "Reward Margin", "Chosen Reward", "Rejected Reward")

    def begin(self, done: float) -> None: ...

    def count(self, batch: Batch) -> int:
        return batch.num_documents // 2

    def outcome(self, network: nn.Module, batch: Batch) -> Outcome:
        with torch.no_grad(), lora.adapters_off(self.model):
            before = self.log_probabilities(network, batch)
        rewards = self.beta * (self.log_probabilities(network, batch) - before)  # [P, 2]
        chosen, rejected = rewards.unbind(dim=1)
        margin = chosen - rejected
        # A batch that only fills up a rank's share is no pair, and is computed all the same.
        is_pair = self.count(batch) > 0
        values = ((margin > 0).float(), margin, chosen, rejected)
        return Outcome(
            -F.logsigmoid(margin).sum() * is_pair,
            {name: x.detach().sum() for name, x in zip(self.figures, values, strict=True)},
        )

    def log_probabilities(self, network: nn.Module, batch: Batch) -> Tensor:
        """Of both answers of each pair, [P, 2] in nats."""
        tokens, targets, documents, count = batch
        assert documents is not None
        losses: Tensor = network(tokens, targets, documents, each=True).flatten()
        numbers, count = documents.flatten().long(), max(count, 2)
        sums = losses.new_zeros(count).index_add(0, numbers, losses)
        if self.by_length:
            trained = (targets != IGNORED).flatten().float()
            sums = sums / trained.new_zeros(count).index_add(0, numbers, trained).clamp_min(1)
        return -sums.view(-1, 2)


@torch.no_grad()
def summed(
    objective: Objective,
    network: nn.Module,
    batches: Iterable[Batch],
    precision: torch.dtype,
    stop: Callable[[], bool],
) -> dict[str, float]:
    """Sum an objective over batches.

    Args:
        objective: The loss and the other figures.
        network: A NoPEGPT, or what the ranks share of one; left in the mode it was in.
        batches: Micro-batches.
        precision: Of the matrix products.
        stop: Asked before each batch; True ends early.

    Returns:
        The sums of the losses and of the figures by name, how many they are of ("count"), and
        the trained tokens ("tokens").
    """
    was_training = network.training
    network.eval()
    device = next(network.parameters()).device
    sums = dict.fromkeys(("count", "tokens", objective.name, *objective.figures), 0.0)
    for batch in batches:
        if stop():
            break
        with autocast(device, precision):
            outcome = objective.outcome(network, batch.to(device))
        sums["count"] += objective.count(batch)
        sums["tokens"] += batch.num_trained
        sums[objective.name] += outcome.loss.item()
        for name, value in outcome.figures.items():
            sums[name] += value.item()
    network.train(was_training)
    return sums
