"""One run of `prepare`, on what earlier runs have left."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nope_gpt import tokenization
from nope_gpt.config import PrepareConfig
from nope_gpt.data.commit import Prepared, commit
from nope_gpt.data.corpus import Corpus
from nope_gpt.data.documents import CONTENTS, texts_of
from nope_gpt.data.downloads import Downloads
from nope_gpt.data.encoding import Limit
from nope_gpt.data.opening import Request, open_sources
from nope_gpt.data.planning import (
    WHOLE,
    Json,
    base_name,
    difference,
    estimate,
    has_same_plan,
    num_processes,
    part_of,
    recipe_of,
    refuse_small_disks,
    source_label,
)
from nope_gpt.data.schedule import Group, Progress, Schedule, workers
from nope_gpt.data.shards import TOLD, Dataset
from nope_gpt.data.sources import STANDARD_INPUT
from nope_gpt.data.staging import SUFFIX, Staging
from nope_gpt.data.units import Recipe, tokenizer_in
from nope_gpt.errors import Interrupted, NopeError, UsageError
from nope_gpt.files.artefacts import MANIFEST, is_kind
from nope_gpt.files.writing import writing
from nope_gpt.signals import StopRequest, exit_code_of

TRAINING_TEXT = 64 * 1000 * 1000
"""Characters that a byte-pair tokenizer is trained on, at most: the first ones."""

Tell = Callable[[Progress], None]


class Preparation:
    """One run of `prepare`, on what earlier runs have left.

    Args:
        names: What to prepare.
        config: How.
        tell: Called several times a second with how far it is.
        merge: Only join the parts that `--shard` made.
    """

    def __init__(
        self, names: list[str], config: PrepareConfig, tell: Tell, *, merge: bool = False
    ) -> None:
        self.names = names
        self.config = config
        self.tell = tell
        self.merge = merge
        self.progress = Progress()
        self.root = Path(config.dataset_path).expanduser()
        self.base = base_name(names, config)
        self.staging = Staging(self.root / f"{self.base}{SUFFIX}")
        self.was_there = self.staging.path.exists()
        mine = part_of(config)  # Which refuses a --shard that is none.
        self.part, self.part_origin = (WHOLE, "") if merge else mine
        self.limit = Limit(config.max_tokens_per_sample, config.filter_long_samples)
        kept = Path(config.download_path).expanduser() if config.download_path else None
        self.downloads = Downloads(kept or self.staging.downloads, self.arrived)

    def run(self) -> list[Prepared]:
        """Do what is left to do."""
        self.refuse_parts()
        before = self.finished_manifest()
        self.open(self.staging.spool)
        recipe = recipe_of(self.corpus.sources, self.config)
        if before and not self.config.overwrite:
            if before.get("recipe") != recipe:
                raise UsageError(
                    f"this data set already exists, and {difference(before.get('recipe'), recipe)}",
                    where=str(self.root / self.base),
                    hint="train on it, choose another --name, or add --overwrite to replace it",
                )
            existing = [self.root / name for name in before["made_with"]]
            if all(made_by(recipe, path) for path in existing):
                plan = self.staging.plan()
                if self.part == WHOLE and (plan is None or plan["recipe"] == recipe):
                    self.staging.remove()  # What a kill in the middle of that has left.
                return [Prepared(path, Dataset.open(path).manifest, True) for path in existing]
        self.begin(recipe)
        index, count = self.part
        mine = [] if self.merge else self.corpus.groups[index::count]
        todo = [group for group in mine if not self.staging.has_group(group.name)]
        self.count(mine, todo)
        self.targets([], recipe)
        if todo:
            self.encode(todo)
        if self.part != WHOLE:
            return []
        groups = self.corpus.groups
        place = functools.partial(self.targets, recipe=recipe)
        return commit(self.staging, groups, place, recipe, self.config, self.schedule, self.note)

    def refuse_parts(self) -> None:
        """Check that this part fits to what is to be prepared, and to the other parts.

        Raises:
            UsageError: It does not.
        """
        index, count = self.part
        if count == 1 and not self.part_origin:
            return
        if self.part_origin:
            self.note(f"part {index} of {count}, from {self.part_origin}")
        if STANDARD_INPUT in self.names and count > 1:
            raise UsageError(
                "standard input cannot be shared out",
                where=self.part_origin or f"--shard {self.config.shard}",
                hint="save it to a file first, or prepare all of it: --shard 0/1",
            )
        earlier = (self.staging.plan() or {}).get("parts", count)
        if self.part_origin and earlier != count:
            raise UsageError(
                f"this was begun in {earlier} parts, and {self.part_origin} say {count}",
                where=str(self.staging.path),
                hint=f"say which part it is: --shard I/{earlier}",
            )

    def clear_up(self) -> None:
        """Remove an unfinished preparation that holds nothing yet, unless others are at it."""
        is_own = self.part == WHOLE and not (self.merge and self.was_there)
        is_empty = is_own and not self.staging.is_worth_keeping
        if is_empty and not self.staging.others_prepare(self.part):
            self.staging.remove()

    def finished_manifest(self) -> Json | None:
        """The manifest of the data set that is there already, if there is one."""
        path = self.root / self.base
        if not path.exists() or (path.is_dir() and not any(path.iterdir())):
            return None
        refuse_other_things(path)
        if self.config.overwrite:
            return {}
        try:
            return Dataset.open(path).with_keys(TOLD).manifest
        except NopeError as error:
            error.hint = error.hint or "add --overwrite to replace it"
            raise

    def open(self, spool: Path) -> None:
        """Find the sources; what an earlier run has pinned stays so."""
        earlier = self.staging.plan() or {}
        if self.config.overwrite != earlier.get("overwrite", False):
            earlier = {}  # What is begun anew takes the newest.
        if not earlier and not self.config.overwrite:
            earlier = self.finished_manifest() or {}
        request = Request(
            self.names,
            self.config.text_column,
            self.config.dataset_subset,
            self.config.dataset_split,
            self.config.dataset_revision,
            tuple((earlier.get("recipe") or {}).get("sources", ())),
        )
        self.corpus = Corpus(
            open_sources(request, spool, self.note),
            self.config.text_column,
            self.downloads,
            self.staging,
            keeps_downloads=self.config.download_path is not None,
        )

    def begin(self, recipe: Json) -> None:
        """Take up an unfinished preparation of the same, or begin one.

        Raises:
            UsageError: One with other settings is here, and is not to be replaced.
        """
        plan = self.staging.plan()
        if plan and plan["recipe"] != recipe:
            if self.staging.others_prepare(self.part):
                raise UsageError(
                    f"others prepare this, and {difference(plan['recipe'], recipe)}",
                    where=str(self.staging.path),
                    hint="repeat their settings, or choose another --name",
                )
            if has_same_plan(plan["recipe"], recipe):
                self.staging.forget_groups()  # Units of files that are as before stay,
                if not recipe["settings"]["tokenizer_fingerprint"]:
                    self.staging.clear()  # unless their tokenizer follows from all files.
            elif self.config.overwrite or not self.staging.has_units:
                self.staging.clear()
            else:
                raise UsageError(
                    f"an unfinished preparation is here, and {difference(plan['recipe'], recipe)}",
                    where=str(self.staging.path),
                    hint="repeat its settings to go on with it, choose another --name, or add "
                    "--overwrite to begin anew",
                )
        count = self.part[1]
        parts = {"parts": count} if count > 1 else {}
        self.staging.begin({"recipe": recipe, "overwrite": self.config.overwrite} | parts)

    def targets(self, contents: list[str], recipe: Json) -> dict[str, Path]:
        """Where the data set of each content goes: the first has the plain name.

        Args:
            contents: What there is, if it is known; else what the files are known to hold.
            recipe: What the data sets are made by.

        Raises:
            UsageError: Something else is there.
        """
        known = {
            file.schema.content
            for source in self.corpus.sources
            for file in source.files
            if file.schema
        }
        result: dict[str, Path] = {}
        for content in contents or [each for each in CONTENTS if each in known]:
            name = self.base
            if result:
                label = self.base if self.config.name else source_label(self.names, self.config)
                name = f"{label}-{content}{self.base.removeprefix(label)}"
            path = result[content] = self.root / name
            if not path.exists() or (path.is_dir() and not any(path.iterdir())):
                continue
            refuse_other_things(path)
            if not self.config.overwrite and not made_by(recipe, path):
                raise UsageError(
                    "this already exists",
                    where=str(path),
                    hint="choose another --name, or add --overwrite to replace it",
                )
        return result

    def encode(self, todo: list[Group]) -> None:
        """Encode the groups of this machine that are not encoded yet."""
        needed = estimate(todo, self.config, self.downloads)
        refuse_small_disks(needed, self.root, self.downloads.directory)
        self.make_tokenizer()
        self.corpus.count_rows()
        width = num_processes(todo, self.config)
        with StopRequest() as stop, workers(width) as executor:

            def tick() -> None:
                self.tell(self.progress)
                if stop.signal:
                    raise self.interrupted(exit_code_of(stop.signal))

            self.schedule(executor, width, tick).run(todo)

    def count(self, mine: list[Group], todo: list[Group]) -> None:
        """Set the progress to what is done already."""
        progress = self.progress
        progress.size = sum(group.size for group in mine)
        progress.done = progress.size - sum(group.size for group in todo)
        progress.files = sum(len(group.files) for group in mine)
        progress.files_done = progress.files - sum(len(group.files) for group in todo)
        progress.download_size = sum(
            file.size for group in todo for file in group.files if file.remote
        )

    def schedule(
        self, executor: Any, width: int, tick: Callable[[], None] = lambda: None
    ) -> Schedule:
        """What encodes, set up for this preparation."""
        return Schedule(
            self.staging,
            Recipe(self.staging.tokenizer, self.limit, self.config.holdout_fraction),
            executor,
            width,
            fetch=self.corpus.fetch,
            discard=self.corpus.discard,
            cancel=self.downloads.stopped.set,
            plan=self.corpus.units_of,
            progress=self.progress,
            tick=tick,
            finish=not self.config.deduplicate,
        )

    def interrupted(self, exit_code: int) -> Interrupted:
        """What to say when a signal ends the work."""
        if self.staging.is_worth_keeping:
            where = f"what is finished is kept in {self.staging.path}"
            return Interrupted(where, exit_code=exit_code, hint="the same command goes on")
        return Interrupted("stopped before anything was finished", exit_code=exit_code)

    def with_what_is_kept(self, error: NopeError) -> NopeError:
        """An error that also says what is safe on disk."""
        if self.staging.is_worth_keeping:
            done, files = self.progress.files_done, self.progress.files
            kept = f"{done:,} of {files:,} files are encoded and kept in {self.staging.path}"
            kept = f"{kept}, and the same command goes on"
            error.hint = f"{error.hint}; {kept}" if error.hint else kept
        return error

    def note(self, text: str) -> None:
        """Say something once."""
        self.progress.notes.append(text)
        self.tell(self.progress)

    def arrived(self, num_bytes: int, note: str) -> None:
        """Hear of a download, from whichever thread."""
        self.progress.downloaded += num_bytes
        if note:
            self.progress.notes.append(note)
        if threading.current_thread() is threading.main_thread():
            self.tell(self.progress)

    def make_tokenizer(self) -> None:
        """Save the tokenizer where the processes find it, training it if need be."""
        directory = self.staging.tokenizer
        tokenizer_in.cache_clear()  # An earlier run in this process may have had another there.
        with self.staging.exclusively():
            if (directory / tokenization.FILES[0]).is_file():
                return
            tokenizer = tokenization.resolve(self.config.token_encoding, self.training_texts())
            with writing(directory):
                directory.mkdir(parents=True, exist_ok=True)
            tokenizer.save(directory)

    def training_texts(self) -> Iterator[str]:
        """The beginning of the corpus, for a tokenizer to learn from."""
        remaining = TRAINING_TEXT
        for source in self.corpus.sources:
            for document in self.corpus.documents(source):
                for text in texts_of(document):
                    yield text
                    remaining -= len(text)
                if remaining <= 0:
                    return


def refuse_other_things(path: Path) -> None:
    """Check that what lies in a place is a data set, so that it may be replaced.

    Raises:
        UsageError: It is something else.
    """
    if not is_kind(path, "dataset"):
        raise UsageError(
            "this holds something else, and is not replaced",
            where=str(path),
            hint="choose another --name",
        )


def made_by(recipe: Json, path: Path) -> bool:
    """Whether a data set is there that was made by a recipe."""
    return (path / MANIFEST).is_file() and Dataset.open(path).manifest.get("recipe") == recipe
