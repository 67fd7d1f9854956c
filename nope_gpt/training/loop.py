"""The training loop, to be read at three heights: the run, the step, the micro-batch.

Pretraining and tuning differ in their model, their data and what they save; both hand
those over as a `Job`, and everything after is the same.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from nope_gpt.config import TrainingConfig
from nope_gpt.data.batches import Batch, Batches
from nope_gpt.device import Ranks, autocast, seed_of
from nope_gpt.errors import Interrupted, NopeError
from nope_gpt.evaluation import summed_loss
from nope_gpt.model import NoPEGPT
from nope_gpt.signals import StopRequest, exit_code_of
from nope_gpt.training import checkpoints, distribution
from nope_gpt.training.optimization import make_optimizers, schedule, set_learning_rate
from nope_gpt.training.reporting import EvaluationReport, Listener, StepReport
from nope_gpt.training.runs import Run


@dataclass(frozen=True)
class Job:
    """What is to be trained, on what, and for how long.

    Attributes:
        model: On its device, with `requires_grad` set on what is trained.
        batches: Where micro-batches come from.
        num_steps: Updates of the weights, those before a resume included.
        eval_interval: Steps between evaluations.
        checkpoint_interval: Steps between checkpoints.
        precision: Of the matrix products.
        seed: Of what dropout silences.
        write_model: Writes the model's files into a checkpoint.
    """

    model: NoPEGPT
    batches: Batches
    num_steps: int
    eval_interval: int
    checkpoint_interval: int
    precision: torch.dtype
    seed: int
    write_model: Callable[[Path], None]


class Trainer:
    """Runs a job, alone or as one of several ranks."""

    def __init__(
        self, job: Job, config: TrainingConfig, run: Run, ranks: Ranks, listeners: list[Listener]
    ) -> None:
        self.job = job
        self.config = config
        self.run = run
        self.ranks = ranks
        self.listeners = listeners
        self.device = job.model.device
        self.progress = run.progress
        self.optimizers = make_optimizers(job.model, config)
        if run.resumed_from:
            tensors = checkpoints.read_tensors(run.resumed_from / checkpoints.OPTIMIZER)
            checkpoints.load_optimizer_state(job.model, self.optimizers, tensors)
        self.network: nn.Module = distribution.distribute(job.model, ranks, self.device)
        self.trained = [weight for weight in job.model.parameters() if weight.requires_grad]
        self.stop = StopRequest()
        self.last_saved = self.progress.step if run.resumed_from else -1

    def train(self) -> None:
        """The run: steps, evaluations and checkpoints until the end or a signal.

        Raises:
            Interrupted: A signal ended the run, after a checkpoint.
            NopeError: The loss is no longer a finite number.
        """
        job = self.job
        self.network.train()
        with self.stop:
            while self.progress.step < job.num_steps and not self.stop_requested():
                report = self.train_step()
                for listener in self.listeners:
                    listener.stepped(report)
                if self.is_due(job.eval_interval):
                    self.evaluate()
                if self.is_due(job.checkpoint_interval):
                    self.save()
            self.save()
            number = self.stop_requested()
        if number and self.progress.step < job.num_steps:
            raise Interrupted(
                f"stopped at step {self.progress.step} of {job.num_steps} by a signal, after "
                f"saving a checkpoint",
                exit_code=exit_code_of(number),
                hint="the same command with --resume goes on",
            )

    def train_step(self) -> StepReport:
        """The step: one update from all micro-batches of all ranks.

        The loss is the sum over trained tokens divided by their number in the whole step,
        so that accumulation, padding and ranks never change it.
        """
        started = time.perf_counter()
        step = self.progress.step
        batches = self.job.batches.micro_batches(step, self.ranks.rank, self.ranks.world_size)
        num_trained = self.sum_over_ranks(sum(batch.num_trained for batch in batches))
        loss = torch.zeros((), device=self.device)
        for index, batch in enumerate(batches):
            self.seed_dropout(step, index)
            is_last = index == len(batches) - 1
            with distribution.without_sync(self.network, is_last):
                loss += self.forward_backward(batch, num_trained)
        loss_value = distribution.total(loss).item()
        norm = nn.utils.clip_grad_norm_(self.trained, self.config.max_gradient_norm).item()
        self.refuse_non_finite(loss_value, norm)
        fraction = schedule(step, self.job.num_steps, self.config)
        set_learning_rate(self.optimizers, fraction)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - started
        self.progress.step += 1
        self.progress.tokens += int(num_trained)
        self.progress.seconds += seconds
        return StepReport(
            step=self.progress.step,
            loss=loss_value,
            gradient_norm=norm,
            learning_rate=fraction * self.config.peak_learning_rate,
            tokens_per_second=num_trained / seconds,
            tokens=self.progress.tokens,
            seconds=self.progress.seconds,
        )

    def forward_backward(self, batch: Batch, num_trained: float) -> Tensor:
        """The micro-batch: add its gradients; returns its share of the step's loss."""
        tokens = batch.tokens.to(self.device, non_blocking=True)
        targets = batch.targets.to(self.device, non_blocking=True)
        with autocast(self.device, self.job.precision):
            loss: Tensor = self.network(tokens, targets) / num_trained
        # The ranks' gradients are averaged, and the loss is a sum over them.
        torch.autograd.backward(loss * self.ranks.world_size)
        return loss.detach()

    def evaluate(self) -> None:
        """Compute the loss of the hold-out, shared among the ranks."""
        holdout = self.job.batches.holdout(
            self.config.num_eval_samples, self.ranks.rank, self.ranks.world_size
        )
        total, count = summed_loss(
            self.job.model, holdout, self.job.precision, lambda: bool(self.stop_requested())
        )
        total, count = self.sum_over_ranks(total), int(self.sum_over_ranks(count))
        if count and not self.stop_requested():
            report = EvaluationReport(self.progress.step, total / count, count)
            for listener in self.listeners:
                listener.evaluated(report)

    def save(self) -> None:
        """Write a checkpoint, unless this step has one."""
        if self.last_saved == self.progress.step:
            return
        self.last_saved = self.progress.step
        if self.ranks.is_first:
            path = checkpoints.save(
                self.run.checkpoint_path,
                self.progress,
                self.job.write_model,
                checkpoints.optimizer_state(self.job.model, self.optimizers),
                self.config.keep_checkpoints,
            )
            for listener in self.listeners:
                listener.saved(path)

    def is_due(self, interval: int) -> bool:
        """Whether something happens after this step: every so often, and at the end."""
        step = self.progress.step
        return step % interval == 0 or step >= self.job.num_steps

    def stop_requested(self) -> int:
        """The signal that asks any rank to stop, or 0."""
        return distribution.anywhere(int(self.stop.signal), self.device)

    def sum_over_ranks(self, value: float) -> float:
        """A number summed over all ranks."""
        return distribution.total_of(value, self.device)

    def seed_dropout(self, step: int, micro_batch: int) -> None:
        """Make what dropout silences a function of the seed and the place in the run."""
        if self.job.model.config.dropout:
            place = micro_batch * self.ranks.world_size + self.ranks.rank
            torch.manual_seed(seed_of(self.job.seed, step, place))

    def refuse_non_finite(self, loss: float, norm: float) -> None:
        """Stop before an update that would destroy the weights."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NopeError(
                f"the loss is {loss} and the gradient norm {norm} in step "
                f"{self.progress.step + 1}; nothing was updated",
                where=str(self.run.path),
                hint="resume with a lower --learning-rate: the last checkpoint is sound",
            )
