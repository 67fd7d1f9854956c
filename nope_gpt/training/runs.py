"""A run's directory: its resolved config, its logs and its checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from nope_gpt import __version__
from nope_gpt.artifacts import DAMAGE, is_leftover, write_json
from nope_gpt.config import TrainingConfig
from nope_gpt.device import Ranks, draw_seed, resolve_device
from nope_gpt.errors import NopeError, UsageError
from nope_gpt.locating import RUN, checkpoints_in
from nope_gpt.training import checkpoints, distribution
from nope_gpt.training.reporting import Listener, Plan, RunLog

if TYPE_CHECKING:
    from nope_gpt.training.loop import Job

C = TypeVar("C", bound=TrainingConfig)


@dataclass(frozen=True)
class Run:
    """Where a run lives.

    Attributes:
        path: Its directory.
        checkpoint_path: The directory of its checkpoints.
        resumed_from: The checkpoint to go on from, or None to begin.
    """

    path: Path
    checkpoint_path: Path
    resumed_from: Path | None

    @property
    def progress(self) -> checkpoints.Progress:
        if self.resumed_from is None:
            return checkpoints.Progress()
        return checkpoints.read_progress(self.resumed_from)


def run_path(root: str, name: str) -> Path:
    """The directory of a run."""
    if not name or Path(name).name != name:
        raise UsageError(f"--run-name is {name!r}, and must be a plain name")
    return Path(root).expanduser() / name


def name_of(config: TrainingConfig) -> str:
    """The flags that name a run."""
    root = config.run_dir_path
    elsewhere = "" if root == TrainingConfig.run_dir_path else f"--run-dir-path {root} "
    return f"{elsewhere}--run-name {config.run_name}"


def checkpoint_path(config: TrainingConfig) -> Path:
    """The directory of a run's checkpoints, seen from the run's own."""
    if config.checkpoint_path is None:
        return Path("checkpoints")
    path = Path(config.checkpoint_path).expanduser().absolute()
    return path.with_suffix("") if path.suffix == ".pt" else path


def stored_record(path: Path, command: str) -> dict[str, Any]:
    """What run.json says, or nothing where there is no run.

    Raises:
        UsageError: It is a run of another command.
        NopeError: The file is damaged.
    """
    file = path / RUN
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except DAMAGE as error:
        raise NopeError(f"this run's settings cannot be read: {error}", where=str(file)) from None
    if not isinstance(record, dict) or not isinstance(record.get("config"), dict):
        raise NopeError("this run's settings are damaged", where=str(file))
    if record.get("command") != command:
        raise UsageError(
            f"this is a run of nope {record.get('command')}",
            where=str(path),
            hint="choose another --run-name",
        )
    return record


def open_run(config: TrainingConfig, facts: dict[str, Any], resume: bool) -> Run:
    """Begin a run, or go on with one.

    Args:
        config: Resolved, its seed included.
        facts: What must not change while the run goes on: model, tokenizer, data.
        resume: Go on from the newest valid checkpoint, if there is one.

    Raises:
        UsageError: The run exists and is not to be resumed, or its facts changed.
    """
    path = run_path(config.run_dir_path, config.run_name)
    stored = stored_record(path, config.command)
    if stored and not resume:
        raise UsageError(
            "this run already exists",
            where=str(path),
            hint=f"go on with it: nope {config.command} {name_of(config)} --resume; "
            f"or begin another: --run-name {config.run_name}-2",
        )
    if stored:
        check_facts(stored.get("facts", {}), facts, path)
    record = {
        "command": config.command,
        "version": __version__,
        "checkpoints": str(checkpoint_path(config)),
        "config": config.as_dict(),
        "facts": facts,
    }
    directory = path / checkpoint_path(config)
    newest = checkpoints.newest(directory) if stored else None
    if not stored and checkpoints_in(directory):
        raise UsageError(
            "there are checkpoints of another run here",
            where=str(directory),
            hint="choose another --checkpoint-path",
        )
    for leftover in filter(is_leftover, directory.glob("step-*")):
        shutil.rmtree(leftover, ignore_errors=True)
    write_json(path / RUN, record)
    return Run(path, directory, newest)


@contextmanager
def launched(config: C) -> Iterator[tuple[C, Ranks, torch.device]]:
    """Join the other ranks, if torchrun started any, and settle the seed for all of them.

    Gives the config with its seed, this rank, and its device.

    Raises:
        UsageError: There is no such device, or the ranks cannot share a step evenly.
    """
    ranks = Ranks.from_environment()
    device = resolve_device(config.device, ranks)
    distribution.refuse_uneven(config.gradient_accumulation_steps, ranks)
    with distribution.process_group(ranks, device):
        if config.seed is None:
            config = config.changed(seed=distribution.shared(draw_seed()))
        yield config, ranks, device


def begin(config: TrainingConfig, facts: dict[str, Any], resume: bool, ranks: Ranks) -> Run:
    """Open the run on the first rank, which alone writes, and tell the others."""
    outcome: Run | NopeError | None = None
    if ranks.is_first:
        try:
            outcome = open_run(config, facts, resume)
        except NopeError as error:
            outcome = error
    outcome = distribution.shared(outcome)
    assert outcome is not None
    if isinstance(outcome, NopeError):
        raise outcome
    return outcome


@contextmanager
def tell_plan(
    job: Job,
    config: TrainingConfig,
    run: Run,
    ranks: Ranks,
    listeners: list[Listener],
    facts: dict[str, str],
) -> Iterator[list[Listener]]:
    """Tell the listeners what is about to happen, and in the end that it is over.

    Gives the listeners of this rank: only the first has any.
    """
    if not ranks.is_first:
        yield []
        return
    first = run.progress.step
    hearing = [RunLog(run.path, first), *listeners]
    count = sum(weight.numel() for weight in job.model.parameters())
    plan = Plan(
        first_step=first,
        num_steps=job.num_steps,
        facts={
            "model": f"{count:,} parameters, vocabulary {job.model.vocabulary_size:,}",
            **facts,
            "recipe": f"{config.optimizer}, learning rate {config.peak_learning_rate:g}, "
            f"{config.schedule}",
            "device": f"{job.model.device}, {str(job.precision).removeprefix('torch.')}",
            "seed": str(job.seed),
            "run": str(run.path),
        },
    )
    try:
        for listener in hearing:
            listener.planned(plan)
        yield hearing
    finally:
        for listener in hearing:
            listener.ended()


def check_facts(before: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    """Refuse to go on with another model, tokenizer or data set."""
    for name, value in now.items():
        if before.get(name) != value:
            raise UsageError(
                f"the {name} changed since the run began: it was {before.get(name)}, "
                f"and is now {value}",
                where=str(path),
                hint="begin another run with --run-name",
            )
