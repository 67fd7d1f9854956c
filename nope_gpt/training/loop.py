"""The training loop, to be read at two heights: the run and the step; the micro-batch is below,
in `learner.py`.

Pretraining and tuning differ in their model, their data and what they save; both hand
those over as a `Job`, and everything after is the same.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from nope_gpt.config import TrainingConfig
from nope_gpt.data.batches import Batch, Batches
from nope_gpt.device import autocast, memory_in_use, seed_of
from nope_gpt.errors import Interrupted, NopeError
from nope_gpt.files.writing import write_json
from nope_gpt.hub import storage
from nope_gpt.hub.locating import RUN
from nope_gpt.model import NoPEGPT
from nope_gpt.signals import StopRequest, exit_code_of
from nope_gpt.training import checkpoints, distribution, state
from nope_gpt.training.checkpoints import Progress, Saver, Snapshot, Tensors
from nope_gpt.training.compilation import compiling
from nope_gpt.training.guards import MOST_REWINDS, Verdict, judge
from nope_gpt.training.learner import Learner
from nope_gpt.training.objectives import CrossEntropy, Objective, Outcome, summed
from nope_gpt.training.prefetching import Prefetcher
from nope_gpt.training.reporting import EvaluationReport, Listener, StepReport
from nope_gpt.training.runs import Launch, Run
from nope_gpt.training.sampler import Sampler
from nope_gpt.training.schedules import rate_fraction, sample_length


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
        write_model: Writes the model's files into a checkpoint, from weights by name.
        read_model: Reads back the weights that training changes.
        flops_per_token: Operations to train on one token, for the utilization; None if that
            is not known.
        execution: How the model computes, for people.
        objective: What is made smaller.
        sampler: Continues texts with the model; None for never.
        sample_interval: Steps between samples, 0 for never.
        looks_before: Whether to evaluate, and to continue the texts, before the first step.
        first_token: What every row is to begin with, or None.
        length_growth: Share of the steps in which samples are cut, in ever longer pieces.
        rotary_steps: First steps in which queries and keys are turned by their position.
    """

    model: NoPEGPT
    batches: Batches
    num_steps: int
    eval_interval: int
    checkpoint_interval: int
    precision: torch.dtype
    seed: int
    write_model: Callable[[Path, Tensors], None]
    read_model: Callable[[Path], Tensors]
    flops_per_token: float | None = None
    execution: str = "eager"
    objective: Objective = field(default_factory=CrossEntropy)
    sampler: Sampler | None = None
    sample_interval: int = 0
    looks_before: bool = False
    first_token: int | None = None
    length_growth: float = 0.0
    rotary_steps: int = 0


