"""Doing a job: tell what is about to happen, train, and explain what goes wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from nope_gpt.config import TrainingConfig
from nope_gpt.device import peak_flops
from nope_gpt.training import distribution
from nope_gpt.training.checkpoints import read_progress
from nope_gpt.training.loop import Job, Trainer
from nope_gpt.training.reporting import Listener, Plan, RunLog
from nope_gpt.training.runs import Launch, Run


def execute(
    job: Job,
    config: TrainingConfig,
    run: Run,
    launch: Launch,
    listeners: list[Listener],
    facts: dict[str, str],
) -> None:
    """Train, and tell the listeners of the first rank.

    Raises:
        Interrupted: A signal ended the run, after a checkpoint.
        NopeError: The loss is no longer a finite number, or a rank is gone.
    """
    peak = peak_flops(launch.device, job.precision)
    plan = plan_of(job, config, run, launch, facts)
    log: Listener = RunLog(run.path, run.record["config"])
    listeners = [log, *listeners] if launch.ranks.is_first else []
    with told(plan, listeners):
        for listener in listeners:
            for complaint in run.passed_over:
                listener.noticed(complaint)
        peak = peak and peak * launch.ranks.world_size
        Trainer(job, config, run, launch, listeners, peak_flops=peak).train()


@contextmanager
def told(plan: Plan, listeners: list[Listener]) -> Iterator[None]:
    """Tell the listeners what is about to happen, and in the end that it is over."""
    with ExitStack() as stack:
        for listener in listeners:
            listener.planned(plan)
            stack.callback(listener.ended)
        yield


def plan_of(
    job: Job, config: TrainingConfig, run: Run, launch: Launch, facts: dict[str, str]
) -> Plan:
    """What is about to happen."""
    count = sum(weight.numel() for weight in job.model.parameters())
    world_size = launch.ranks.world_size
    device = f"{launch.device}, {str(job.precision).removeprefix('torch.')}, {job.execution}"
    return Plan(
        first_step=read_progress(run.resumed_from).step if run.resumed_from else 0,
        num_steps=job.num_steps,
        facts={
            "model": f"{count:,} parameters, vocabulary {job.model.vocabulary_size:,}",
            **facts,
            "recipe": f"{config.optimizer}, learning rate {config.peak_learning_rate:g}, "
            f"{config.schedule}",
            "device": device,
            **({"ranks": distribution.described(config, world_size)} if world_size > 1 else {}),
            "seed": str(job.seed),
            "run": str(run.path),
        },
    )
