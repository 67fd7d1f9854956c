"""What a preparation will do: names, parts, recipe, and what it takes on disk and in time."""

from __future__ import annotations

import ast
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nope_gpt import tokenization
from nope_gpt.artifacts import FORMAT_VERSION
from nope_gpt.config import PrepareConfig
from nope_gpt.data import catalog, units
from nope_gpt.data.encoding import TEMPLATE, token_dtype
from nope_gpt.data.schedule import Group
from nope_gpt.data.sources import STANDARD_INPUT, Source, is_on_hub
from nope_gpt.errors import UsageError
from nope_gpt.tokenization import BaseTokenizer

UNPACKED = 1.64
"""Bytes of text in a byte of .parquet: 200,000 documents of FineWeb are 687 MB in 420 MB."""

SMALLEST_SHARE = 16 * 1000 * 1000
"""Bytes of files for which another process is worth its start."""

Json = dict[str, Any]


@dataclass(frozen=True)
class Estimate:
    """What a preparation takes.

    Attributes:
        files: How many, of which those of the Hub are to be downloaded.
        download_bytes: Exact.
        text_bytes: About; exact for plain text.
        tokens: About.
        disk_bytes: About, at the most.
        seconds: Of encoding, about, on this machine's cores.
    """

    files: int
    download_bytes: int
    text_bytes: int
    tokens: int
    disk_bytes: int
    seconds: float


def base_name(names: list[str], config: PrepareConfig) -> str:
    """What the data set is called: what was asked for, or after the source and the encoding."""
    name = config.name
    if name is None:
        label = source_label(names, config)
        return f"{label}-{tokenization.name_of(config.token_encoding)}"
    if plain(name) != name:
        raise UsageError(
            f"--name is {name!r}, and must be a plain name",
            hint="use letters, digits, dots, dashes and underscores",
        )
    return name


def source_label(names: list[str], config: PrepareConfig) -> str:
    """What the first source is called, with its subset if it has just one."""
    first = names[0]
    if first == STANDARD_INPUT:
        return "stdin"
    if not is_on_hub(first):
        return plain(Path(first).stem)
    known = catalog.known_collection(first)
    label = known.label if known else first.rpartition("/")[2]
    subset = config.dataset_subset or ",".join(known.default if known else ())
    is_one = re.fullmatch(r"[\w.-]+", subset) and subset.lower() not in ("none", "all")
    return plain(f"{label}-{subset}" if is_one else label)


