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
from nope_gpt.config import PrepareConfig
from nope_gpt.data import catalog, units
from nope_gpt.data.documents import TEXT
from nope_gpt.data.downloads import Downloads
from nope_gpt.data.encoding import TEMPLATE, token_dtype
from nope_gpt.data.opening import is_on_hub
from nope_gpt.data.schedule import FILES_AHEAD, Group
from nope_gpt.data.sources import STANDARD_INPUT, Source
from nope_gpt.data.staging import SUFFIX, Part
from nope_gpt.errors import UsageError
from nope_gpt.files.artefacts import FORMAT_VERSION
from nope_gpt.files.writing import is_leftover, nearest_directory, plain, refuse_small_disk
from nope_gpt.tokenization import BaseTokenizer, ChatTokenizer

UNPACKED = 1.64
"""Bytes of text in a byte of .parquet: 200,000 documents of FineWeb are 687 MB in 420 MB."""

SMALLEST_SHARE = 16 * 1000 * 1000
"""Bytes of files for which another process is worth its start."""

FILES_AT_ONCE = FILES_AHEAD + 1
"""Groups of downloaded files that are on the disk at a time: those to come, and the one at work."""

WHOLE: Part = (0, 1)
"""The one part of one."""

Json = dict[str, Any]


@dataclass(frozen=True)
class Estimate:
    """What a preparation takes.

    Attributes:
        files: How many are left to do.
        download_bytes: What of them is on the Hub and not here yet; exact.
        text_bytes: About; exact for plain text.
        tokens: About.
        disk_bytes: About, at the most, for what is encoded.
        kept_bytes: About, at the most, for downloads.
        seconds: Of encoding, about, on this machine's cores.
    """

    files: int
    download_bytes: int
    text_bytes: int
    tokens: int
    disk_bytes: int
    kept_bytes: int
    seconds: float