class Trainer(Learner):
    """Runs a job, alone or as one of several ranks.

    Args:
        job: What to do.
        config: The run's settings.
        run: Where it lives.
        launch: This process among its peers.
        listeners: Told what happens, on the first rank.
        peak_flops: Operations a second that all ranks could do at best, if that is known.
    """

    def __init__(
        self,
        job: Job,
        config: TrainingConfig,
        run: Run,
        launch: Launch,
        listeners: list[Listener],
        peak_flops: float | None,
    ) -> None:
        super().__init__(job.model, job.objective, config, job.precision, launch.ranks)
        self.job = job
        self.run = run
        self.watchdog = launch.watchdog
        self.listeners = listeners
        self.peak_flops = peak_flops
        self.progress = Progress(rotary=job.rotary_steps > 0)
        self.has_dropout = any(
            isinstance(module, nn.Dropout | nn.Dropout1d) and module.p
            for module in job.model.modules()
        )
        self.not_finite = 0
        self.piece_length: int | None = None
        self.samples = Prefetcher(job.batches, self.ranks, self.device)
        self.stop = StopRequest()
        self.stop_signal = 0
        self.last_saved = -1
        self.saver = Saver(
            run.checkpoint_path,
            self.write_model,
            keep=config.keep_checkpoints,
            keep_every=config.keep_every,
            written=lambda path: self.tell("saved", path),
        )
        job.model.decoder.set_rotary(self.progress.rotary)
        if run.resumed_from:
            self.restore(run.resumed_from)

    def train(self) -> None:
        """The run: steps, evaluations and checkpoints until the end or a signal.

        Raises:
            Interrupted: A signal ended the run, after a checkpoint.
            NopeError: The loss is no longer a finite number, or a rank is gone.
        """
        job = self.job
        self.network.train()
        with self.stop, self.watchdog.naming(), compiling(self.stop):
            if job.looks_before and self.progress.step == 0:
                self.look()
            while self.progress.step < job.num_steps and not self.stop_signal:
                self.train_step()
                self.look()
                if self.is_due(job.checkpoint_interval) and not self.not_finite:
                    self.save()
                self.saver.poll()
            self.save()
            self.saver.wait()
        if self.stop_signal and self.progress.step < job.num_steps:
            raise Interrupted(
                f"stopped at step {self.progress.step} of {job.num_steps} by a signal, after "
                f"saving a checkpoint",
                exit_code=exit_code_of(self.stop_signal),
                hint="the same command with --resume goes on",
            )

    def train_step(self) -> None:
        """The step: one update from all micro-batches of all ranks, if they deserve one.

        The loss is the sum over trained tokens, or pairs, divided by their number in the whole
        step, so that accumulation, padding and ranks never change it.
        """
        started = time.perf_counter()
        self.watchdog.beat()
        if self.progress.rotary and self.progress.step >= self.job.rotary_steps:
            self.drop_rotary()
        step = self.progress.data_step
        self.objective.begin(self.progress.step / self.job.num_steps)
        batches = self.micro_batches(step)
        num_tokens = self.sum_over_ranks(sum(batch.num_trained for batch in batches))
        count = self.sum_over_ranks(sum(map(self.job.objective.count, batches)))
        sums: list[Outcome] = []
        for index, batch in enumerate(batches):
            self.seed_dropout(step, index)
            is_last = index == len(batches) - 1
            with distribution.synchronizing(self.network, self.config, is_last):
                sums.append(self.forward_backward(batch, count))
            self.watchdog.beat()
        loss, norm = self.mean([each.loss for each in sums], count), self.clipped_norm().item()
        recent = self.progress.recent_losses
        verdict = self.agree(judge(loss, norm, recent, self.config.loss_spike))
        if verdict != Verdict.UPDATE:
            self.complain(verdict, loss, norm)
        self.not_finite = self.not_finite + 1 if verdict == Verdict.NOT_FINITE else 0
        if verdict == Verdict.REWIND and self.rewind():
            return
        rate = rate_fraction(self.progress.step, self.job.num_steps, self.config)
        if verdict <= Verdict.WARN:
            self.update(rate)
        self.forget_gradients()
        seconds = time.perf_counter() - started
        self.progress.step += 1
        self.progress.tokens += int(num_tokens)
        self.progress.seconds += seconds
        figures = {
            name: self.mean([outcome.figures[name] for outcome in sums], count)
            for name in self.job.objective.figures
        }
        self.report(loss, norm, rate, num_tokens / seconds, figures)

    def micro_batches(self, data_step: int) -> list[Batch]:
        """The samples of a step, in pieces while they grow."""
        job, batches = self.job, self.samples.micro_batches(data_step)
        if job.length_growth:
            whole = batches[0].tokens.size(1)
            length = sample_length(self.progress.step, job.num_steps, whole, job.length_growth)
            if self.piece_length not in (None, length):  # Another loss, not a spike.
                self.progress.recent_losses.clear()
            self.piece_length = length
            batches = [batch.in_pieces(length) for batch in batches]
        return [batch.beginning_with(job.first_token) for batch in batches]

    def drop_rotary(self) -> None:
        """Let queries and keys be as they are from now on; the loss jumps, and comes back."""
        self.progress.rotary = False
        self.progress.recent_losses.clear()
        self.job.model.decoder.set_rotary(False)
        self.tell("noticed", f"step {self.progress.step + 1}: positions are dropped from here on")

    def mean(self, sums: list[Tensor], count: float) -> float:
        """What sums of all micro-batches of all ranks come to for each that is counted."""
        return distribution.total(torch.stack(sums).sum()).item() / count

    def complain(self, verdict: Verdict, loss: float, norm: float) -> None:
        """Say what is wrong with a step; raises when it was the last one too many.

        Raises:
            NopeError: It was; says what to try.
        """
        ids = self.job.batches.sample_indices(self.progress.data_step).tolist()
        shown = ", ".join(map(str, ids[:8])) + (", ..." if len(ids) > 8 else "")
        done = "" if verdict == Verdict.WARN else "; nothing was updated"
        most = self.config.max_non_finite_steps
        what = (
            f"step {self.progress.step + 1}: the loss is {loss:.4g} and the gradient norm "
            f"{norm:.4g}{done} (samples {shown})"
        )
        if verdict == Verdict.NOT_FINITE and self.not_finite + 1 >= most:
            sound = "resume with a lower --learning-rate: the last checkpoint is sound"
            begin = f"begin another run, --run-name {self.config.run_name}-2, with a lower one"
            raise NopeError(
                f"{what}, {most} times in a row",
                where=str(self.run.path),
                hint=sound if self.last_saved > 0 else f"{begin}: --learning-rate",
            )
        self.tell("noticed", what)

    def rewind(self) -> bool:
        """Go back to the last checkpoint, and leave out the samples trained on since.

        Raises:
            NopeError: The run was rewound too often.
        """
        if self.progress.rewinds == MOST_REWINDS:
            raise NopeError(
                f"the loss jumped again after {MOST_REWINDS} times of rewinding",
                where=str(self.run.path),
                hint="resume with a lower --learning-rate, or with --loss-spike warn",
            )
        self.saver.wait()
        newest = checkpoints.newest(self.run.checkpoint_path) or self.run.resumed_from
        checkpoint = distribution.shared(newest)
        if checkpoint is None:
            return False
        next_samples, rewinds = self.progress.data_step + 1, self.progress.rewinds + 1
        self.forget_gradients()
        self.restore(checkpoint)
        self.progress.left_out = next_samples - self.progress.step
        self.progress.rewinds = rewinds
        self.tell("rewound", self.progress.step)
        return True

    def restore(self, checkpoint: Path) -> None:
        """Go on from a checkpoint: weights, optimizer and progress."""
        state.put_back_weights(self.job.model, self.job.read_model(checkpoint))
        tensors = checkpoints.read_tensors(checkpoint / checkpoints.OPTIMIZER)
        state.put_back_optimizers(self.job.model, self.optimizers, tensors)
        self.progress = checkpoints.read_progress(checkpoint)
        self.job.model.decoder.set_rotary(self.progress.rotary)
        self.last_saved = self.progress.step

    def look(self) -> None:
        """Evaluate and show what the model writes, if that is due."""
        job = self.job
        if self.is_due(job.eval_interval):
            self.evaluate()
        if job.sampler and job.sample_interval and self.is_due(job.sample_interval):
            self.show_samples(job.sampler)

    def evaluate(self) -> None:
        """Compute the loss of the hold-out, shared among the ranks."""
        objective = self.job.objective
        own = summed(
            objective,
            self.network,
            (
                batch.beginning_with(self.job.first_token)
                for batch in self.samples.holdout(self.config.num_eval_samples)
            ),
            self.job.precision,
            self.interrupted,
        )
        sums = {name: self.sum_over_ranks(value) for name, value in own.items()}
        if self.stop_signal:
            return
        if not sums["count"]:
            self.tell("noticed", "the data set has no hold-out, so there is nothing to evaluate on")
            return
        report = EvaluationReport(
            step=self.progress.step,
            objective=objective.name,
            loss=sums[objective.name] / sums["count"],
            tokens=int(sums["tokens"]),
            figures={name: sums[name] / sums["count"] for name in objective.figures},
        )
        self.tell("evaluated", report)

    def show_samples(self, sampler: Sampler) -> None:
        """Let the model continue texts; all ranks compute, the first one tells."""
        self.network.eval()
        with autocast(self.device, self.job.precision):
            text = sampler.continued(self.network, self.progress.step)
        self.network.train()
        self.tell("sampled", self.progress.step, text)

    def save(self) -> None:
        """Begin to write a checkpoint, unless this step has one; training goes on meanwhile."""
        if self.last_saved == self.progress.step:
            return
        self.last_saved = self.progress.step
        weights, tensors = state.gathered(self.job.model, self.optimizers)
        if self.ranks.is_first:
            self.saver.save(Snapshot(copy.deepcopy(self.progress), weights, tensors))

    def write_model(self, directory: Path, snapshot: Snapshot) -> None:
        """Write the model's files into a checkpoint, and what made it."""
        self.job.write_model(directory, snapshot.model)
        if snapshot.progress.rotary:
            storage.mark_rotary(directory)
        write_json(directory / RUN, self.run.record)

    def report(
        self, loss: float, norm: float, rate: float, speed: float, figures: dict[str, float]
    ) -> None:
        """Tell of a step that is done."""
        flops, peak = self.job.flops_per_token, self.peak_flops
        report = StepReport(
            step=self.progress.step,
            objective=self.job.objective.name,
            loss=loss,
            figures=figures,
            gradient_norm=norm,
            learning_rate=rate * self.config.peak_learning_rate,
            tokens_per_second=speed,
            tokens=self.progress.tokens,
            seconds=self.progress.seconds,
            utilization=flops * speed / peak if flops and peak else None,
            memory=memory_in_use(self.device),
        )
        self.tell("stepped", report)

    def tell(self, event: str, *facts: object) -> None:
        """Tell the listeners; only the first rank has any."""
        for listener in self.listeners:
            getattr(listener, event)(*facts)

    def is_due(self, interval: int) -> bool:
        """Whether something happens after this step: every so often, and at the end."""
        step = self.progress.step
        return step % interval == 0 or step >= self.job.num_steps

    def agree(self, verdict: Verdict) -> Verdict:
        """The sternest verdict of any rank; hears of a signal to any rank on the way."""
        sternest, self.stop_signal = distribution.largest(
            [verdict, int(self.stop.signal)], self.device
        )
        return Verdict(sternest)

    def interrupted(self) -> bool:
        """Whether any rank was asked to stop, while something long goes on."""
        self.watchdog.beat()
        self.agree(Verdict.UPDATE)
        return bool(self.stop_signal)

    def sum_over_ranks(self, value: float) -> float:
        """A number summed over all ranks."""
        return distribution.total_of(value, self.device)

    def seed_dropout(self, step: int, micro_batch: int) -> None:
        """Make what dropout silences a function of the seed and the place in the run."""
        if self.has_dropout:
            place = micro_batch * self.ranks.world_size + self.ranks.rank
            torch.manual_seed(seed_of(self.job.seed, step, place))
