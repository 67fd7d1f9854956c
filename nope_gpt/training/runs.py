"""A run's directory: its resolved config, its logs and its checkpoints."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from filelock import FileLock, Timeout

from nope_gpt import __version__
from nope_gpt.config import TrainingConfig
from nope_gpt.device import Ranks, draw_seed, resolve_device, reuse_freed_memory
from nope_gpt.errors import MissingError, NopeError, UsageError
from nope_gpt.files.artefacts import read_manifest, verify
from nope_gpt.files.writing import is_leftover, plain, write_file, write_json, writing
from nope_gpt.hub.history import STATE
from nope_gpt.hub.locating import HOLDER, LOCK, RUN, checkpoints_in, read_run, step_of
from nope_gpt.training import checkpoints, distribution
from nope_gpt.training.watchdog import Watchdog

C = TypeVar("C", bound=TrainingConfig)

Resume = bool | Path
"""Whether to go on with a run from its newest valid checkpoint, or the checkpoint to go on from."""


@dataclass(frozen=True)
class Run:
    """Where a run lives.

    Attributes:
        path: Its directory.
        checkpoint_path: The directory of its checkpoints.
        resumed_from: The checkpoint to go on from, or None to begin.
        record: What run.json says.
        passed_over: Newer checkpoints that are damaged, and what is wrong with them.
    """

    path: Path
    checkpoint_path: Path
    resumed_from: Path | None
    record: dict[str, Any]
    passed_over: tuple[str, ...] = ()


def run_path(root: str, name: str) -> Path:
    """The directory of a run.

    Raises:
        UsageError: The name is a path, or has letters that not every system takes.
    """
    if plain(name) != name:
        raise UsageError(
            f"--run-name is {name!r}, and must be a plain name",
            hint="use letters, digits, dots, dashes and underscores",
        )
    return Path(root).expanduser() / name


def naming_flags(config: TrainingConfig) -> str:
    """The flags that name a run."""
    root = config.run_dir_path
    elsewhere = "" if root == TrainingConfig.run_dir_path else f"--run-dir-path {root} "
    return f"{elsewhere}--run-name {config.run_name}"


def checkpoints_for(config: TrainingConfig) -> Path:
    """The directory of a run's checkpoints, seen from the run's own."""
    if config.checkpoint_path is None:
        return Path("checkpoints")
    path = Path(config.checkpoint_path).expanduser().absolute()
    return path.with_suffix("") if path.suffix == ".pt" else path


def stored_record(path: Path, command: str) -> dict[str, Any]:
    """What the run.json of a run or a checkpoint says, or nothing where there is none.

    Raises:
        UsageError: It is of another command.
        NopeError: The file is damaged.
    """
    try:
        record = read_run(path)
    except MissingError:
        return {}
    if record["command"] != command:
        raise UsageError(
            f"this is a run of nope {record['command']}",
            where=str(path),
            hint="choose another --run-name",
        )
    return record


def open_run(
    config: TrainingConfig,
    facts: dict[str, Any],
    origin: dict[str, Any],
    resume: Resume,
    num_steps: int,
) -> Run:
    """Begin a run, or go on with one.

    Args:
        config: Resolved, its seed included.
        facts: What must not change while the run goes on: model, tokenizer, data.
        origin: What the model is made from, for its history.
        resume: Go on from the newest valid checkpoint, if there is one, or from this one.
        num_steps: Where it is to end.

    Raises:
        UsageError: The run exists and is not to be resumed, or its facts changed, or it is
            farther than the checkpoint to go on from or than its end.
    """
    path, stored = check_run(config, facts, resume)  # Again, now that nobody else can open it.
    record = {
        "command": config.command,
        "version": __version__,
        "checkpoints": str(checkpoints_for(config)),
        "config": config.settled().as_dict(),
        "facts": facts,
        **origin,
    }
    directory = path / checkpoints_for(config)
    passed_over: list[str] = []
    chosen = checkpoints.newest(directory, passed_over.append) if stored else None
    if isinstance(resume, Path):
        refuse_future(chosen, resume, config)
        chosen = resume
    if chosen and step_of(chosen) > num_steps:
        raise UsageError(
            f"the run has come to step {step_of(chosen)}, and is to end at step {num_steps}",
            where=str(path),
            hint="raise --max-steps, or leave it out",
        )
    if chosen and passed_over:
        checkpoints.set_aside(directory, chosen)
    for leftover in filter(is_leftover, directory.glob("step-*")):
        shutil.rmtree(leftover, ignore_errors=True)
    if chosen is None or step_of(chosen) < num_steps:
        write_json(path / RUN, record)
    return Run(path, directory, chosen, record, tuple(passed_over))


def refuse_future(newest: Path | None, chosen: Path, config: TrainingConfig) -> None:
    """Refuse to go on before a run's newest checkpoint: the later ones would be overwritten."""
    if newest and step_of(newest) > step_of(chosen):
        raise UsageError(
            f"the run has gone on to {newest.name} after {chosen.name}",
            where=str(newest.parent),
            hint=f"begin another run from there: nope {config.command} --resume {chosen} "
            f"--run-name {config.run_name}-2",
        )


