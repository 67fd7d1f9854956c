"""Checkpoints: `step-N/` directories that are models, with what resuming needs beside.

A checkpoint holds the published files (config.json, model.safetensors, the tokenizer),
`optimizer.safetensors`, `state.json`, and where adapters were trained those by themselves. Nothing
is pickled, and nothing depends on the number of ranks.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from nope_gpt.errors import MissingError, NopeError
from nope_gpt.files.artefacts import FORMAT_VERSION, publish, read_manifest
from nope_gpt.files.json_files import DAMAGE, check, read_json
from nope_gpt.files.writing import refuse_small_disk, write_json, write_tensors
from nope_gpt.hub import storage
from nope_gpt.hub.history import STATE
from nope_gpt.hub.locating import Tell, checkpoints_in, newest_checkpoint, step_of, untold

OPTIMIZER = "optimizer.safetensors"

STATE_PATTERN = {
    **dict.fromkeys(("step", "tokens", "left_out", "rewinds"), int),
    "seconds": float,
    "recent_losses": [float],
    "rotary": bool,
}

Tensors = dict[str, Tensor]


@dataclass
class Progress:
    """How far a run has come; with the seed, all that the order of the samples needs.

    Attributes:
        step: Steps done.
        tokens: Trained on.
        seconds: Of training.
        left_out: Steps' worth of samples that rewinding has left out.
        rewinds: How often the run was rewound.
        recent_losses: Of the last steps, for telling a spike.
        rotary: Whether queries and keys are turned by their position for now.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    left_out: int = 0
    rewinds: int = 0
    recent_losses: list[float] = field(default_factory=list)
    rotary: bool = False

    @property
    def data_step(self) -> int:
        """Which step's samples come next."""
        return self.step + self.left_out


@dataclass(frozen=True)
class Snapshot:
    """A moment of a run, in memory that nothing else writes to.

    Attributes:
        progress: How far the run had come.
        model: The weights by name.
        optimizer: The optimizers' tensors, each by the name of its weight and its own.
    """

    progress: Progress
    model: Tensors
    optimizer: Tensors

    @property
    def size(self) -> int:
        """Bytes that it takes on the disk, nearly."""
        return sum(value.nbytes for part in (self.model, self.optimizer) for value in part.values())


class Saver:
    """Writes checkpoints while training goes on, one at a time.

    Args:
        directory: Of the checkpoints.
        write_model: Writes the model's files into a directory.
        keep: Newest checkpoints to keep, at least 2.
        keep_every: Also keep those of every so many steps.
        written: Told of each checkpoint, in the thread that asks.
    """

    def __init__(
        self,
        directory: Path,
        write_model: Callable[[Path, Snapshot], None],
        *,
        keep: int,
        keep_every: int | None,
        written: Callable[[Path], None],
    ) -> None:
        self.directory = directory
        self.write_model = write_model
        self.keep = keep
        self.keep_every = keep_every
        self.written = written
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self.pending: Future[Path] | None = None

    def save(self, snapshot: Snapshot) -> None:
        """Begin to write a checkpoint, when the one before is written.

        Raises:
            CapacityError: The disk is full, now or for the one before; the older
                checkpoints are whole.
        """
        self.wait()
        refuse_small_disk(self.directory, snapshot.size, "a checkpoint", "--checkpoint-path")
        self.pending = self.thread.submit(self.write, snapshot)

    def wait(self) -> None:
        """Wait until what was begun is written; raises what that raised."""
        if self.pending:
            pending, self.pending = self.pending, None
            self.written(pending.result())

    def poll(self) -> None:
        """Tell of a checkpoint that has been written meanwhile."""
        if self.pending and self.pending.done():
            self.wait()

    def write(self, snapshot: Snapshot) -> Path:
        """Write a checkpoint whole, then remove those that are not to be kept."""
        step = snapshot.progress.step
        path = self.directory / f"step-{step}"
        manifest: dict[str, Any] = {
            "kind": "checkpoint",
            "format_version": FORMAT_VERSION,
            "step": step,
        }
        with publish(path, manifest=manifest, overwrite=True) as temporary:
            self.write_model(temporary, snapshot)
            write_tensors(temporary / OPTIMIZER, snapshot.optimizer)
            write_json(temporary / STATE, asdict(snapshot.progress))
        read_manifest(path, "checkpoint")
        prune(self.directory, step, self.keep, self.keep_every)
        return path


def prune(directory: Path, step: int, keep: int, keep_every: int | None = None) -> None:
    """Remove all but the newest checkpoints up to a step, and those of an abandoned future.

    What lies beyond the step is damaged or was rewound from, or the run would have gone on
    from there. Damaged ones do not count among those that are kept.
    """
    found = sorted(checkpoints_in(directory), key=step_of, reverse=True)
    kept = [path for path in found if step_of(path) <= step and is_whole(path)]
    for path in found:
        is_kept_for_good = keep_every and step_of(path) % keep_every == 0 and step_of(path) <= step
        if path not in kept[:keep] and not is_kept_for_good:
            shutil.rmtree(path, ignore_errors=True)  # What another process reads goes next time.


def is_whole(checkpoint: Path) -> bool:
    """Whether every file is there in its size."""
    try:
        return bool(read_manifest(checkpoint, "checkpoint"))
    except NopeError:
        return False


def newest(directory: Path, tell: Tell = untold) -> Path | None:
    """The newest valid checkpoint, or None where there is none at all.

    Args:
        directory: Of the checkpoints.
        tell: Told of newer ones that are damaged.

    Raises:
        MissingError: There are some, and all are damaged.
    """
    if not checkpoints_in(directory):
        return None
    return newest_checkpoint(directory, tell)


def set_aside(directory: Path, newest: Path) -> None:
    """Give checkpoints beyond the newest valid one a name that counts no more."""
    for path in checkpoints_in(directory):
        if step_of(path) > step_of(newest):
            place = path.with_name(f"{path.name}.damaged")
            shutil.rmtree(place, ignore_errors=True)
            path.rename(place)


def read_progress(checkpoint: Path) -> Progress:
    """How far the run had come.

    Raises:
        NopeError: The file is damaged.
    """
    try:
        found = asdict(Progress()) | read_json(checkpoint / STATE)
        check(found, STATE_PATTERN)
        return Progress(**found)
    except DAMAGE as error:
        reason = f"{type(error).__name__}: {error}"
        raise NopeError(
            f"the state of this run cannot be read ({reason})", where=str(checkpoint / STATE)
        ) from None


def read_tensors(path: Path) -> Tensors:
    """Read what resuming needs beside the model.

    Raises:
        MissingError: It is not there.
        NopeError: It is damaged.
    """
    if not path.is_file():
        raise MissingError("this checkpoint cannot be resumed from", where=str(path))
    return dict(storage.read_tensors(path))