def base_name(names: list[str], config: PrepareConfig) -> str:
    """What the data set is called: what was asked for, or after the source and the encoding.

    Raises:
        UsageError: It is no plain name.
    """
    name = config.name
    if name is None:
        label = source_label(names, config)
        return f"{label}-{tokenization.name_of(config.token_encoding)}"
    if plain(name) != name:
        raise UsageError(
            f"--name is {name!r}, and must be a plain name",
            hint="use letters, digits, dots, dashes and underscores",
        )
    if name.endswith(SUFFIX) or is_leftover(Path(name)):
        raise UsageError(
            f"--name is {name!r}, and names that end so are of unfinished work",
            hint=f"for example: --name {plain(name.split('.')[0])}",
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


ARRAY = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT")
RANKS = ("RANK", "WORLD_SIZE")


def part_of(config: PrepareConfig) -> tuple[Part, str]:
    """Which part of the files is this process's, and of how many; and what says so.

    Returns:
        The part, and the names of the variables that it is from, if it is from any.

    Raises:
        UsageError: It is not I/N.
    """
    if config.shard is not None:
        match = re.fullmatch(r"(\d+)/(\d+)", config.shard)
        if not match or not int(match[1]) < int(match[2]):
            raise UsageError(
                f"--shard is {config.shard!r}, and must be I/N with I from 0 to N - 1",
                hint="the first of four machines: --shard 0/4",
            )
        return (int(match[1]), int(match[2])), ""
    for names in (ARRAY, RANKS):
        values = [os.environ.get(name, "") for name in names]
        if not all(values):
            continue
        origin = " and ".join(names)
        first, step = (
            os.environ.get(f"SLURM_ARRAY_TASK_{name}", default) if names == ARRAY else default
            for name, default in (("MIN", "0"), ("STEP", "1"))
        )
        try:
            index, rest = divmod(int(values[0]) - int(first), int(step))
            count = int(values[1])
        except (ValueError, ZeroDivisionError):
            index, rest, count = 0, 1, 0
        if rest or not 0 <= index < count:
            raise UsageError(
                f"{origin} are {values[0]!r} and {values[1]!r}, which is no part of the work",
                hint="say it: --shard 0/4 is the first of four",
            )
        return (index, count), origin
    return WHOLE, ""


def recipe_of(sources: list[Source], config: PrepareConfig) -> Json:
    """Everything that the bytes of a data set follow from."""
    is_trained = tokenization.size_to_train(config.token_encoding) is not None
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


def has_same_plan(old: Json, new: Json) -> bool:
    """Whether two recipes differ in their files alone, so that those that stayed give the same."""
    plans = []
    for recipe in (old, new):
        sources = [{k: v for k, v in each.items() if k != "files"} for each in recipe["sources"]]
        plans.append((recipe["settings"], sources))
    return plans[0] == plans[1]


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
    return 4.0 if tokenization.size_to_train(config.token_encoding) is None else 3.0


def text_in(group: Group) -> float:
    """Bytes of text that is taken of files, about."""
    packed = (UNPACKED if file.name.endswith(".parquet") else 1.0 for file in group.files)
    size = sum(file.size * ratio for file, ratio in zip(group.files, packed, strict=True))
    return size * group.source.share.weight


def estimate(groups: list[Group], config: PrepareConfig, downloads: Downloads) -> Estimate:
    """What it takes to encode groups of files, with what is downloaded already."""
    text = int(sum(text_in(group) for group in groups))
    tokens = int(text / bytes_per_token(config))
    missing = [
        (group, sum(downloads.missing(file.remote) for file in group.files if file.remote))
        for group in groups
    ]
    download = sum(size for _, size in missing)
    # What is counted before a share of it is taken stays till then; else a few at a time.
    counted = sum(size for group, size in missing if not group.source.share.is_whole)
    largest = sorted(size for group, size in missing if group.source.share.is_whole)
    size = sum(bytes_in(group, config) for group in groups)
    at_work = 0 if config.deduplicate else max((bytes_in(g, config) for g in groups), default=0)
    return Estimate(
        files=sum(len(group.files) for group in groups),
        download_bytes=download,
        text_bytes=text,
        tokens=tokens,
        disk_bytes=int(2 * size if config.deduplicate else size + 2 * at_work),
        kept_bytes=download if config.download_path else counted + sum(largest[-FILES_AT_ONCE:]),
        seconds=text / (encoding_speed(config) * (config.num_dataset_processes or num_cores())),
    )


def bytes_in(group: Group, config: PrepareConfig) -> float:
    """Bytes of the shards of files, about: of tokens, and of masks unless they hold text."""
    schemas = [file.schema for file in group.files]
    mask = 0 if all(schema and schema.content == TEXT for schema in schemas) else 1
    width = token_dtype(vocabulary_size(config)).itemsize + mask
    return text_in(group) / bytes_per_token(config) * width


def vocabulary_size(config: PrepareConfig) -> int:
    """How many tokens there are, with those of the chat template, before one is trained."""
    size = tokenization.size_to_train(config.token_encoding)
    if size is not None:
        return size
    return ChatTokenizer(tokenization.resolve(config.token_encoding, ()).encoding).vocabulary_size


def refuse_small_disks(needed: Estimate, root: Path, downloads: Path) -> None:
    """Check that what is still to be written fits on the disk, or the two disks.

    Raises:
        CapacityError: It does not.
    """
    flags = "--dataset-path or a smaller --dataset-subset", "--download-path"
    wanted = [
        (root, needed.disk_bytes, "about all that is still to be written", flags[0]),
        (downloads, needed.kept_bytes, "about all that is still to be downloaded", flags[1]),
    ]
    if len({nearest_directory(path).stat().st_dev for path in (root, downloads)}) == 1:
        size = needed.disk_bytes + needed.kept_bytes
        wanted = [(root, size, "about all that is still to be prepared", flags[0])]
    for place, size, what, flag in wanted:
        refuse_small_disk(nearest_directory(place), size, what, flag)


def encoding_speed(config: PrepareConfig) -> float:
    """Bytes of text that one core encodes in a second, tried on a module of Python's."""
    sample = Path(ast.__file__).read_text(encoding="utf-8")
    is_trained = tokenization.size_to_train(config.token_encoding) is not None
    spec = "bpe:300" if is_trained else config.token_encoding
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