def check_run(
    config: TrainingConfig, facts: dict[str, Any], resume: Resume
) -> tuple[Path, dict[str, Any]]:
    """Where a run lives and what is stored of it, if it may begin or go on; changes nothing.

    Raises:
        UsageError: The run exists and is not to be resumed, or its facts changed.
        NopeError: The checkpoint to go on from is damaged.
    """
    if isinstance(resume, Path):
        verify(resume, read_manifest(resume, "checkpoint"))
        begun_with = stored_record(resume, config.command).get("facts", {})
        check_facts(begun_with, facts, resume)
    path = run_path(config.run_dir_path, config.run_name)
    stored = stored_record(path, config.command)
    if stored and not resume:
        raise UsageError(
            "this run already exists",
            where=str(path),
            hint=f"go on with it: nope {config.command} {naming_flags(config)} --resume; "
            f"or begin another: --run-name {config.run_name}-2",
        )
    if stored:
        check_facts(stored.get("facts", {}), facts, path)
        if stored.get("checkpoints") != str(checkpoints_for(config)):
            raise UsageError(
                f"the checkpoints of this run are in {stored.get('checkpoints')}, and not in "
                f"{checkpoints_for(config)}",
                where=str(path),
                hint="leave --checkpoint-path out",
            )
    directory = path / checkpoints_for(config)
    if not stored and checkpoints_in(directory):
        raise UsageError(
            "there are checkpoints of another run here",
            where=str(directory),
            hint="choose another --checkpoint-path",
        )
    return path, stored


def resumed_from(path: Path, command: str) -> tuple[Resume, list[tuple[str, Mapping[str, Any]]]]:
    """What a run or a checkpoint to go on from means, and the settings it was made with.

    Returns:
        For a run, whether to resume; for a checkpoint, the checkpoint. Then the settings as
        layers, the last of them the run, where it is known.

    Raises:
        MissingError: There is neither a run nor a checkpoint.
        UsageError: It is one of another command.
    """
    stored = stored_record(path, command)
    if not stored:
        raise MissingError(
            "there is neither a run nor a checkpoint to go on from",
            where=str(path),
            hint="give a run, such as runs/NAME, or a checkpoint in one: checkpoints/step-N",
        )
    is_checkpoint = (path / STATE).is_file()
    run = path.absolute().parent.parent if is_checkpoint else path.absolute()
    layers: list[tuple[str, Mapping[str, Any]]] = [(str(path), stored["config"])]
    if stored_record(run, command):
        layers.append((str(run), {"run_dir_path": str(run.parent), "run_name": run.name}))
    return path if is_checkpoint else True, layers


@dataclass(frozen=True)
class Launch:
    """This process among the ranks of a run.

    Attributes:
        ranks: Which one it is, and how many there are.
        device: What it computes on.
        watchdog: Told of everything that gets done.
    """

    ranks: Ranks
    device: torch.device
    watchdog: Watchdog


@contextmanager
def launched(config: C) -> Iterator[tuple[C, Launch]]:
    """Join the other ranks, if torchrun started any, and settle the seed for all of them.

    Gives the config with its seed, and this rank's place.

    Raises:
        UsageError: There is no such device, or the ranks cannot do what is asked.
    """
    ranks = Ranks.from_environment()
    device = resolve_device(config.device, ranks)
    distribution.refuse_impossible(config, ranks)
    if device.type == "cpu":
        reuse_freed_memory()
    with distribution.process_group(ranks, device, config.rank_timeout) as watchdog:
        if config.seed is None:
            config = config.changed(seed=distribution.shared(draw_seed()))
        yield config, Launch(ranks, device, watchdog)


@contextmanager
def begun(
    config: TrainingConfig,
    facts: dict[str, Any],
    origin: dict[str, Any],
    resume: Resume,
    ranks: Ranks,
    num_steps: int,
) -> Iterator[Run]:
    """Open the run on the first rank, which alone writes, and tell the others.

    No other process can open it until this is over.

    Raises:
        NopeError: It may not begin; raised on every rank.
    """
    with ExitStack() as stack:
        outcome: Run | NopeError | None = None
        if ranks.is_first:
            try:
                path, _ = check_run(config, facts, resume)
                stack.enter_context(locked(path))
                if config.checkpoint_path is not None:
                    stack.enter_context(locked(path / checkpoints_for(config)))
                outcome = open_run(config, facts, origin, resume, num_steps)
            except NopeError as error:
                outcome = error
        outcome = distribution.shared(outcome)
        assert outcome is not None
        if isinstance(outcome, NopeError):
            raise outcome
        yield outcome


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep a run for this process alone; the system lets go when the process is gone.

    Raises:
        UsageError: Another process has it; names it.
    """
    holder = path / HOLDER
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(path / LOCK, blocking=False):
            write_file(holder, f"process {os.getpid()} on {platform.node()}".encode())
            try:
                yield
            finally:
                holder.unlink(missing_ok=True)
    except Timeout:
        name = holder.read_text(encoding="utf-8") if holder.is_file() else "another process"
        raise UsageError(
            f"{name} trains this run now",
            where=str(path),
            hint="wait for it, or choose another --run-name",
        ) from None


def check_facts(before: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    """Refuse to go on with another model, tokenizer or data set.

    Raises:
        UsageError: Something else is meant; names it.
    """
    for name, value in now.items():
        if before.get(name) != value:
            raise UsageError(
                f"the {name} changed since the run began: {difference(before.get(name), value)}",
                where=str(path),
                hint="begin another run with --run-name",
            )


def difference(before: Any, now: Any) -> str:
    """What is not as it was, in words; of tables only the entries that differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        return "; ".join(f"{key}: {difference(before.get(key), now.get(key))}" for key in keys)
    shown = [text[:12] if len(text) == 64 else text for text in map(str, (before, now))]
    return "it was {}, and is now {}".format(*shown)
