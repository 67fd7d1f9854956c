"""The verb `prepare`: sources to data sets of token shards.

    names ──sources──▶ files ──planning──▶ groups ──schedule──▶ units ──commit──▶ NAME/

Everything lies in NAME.partial until it is whole, so that the same command goes on after
any interruption; `staging` tells what is there.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nope_gpt import tokenization
from nope_gpt.artifacts import MANIFEST, writing
from nope_gpt.config import PrepareConfig
from nope_gpt.data.commit import Prepared, commit
from nope_gpt.data.documents import CONTENTS, Document, Refused, Schema, document_of, texts_of
from nope_gpt.data.downloads import Downloads
from nope_gpt.data.encoding import Limit, encode
from nope_gpt.data.planning import (
    Estimate,
    Json,
    base_name,
    difference,
    estimate,
    groups_of,
    nearest_directory,
    num_processes,
    part_of,
    recipe_of,
    source_label,
    without_files,
)
from nope_gpt.data.reading import Selection, Span, rows, schema_in, spans, with_rows_counted
from nope_gpt.data.samples import Sample
from nope_gpt.data.schedule import Group, Progress, Schedule, workers
from nope_gpt.data.shards import Dataset
from nope_gpt.data.sources import File, Request, Source, open_sources
from nope_gpt.data.staging import SUFFIX, Staging
from nope_gpt.data.units import Recipe, Unit, units_of
from nope_gpt.errors import (
    CapacityError,
    Interrupted,
    NetworkError,
    NopeError,
    UsageError,
)
from nope_gpt.signals import StopRequest, exit_code_of
from nope_gpt.tokenization import ChatTokenizer

TRAINING_TEXT = 64 * 1000 * 1000
"""Characters that a byte-pair tokenizer is trained on, at most: the first ones."""

ALL = (0, 1)
"""The one part of one."""

Tell = Callable[[Progress], None]


def prepare(
    names: list[str],
    config: PrepareConfig,
    tell: Tell = lambda _: None,
    *,
    merge: bool = False,
) -> list[Prepared]:
    """Encode sources into a data set for each kind of content in them.

    Args:
        names: Files, directories, `-` for standard input, `python-docs`, or data sets of
            the Hub: `fineweb`, `smoltalk`, `ultrafeedback`, or an id.
        config: Where to, how, and with which tokenizer.
        tell: Called several times a second with how far it is.
        merge: Only join the parts that `--shard` made.

    Returns:
        The data sets; none if this was one of several parts.

    Raises:
        NopeError: A source is missing, empty or damaged.
        Interrupted: A signal ended it; what is finished is kept.
    """
    job = Preparation(names, config, tell)
    part = ALL if merge else part_of(config)
    with job.staging.locked(f"part-{part[0]}-of-{part[1]}", job.note):
        try:
            return job.run(part, merge)
        except KeyboardInterrupt:
            raise job.interrupted(130) from None
        except (NetworkError, CapacityError) as error:
            raise job.with_what_is_kept(error) from None
        finally:
            if part == ALL and not job.staging.is_worth_keeping:
                job.staging.remove()


def dry_run(names: list[str], config: PrepareConfig) -> Estimate:
    """What `prepare` would take, and whether the disk has room for it; nothing is written.

    Raises:
        CapacityError: The disk is too small.
    """
    job = Preparation(names, config, lambda _: None)
    with tempfile.TemporaryDirectory() as spool:
        job.open(Path(spool))
        part, count = part_of(config)
        needed = estimate(job.groups[part::count], job.sources, config, job.keeps_downloads)
    job.refuse_small_disk(needed)
    return needed


def preview(names: list[str], config: PrepareConfig, count: int, tell: Tell) -> list[Sample]:
    """The first documents of each source, encoded; nothing is written but downloads."""
    job = Preparation(names, config, tell)
    samples = []
    with tempfile.TemporaryDirectory() as spool:
        job.open(Path(spool))
        base = tokenization.resolve(config.token_encoding, job.training_texts())
        for source in job.sources:
            left = count
            for document in job.documents([source]):
                if left == 0:
                    break
                tokenizer = base if isinstance(document, str) else ChatTokenizer(base.encoding)
                try:
                    streams, _ = encode(document, tokenizer, job.limit)
                except Refused:
                    continue
                samples.append(Sample(source.name, tokenizer, streams))
                left -= 1
    return samples


class Preparation:
    """One run of `prepare`, on what earlier runs have left.

    Args:
        names: What to prepare.
        config: How.
        tell: Called several times a second with how far it is.
    """

    def __init__(self, names: list[str], config: PrepareConfig, tell: Tell) -> None:
        self.names = names
        self.config = config
        self.tell = tell
        self.progress = Progress()
        self.root = Path(config.dataset_path).expanduser()
        self.base = base_name(names, config)
        self.staging = Staging(self.root / f"{self.base}{SUFFIX}")
        self.limit = Limit(config.max_tokens_per_sample, config.filter_long_samples)
        self.keeps_downloads = config.download_path is not None
        kept = Path(config.download_path).expanduser() if config.download_path else None
        self.downloads = Downloads(kept or self.staging.downloads, self.arrived)
        self.selections: dict[Path, Selection] = {}
        self.uses: Counter[str] = Counter()

    def run(self, part: tuple[int, int], merge: bool) -> list[Prepared]:
        """Do what is left to do."""
        before = self.finished_manifest()
        self.open(self.staging.spool)
        recipe = recipe_of(self.sources, self.config)
        if before and not self.config.overwrite:
            if before.get("recipe") != recipe:
                raise UsageError(
                    f"this data set already exists, and {difference(before.get('recipe'), recipe)}",
                    where=str(self.root / self.base),
                    hint="train on it, choose another --name, or add --overwrite to replace it",
                )
            existing = [self.root / name for name in before["made_with"]]
            if all((path / MANIFEST).is_file() for path in existing):
                self.staging.remove()
                return [Prepared(path, Dataset.open(path).manifest, True) for path in existing]
        self.begin(recipe)
        mine = [] if merge else self.groups[part[0] :: part[1]]
        todo = [group for group in mine if not self.staging.has_group(group.name)]
        self.count(mine, todo)
        targets = self.targets(recipe)
        if todo:
            self.encode(todo, part)
        if part != ALL:
            return []
        return commit(self.staging, self.groups, targets, recipe, self.config, self.schedule)

    def finished_manifest(self) -> Json | None:
        """The manifest of the data set that is there already, if there is one."""
        path = self.root / self.base
        if not path.exists() or (path.is_dir() and not any(path.iterdir())):
            return None
        if not (path / MANIFEST).is_file():
            raise UsageError(
                "this holds something else, and is not replaced",
                where=str(path),
                hint="choose another --name",
            )
        return {} if self.config.overwrite else Dataset.open(path).manifest

    def open(self, spool: Path) -> None:
        """Find the sources; what an earlier run has pinned stays so."""
        earlier = self.staging.plan() or self.finished_manifest() or {}
        self.sources = open_sources(
            Request(
                self.names,
                self.config.text_column,
                self.config.dataset_subset,
                self.config.dataset_split,
                self.config.dataset_revision,
                tuple((earlier.get("recipe") or {}).get("sources", ())),
            ),
            spool,
        )
        self.groups = groups_of(self.sources)

    def begin(self, recipe: Json) -> None:
        """Take up an unfinished preparation of the same, or begin one."""
        plan = self.staging.plan()
        if plan and plan["recipe"] != recipe:
            if without_files(plan["recipe"]) == without_files(recipe):
                self.staging.forget_groups()  # Units of files that are as before stay.
            elif not self.config.overwrite:
                raise UsageError(
                    f"an unfinished preparation is here, and {difference(plan['recipe'], recipe)}",
                    where=str(self.staging.path),
                    hint="repeat its settings to go on with it, choose another --name, or add "
                    "--overwrite to begin anew",
                )
            else:
                self.staging.clear()
        self.staging.begin({"recipe": recipe})

    def targets(self, recipe: Json) -> dict[str, Path]:
        """Where the data set of each content goes: the first has the plain name.

        Raises:
            UsageError: Something else is there.
        """
        found = set()
        for source in self.sources:
            for file in source.files[: None if source.files[0].schema else 1]:
                schema = file.schema or self.schema_of(file, self.fetch(file))
                found.add(schema.content)
        contents = [content for content in CONTENTS if content in found]
        result: dict[str, Path] = {}
        for content in contents:
            name = self.base
            if result:
                label = self.base if self.config.name else source_label(self.names, self.config)
                name = f"{label}-{content}{self.base.removeprefix(label)}"
            path = result[content] = self.root / name
            if name == self.base or self.config.overwrite or not path.exists():
                continue
            if Dataset.open(path).manifest.get("recipe") != recipe:
                raise UsageError(
                    "this already exists",
                    where=str(path),
                    hint="choose another --name, or add --overwrite to replace it",
                )
        return result

    def encode(self, todo: list[Group], part: tuple[int, int]) -> None:
        """Encode the groups of this machine that are not encoded yet."""
        self.refuse_small_disk(estimate(todo, self.sources, self.config, self.keeps_downloads))
        self.make_tokenizer()
        self.choose_rows(part)
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
        self.uses.update(file.digest for group in todo for file in group.files)
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
            fetch=self.fetch,
            discard=self.discard,
            cancel=self.downloads.stopped.set,
            plan=self.plan,
            select=lambda span: self.selections.get(span.path),
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
            error.hint = f"{error.hint}; {kept}, and the same command goes on"
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

    def fetch(self, file: File) -> Path:
        """Where a file lies; downloads it first if need be."""
        if file.path is not None:
            return file.path
        assert file.remote is not None
        return self.downloads.fetch(file.remote)

    def discard(self, file: File) -> None:
        """Remove a downloaded file that is encoded."""
        self.uses[file.digest] -= 1  # Two sources may have files with the same bytes.
        if file.remote is not None and not self.keeps_downloads and not self.uses[file.digest]:
            self.downloads.path_of(file.remote).unlink(missing_ok=True)

    def schema_of(self, file: File, path: Path) -> Schema:
        """What the rows of a file are."""
        return file.schema or schema_in(path, self.config.text_column)

    def spans_of(self, file: File, path: Path) -> list[Span]:
        """The spans of a file that is here."""
        return spans(path, file.name, file.shown, self.schema_of(file, path))

    def plan(self, group: Group, paths: list[Path]) -> list[Unit]:
        """The units of a group whose files are here."""
        cut: list[Span] = []
        for file, path in zip(group.files, paths, strict=True):
            parts = self.spans_of(file, path)
            cut += with_rows_counted(parts) if path in self.selections else parts
        return units_of(group.source, list(group.files), cut)

    def make_tokenizer(self) -> None:
        """Save the tokenizer where the processes find it, training it if need be."""
        directory = self.staging.tokenizer
        if (directory / tokenization.FILES[0]).is_file():
            return
        tokenizer = tokenization.resolve(self.config.token_encoding, self.training_texts())
        with writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
        tokenizer.save(directory)

    def training_texts(self) -> Iterator[str]:
        """The beginning of the corpus, for a tokenizer to learn from."""
        remaining = TRAINING_TEXT
        for document in self.documents(self.sources):
            for text in texts_of(document):
                yield text
                remaining -= len(text)
            if remaining <= 0:
                return

    def documents(self, sources: list[Source]) -> Iterator[Document]:
        """The documents of sources, from the first file on."""
        for source in sources:
            for file in source.files:
                for span in self.spans_of(file, self.fetch(file)):
                    for _, row in rows(span):
                        try:
                            yield document_of(row, span.schema)
                        except Refused:
                            continue

    def choose_rows(self, part: tuple[int, int]) -> None:
        """Choose the rows of those sources of which only a share is wanted."""
        for source in self.sources:
            if source.share.is_whole:
                continue
            if source.share.cap is not None and part != ALL:
                raise UsageError(
                    "a number of rows (@) counts over all files, and --shard sees a part of them",
                    where=source.name,
                    hint="use a weight, such as NAME:0.5",
                )
            paths = [self.fetch(file) for file in source.files]
            counts = [
                sum(span.num_rows for span in with_rows_counted(self.spans_of(file, path)))
                for file, path in zip(source.files, paths, strict=True)
            ]
            self.selections |= source.share.selections(source.files, paths, counts)

    def refuse_small_disk(self, needed: Estimate) -> None:
        """Check that what is still to be written fits on the disk.

        Raises:
            CapacityError: It does not.
        """
        free = shutil.disk_usage(nearest_directory(self.root)).free
        if needed.disk_bytes > free:
            raise CapacityError(
                f"about {needed.disk_bytes / 1e9:,.1f} GB are needed on this disk, and "
                f"{free / 1e9:,.1f} GB are free",
                where=str(self.root),
                hint="free some space, choose another --dataset-path or a smaller --dataset-subset",
            )
