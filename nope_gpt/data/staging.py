"""The unfinished data sets of a preparation: NAME.partial, which a killed one goes on from.

    plan.json           what is being prepared; another plan never uses these files
    tokenizer/          the tokenizer, trained or not
    spool/              what was piped in
    downloads/          files on their way, and whole ones that are not encoded yet
    work/               what processes have encoded of units that are not finished
    units/NAME.json     a finished unit: its shards and counts
    groups/00000.json   files whose units are all finished
    rows.json           how many rows there are in files of which a share is taken
    text/ chat/ ...     the data sets, complete but for their manifests

Records are renamed into place after what they tell of is on the disk, so each is true.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from nope_gpt.errors import NopeError, UsageError
from nope_gpt.files.json_files import DAMAGE, read_json
from nope_gpt.files.writing import sync, write_json, writing

SUFFIX = ".partial"
POLL_SECONDS = 0.2

Json = dict[str, Any]

Part = tuple[int, int]
"""The number of a part, from 0, and of how many."""


class Staging:
    """The directory of a preparation.

    Args:
        path: NAME.partial, beside where the data set will be.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.plan_file = path / "plan.json"
        self.tokenizer = path / "tokenizer"
        self.downloads = path / "downloads"
        self.spool = path / "spool"
        self.work = path / "work"
        self.units = path / "units"
        self.groups = path / "groups"
        self.rows_file = path / "rows.json"

    @contextmanager
    def locked(self, part: Part, waiting: Callable[[str], None]) -> Iterator[None]:
        """Have a part of the work to oneself, waiting for another process that has it.

        Args:
            part: Its number, and of how many.
            waiting: Told once that there is another one, or that locks have no effect.

        Raises:
            UsageError: Other processes have parts of another number of them.
        """
        file = self.lock_file(part)
        while True:
            with writing(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
                lock = FileLock(file)
                try:
                    lock.acquire(timeout=0)
                except Timeout:
                    waiting(f"another process prepares {self.path.stem}: waiting until it is done")
                    with contextlib.suppress(FileNotFoundError):
                        lock.acquire(poll_interval=POLL_SECONDS)
                except FileNotFoundError:  # The other process has just cleared up.
                    continue
            if lock.is_locked and file.exists():
                break
            lock.release()
        try:
            if not is_held(file):
                waiting("locks have no effect on this file system: prepare one thing at a time")
            self.refuse_other_parts(part)
            yield
        finally:
            lock.release()
            with contextlib.suppress(OSError):  # Windows removed all but the lock, being held.
                self.path.rmdir()

    def lock_file(self, part: Part) -> Path:
        """What the process that has a part holds a lock on."""
        return self.path / f"part-{part[0]}-of-{part[1]}.lock"

    def refuse_other_parts(self, part: Part) -> None:
        """Check that nobody has a part of another number of them, which would be the same files.

        Raises:
            UsageError: Somebody has.
        """
        for file in self.path.glob("part-*.lock"):
            index, count = (int(number) for number in re.findall(r"\d+", file.name))
            if count == part[1] or not is_held(file):
                continue
            whole = "all of it" if count == 1 else f"part {index} of {count}"
            raise UsageError(
                f"another process prepares {whole}",
                where=str(self.path),
                hint="wait until it is done"
                + ("" if count == 1 else f", or take a part of the same number: --shard I/{count}"),
            )

    def others_prepare(self, part: Part) -> bool:
        """Whether another process has a part."""
        mine = self.lock_file(part)
        return any(is_held(file) for file in self.path.glob("part-*.lock") if file != mine)

    @contextmanager
    def exclusively(self) -> Iterator[None]:
        """Do something that all parts need once, while no other does."""
        with FileLock(self.path / "once.lock", poll_interval=POLL_SECONDS):
            yield

    def plan(self) -> Json | None:
        """What is being prepared, or None if nothing is yet."""
        return read(self.plan_file)

    def begin(self, plan: Json) -> None:
        """Remember what is being prepared."""
        write_json(self.plan_file, plan)

    def has_unit(self, name: str) -> bool:
        """Whether a unit is finished."""
        return (self.units / f"{name}.json").is_file()

    def unit(self, name: str) -> Json:
        """The record of a finished unit."""
        return read(self.units / f"{name}.json") or {}

    def keep_unit(self, record: Json) -> None:
        """Remember that a unit is finished."""
        write_json(self.units / f"{record['unit']}.json", record)

    def has_group(self, name: str) -> bool:
        """Whether all units of a group are finished."""
        return (self.groups / f"{name}.json").is_file()

    def units_in(self, group: str) -> list[str]:
        """The names of the units of a finished group."""
        return list((read(self.groups / f"{group}.json") or {})["units"])

    def keep_group(self, name: str, units: list[str]) -> None:
        """Remember that all units of a group are finished."""
        write_json(self.groups / f"{name}.json", {"units": units})

    def forget_groups(self) -> None:
        """Forget which groups are finished, but no unit: the files have changed."""
        shutil.rmtree(self.groups, ignore_errors=True)

    def has_dataset(self, content: str) -> bool:
        """Whether the data set of a content is here, not yet in its place."""
        return (self.path / content).is_dir()

    def work_of(self, unit: str) -> Path:
        """A new directory for the work files of a unit; what a killed process left is removed."""
        for old in self.work.glob(f"{unit}.*"):
            shutil.rmtree(old, ignore_errors=True)
        path = self.work / f"{unit}.{secrets.token_hex(4)}"
        with writing(path):
            path.mkdir(parents=True)
        return path

    def dataset(self, content: str) -> Path:
        """The directory that becomes the data set of a content."""
        path = self.path / content
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
        return path

    @property
    def has_units(self) -> bool:
        """Whether a unit is finished."""
        return any(self.units.glob("*"))

    @property
    def is_worth_keeping(self) -> bool:
        """Whether something lies here that took time: a finished unit or part of a download."""
        return self.has_units or any(path.is_file() for path in self.downloads.glob("*"))

    def clear(self) -> None:
        """Remove everything that was encoded; what was piped in or downloaded stays."""
        self.plan_file.unlink(missing_ok=True)
        for path in self.path.iterdir():
            if path.is_dir() and path not in (self.spool, self.downloads):
                shutil.rmtree(path)

    def remove(self) -> None:
        """Remove all of it."""
        shutil.rmtree(self.path, ignore_errors=True)
        with contextlib.suppress(OSError):
            sync(self.path.parent)


def is_held(file: Path) -> bool:
    """Whether a process, on whichever machine, holds a lock."""
    try:
        with FileLock(file, timeout=0):
            return False
    except Timeout:
        return True
    except FileNotFoundError:
        return False


def read(path: Path) -> Json | None:
    """Read a record, or None if there is none.

    Raises:
        NopeError: It is damaged.
    """
    try:
        value = read_json(path)
    except FileNotFoundError:
        return None
    except DAMAGE as error:
        raise NopeError(
            f"this record is damaged ({type(error).__name__}: {error})",
            where=str(path),
            hint=f"remove {path.parent.parent} to begin anew",
        ) from None
    return value if isinstance(value, dict) else None
