"""Finished units to data sets in their places: manifests last, then the names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nope_gpt import tokenization
from nope_gpt.config import PrepareConfig
from nope_gpt.data.deduplication import repeated
from nope_gpt.data.documents import CONTENTS, TEXT
from nope_gpt.data.encoding import token_dtype
from nope_gpt.data.planning import num_cores
from nope_gpt.data.report import statistics
from nope_gpt.data.schedule import Group, Schedule, workers
from nope_gpt.data.shards import Dataset
from nope_gpt.data.staging import Json, Staging
from nope_gpt.data.units import HOLDOUT_RULE, Unit, documents_file
from nope_gpt.errors import MissingError, NopeError
from nope_gpt.files.artefacts import FORMAT_VERSION, MANIFEST, describe, replace_directory
from nope_gpt.files.writing import sync, write_json, writing
from nope_gpt.tokenization import BaseTokenizer, ChatTokenizer


@dataclass(frozen=True)
class Prepared:
    """A data set, and whether it was there before."""

    path: Path
    manifest: Json
    existed: bool = False

    @property
    def content(self) -> str:
        return str(self.manifest["content"])

    @property
    def statistics(self) -> Json:
        return dict(self.manifest["statistics"])


def commit(
    staging: Staging,
    groups: list[Group],
    place: Callable[[list[str]], dict[str, Path]],
    recipe: Json,
    config: PrepareConfig,
    schedule: Callable[[Any, int], Schedule],
    note: Callable[[str], None],
) -> list[Prepared]:
    """Give the data sets their manifests and their places.

    A commit that was killed is repeated by the next run: what has its place already is
    left there.

    Args:
        staging: What was encoded.
        groups: All of them, in order.
        place: Says where the data set of each content goes.
        recipe: What they were made by.
        config: How.
        schedule: Makes a schedule for an executor of so many processes.
        note: Told what is left out.

    Raises:
        MissingError: A group is not finished.
        UsageError: Something else is where a data set belongs.
        NopeError: There is nothing to train on.
    """
    found = by_content(finished_units(staging, groups))
    empty = [content for content, mine in found.items() if not documents_in(mine)]
    if len(empty) == len(found):
        records = [record for mine in found.values() for record in mine]
        staging.remove()  # It would end no other way.
        raise nothing(records, [source["name"] for source in recipe["sources"]])
    for content in empty:
        problem = nothing(found.pop(content), [])
        note(f"there is no data set of {content}: {problem.what}")
    targets = place(list(found))
    if config.deduplicate:
        for content, mine in found.items():
            deduplicate(staging, content, mine, config, schedule)
        again = by_content(finished_units(staging, groups))
        found = {content: again[content] for content in targets}
    waiting = [content for content in targets if staging.has_dataset(content)]
    for content in waiting:
        directory = staging.dataset(content)
        manifest = manifest_of(staging, content, found[content], config)
        manifest |= {"made_with": [path.name for path in targets.values()], "recipe": recipe}
        for file in directory.iterdir():
            if file.name not in manifest["files"]:
                file.unlink()
        write_json(directory / MANIFEST, manifest)
    for content in waiting:
        path = targets[content]
        with writing(path):
            replace_directory(staging.path / content, path)
            sync(path.parent)
    staging.remove()
    return [Prepared(path, Dataset.open(path).manifest) for path in targets.values()]


def finished_units(staging: Staging, groups: list[Group]) -> list[Json]:
    """The records of all units, in the order of the files.

    Raises:
        MissingError: A group of files is not encoded yet.
    """
    missing = [group for group in groups if not staging.has_group(group.name)]
    if missing:
        raise MissingError(
            f"{len(missing)} of {len(groups)} groups of files are not encoded yet, the first with "
            f"{missing[0].files[0].name}",
            where=str(staging.path),
            hint="run every --shard I/N to its end, or leave --merge out to encode them here",
        )
    return [staging.unit(name) for group in groups for name in staging.units_in(group.name)]


def by_content(records: list[Json]) -> dict[str, list[Json]]:
    """Records of units, those of each content that there is."""
    present = {record["content"] for record in records}
    return {
        content: [record for record in records if record["content"] == content]
        for content in CONTENTS
        if content in present
    }


def documents_in(records: list[Json]) -> int:
    """Documents that are left to train on."""
    return sum(record["documents"] for record in records)


def nothing(records: list[Json], sources: list[str]) -> NopeError:
    """Why nothing is left to train on."""
    refused: dict[str, Json] = {}
    for record in records:
        for reason, (count, where) in record["refused"].items():
            refused.setdefault(reason, {"count": 0, "first": where})["count"] += count
    reasons = "; ".join(
        f"{entry['count']:,} with {reason} (first: {entry['first']})"
        for reason, entry in refused.items()
    )
    return NopeError(
        f"there is nothing to train on; refused: {reasons}" if refused else "the corpus is empty",
        where=", ".join(sources),
        hint="give files that hold text, or conversations with an answer",
    )


def deduplicate(
    staging: Staging,
    content: str,
    records: list[Json],
    config: PrepareConfig,
    schedule: Callable[[Any, int], Schedule],
) -> None:
    """Finish the units of a content without the documents that repeat an earlier one."""
    tables = [[documents_file(staging.work / work) for work in each["works"]] for each in records]
    todo = [
        (record, dropped)
        for record, dropped in zip(records, repeated(tables), strict=True)
        if "shards" not in record
    ]
    width = min(config.num_dataset_processes or num_cores(), max(len(todo), 1))
    with workers(width) as executor:
        work = schedule(executor, width)
        for record, dropped in todo:
            name = record["unit"].removeprefix(f"{content}-")
            unit = Unit(name, record["source"], content, ())
            work.finish_unit(unit, record, lambda: None, dropped)
        work.drain()


def manifest_of(staging: Staging, content: str, records: list[Json], config: PrepareConfig) -> Json:
    """The manifest of a data set, whose tokenizer is put beside it."""
    directory = staging.dataset(content)
    tokenizer = BaseTokenizer.load(staging.tokenizer)
    tokenizer.save(directory)
    size = tokenizer.vocabulary_size
    if content != TEXT:
        size = ChatTokenizer(tokenizer.encoding).vocabulary_size
    shards = [shard for record in records for shard in record["shards"]]
    own = (directory / name for name in tokenization.FILES)
    files = {file.name: describe(file) for file in own if file.is_file()}
    for shard in shards:
        files |= shard["files"]
    return {
        "kind": "dataset",
        "format_version": FORMAT_VERSION,
        "content": content,
        "tokenizer": {
            "name": tokenizer.name,
            "fingerprint": tokenizer.fingerprint,
            "vocabulary_size": size,
        },
        "token_dtype": token_dtype(size).name,
        "holdout": {"rule": HOLDOUT_RULE, "fraction": config.holdout_fraction},
        "statistics": statistics(records),
        "shards": [
            {key: value for key, value in shard.items() if key != "files"} for shard in shards
        ],
        "files": files,
    }