def plain(name: str) -> str:
    """A name as a part of a directory's name."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "data"


def part_of(config: PrepareConfig) -> tuple[int, int]:
    """Which part of the files is this process's, and of how many.

    Raises:
        UsageError: --shard is not I/N.
    """
    given = config.shard
    if given is None:
        for index, count in (("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"),
                             ("RANK", "WORLD_SIZE")):  # fmt: skip
            if index in os.environ and count in os.environ:
                first = int(os.environ.get("SLURM_ARRAY_TASK_MIN", "0")) if "SLURM" in index else 0
                given = f"{int(os.environ[index]) - first}/{os.environ[count]}"
                break
        else:
            return 0, 1
    match = re.fullmatch(r"(\d+)/(\d+)", given)
    if not match or not int(match[1]) < int(match[2]):
        raise UsageError(
            f"--shard is {given!r}, and must be I/N with I from 0 to N - 1",
            hint="the first of four machines: --shard 0/4",
        )
    return int(match[1]), int(match[2])


def groups_of(sources: list[Source]) -> list[Group]:
    """Files that are fetched and encoded together: small ones of a source in a row."""
    result: list[Group] = []
    for source in sources:
        files: list[Any] = []
        for file in source.files:
            if files and sum(each.size for each in files) + file.size > units.UNIT_SIZE:
                result.append(Group(len(result), source.name, tuple(files)))
                files = []
            files.append(file)
        if files:
            result.append(Group(len(result), source.name, tuple(files)))
    return result


def recipe_of(sources: list[Source], config: PrepareConfig) -> Json:
    """Everything that the bytes of a data set follow from."""
    is_trained = config.token_encoding.startswith("bpe:")
    tokenizer = None if is_trained else tokenization.resolve(config.token_encoding, ())
    return {
        "settings": {
            "tokenizer": tokenization.name_of(config.token_encoding),
            "tokenizer_fingerprint": tokenizer.fingerprint if tokenizer else None,
            "text_column": config.text_column,
            "max_tokens_per_sample": config.max_tokens_per_sample,
            "filter_long_samples": config.filter_long_samples,
            "holdout_fraction": config.holdout_fraction,
            "deduplicate": config.deduplicate,
            "unit_size": units.UNIT_SIZE,
            "template": TEMPLATE,
            "format_version": FORMAT_VERSION,
        },
        "sources": [source.record for source in sources],
    }


def without_files(recipe: Json) -> Json:
    """A recipe but for the files: what decides the bytes of a unit, with its own file."""
    sources = [{k: v for k, v in each.items() if k != "files"} for each in recipe["sources"]]
    return recipe | {"sources": sources}


def difference(old: Json | None, new: Json) -> str:
    """How two recipes differ, in words."""
    if old is None:
        return "it does not say what it was made of"
    for name, value in new["settings"].items():
        before = old["settings"].get(name)
        if before != value:
            return f"its {name.replace('_', ' ')} was {shown(before)}, and is {shown(value)} now"
    names = [[source["name"] for source in recipe["sources"]] for recipe in (old, new)]
    if names[0] != names[1]:
        return f"it was made of {', '.join(names[0])}, not of {', '.join(names[1])}"
    for before, now in zip(old["sources"], new["sources"], strict=True):
        for name in ("revision", "weight", "cap"):
            if before.get(name) != now.get(name):
                return (
                    f"the {name} of {now['name']} was {shown(before.get(name))}, "
                    f"and is {shown(now.get(name))} now"
                )
        if before != now:
            return f"the files of {now['name']} have changed since"
    return "it differs"


def shown(value: Any) -> str:
    """A setting in a sentence."""
    return f"{value[:12]}…" if isinstance(value, str) and len(value) > 40 else str(value)


def bytes_per_token(config: PrepareConfig) -> float:
    """Bytes of text in a token, about, before any is encoded."""
    if config.token_encoding == "bytes":
        return 1.0
    return 3.0 if config.token_encoding.startswith("bpe:") else 4.0


def text_in(group: Group) -> int:
    """Bytes of text in files, about."""
    return sum(
        int(file.size * (UNPACKED if file.name.endswith(".parquet") else 1.0))
        for file in group.files
    )


def estimate(
    groups: list[Group], sources: list[Source], config: PrepareConfig, keeps_downloads: bool
) -> Estimate:
    """What it takes to encode groups of files."""
    shares = {source.name: source.share.weight for source in sources}
    text = int(sum(text_in(group) * shares[group.source] for group in groups))
    tokens = int(text / bytes_per_token(config))
    remote = [sum(file.size for file in group.files if file.remote) for group in groups]
    at_once = sum(remote) if keeps_downloads else sum(sorted(remote)[-4:])
    size = token_dtype(1 << 20 if config.token_encoding.startswith(("cl", "o2")) else 1).itemsize
    return Estimate(
        files=sum(len(group.files) for group in groups),
        download_bytes=sum(remote),
        text_bytes=text,
        tokens=tokens,
        disk_bytes=at_once + tokens * size * (2 if config.deduplicate else 1),
        seconds=text / (encoding_speed(config) * (config.num_dataset_processes or num_cores())),
    )


def encoding_speed(config: PrepareConfig) -> float:
    """Bytes of text that one core encodes in a second, tried on a module of Python's."""
    sample = Path(ast.__file__).read_text(encoding="utf-8")
    spec = "bpe:300" if config.token_encoding.startswith("bpe:") else config.token_encoding
    tokenizer: BaseTokenizer = tokenization.resolve(spec, [sample])
    tokenizer.encode(sample)
    started = time.perf_counter()
    tokenizer.encode(sample)
    return len(sample) / (time.perf_counter() - started)


def num_processes(groups: list[Group], config: PrepareConfig) -> int:
    """How many processes encode: as many as were asked for, but none for a few files."""
    wanted = config.num_dataset_processes or num_cores()
    return max(min(wanted, -(-sum(group.size for group in groups) // SMALLEST_SHARE)), 1)


def num_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def nearest_directory(path: Path) -> Path:
    """The directory itself, or the first one above it that is there."""
    path = path.absolute()
    return next(each for each in (path, *path.parents) if each.is_dir())
