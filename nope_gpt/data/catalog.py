"""Data sets on the Hub: what their subsets are, and which files belong to one.

Three are known by name. Any other is asked for its own list, the `configs` of its
README, or read by the names of its files. The revision is always a commit.
"""

from __future__ import annotations

import fnmatch
import itertools
import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from nope_gpt.data.digests import Digest
from nope_gpt.data.documents import MESSAGES, PAIRS, Schema
from nope_gpt.data.downloads import Remote
from nope_gpt.data.reading import SUFFIXES
from nope_gpt.data.sources import named_share
from nope_gpt.errors import MissingError, NetworkError, NopeError, UsageError, first_line
from nope_gpt.hub.remote import contacting

OFFLINE = "try again with a network, or give local files"
README = "README.md"
TRAIN = "train"

MOST_PATTERNS = 1000
"""Of a split of a README, for each of which the Hub is asked."""


@dataclass(frozen=True)
class Subset:
    """Files of a data set that belong together.

    Attributes:
        name: What `--dataset-subset` calls it.
        splits: For each split the patterns of its files' paths; `*` matches within one folder.
            Under "" those of files whose names may tell the split.
        schema: What its rows are, where that is known.
        source: What the subset is called in a prepared data set.
    """

    name: str
    splits: dict[str, tuple[str, ...]]
    schema: Schema | None = None
    source: str = ""


@dataclass(frozen=True)
class Collection:
    """A data set on the Hub.

    Attributes:
        repo_id: Its id.
        default: The subsets that are taken when none is named; none if one must be.
        subsets: All of them, by name.
        label: What a prepared data set is called after.
        family: A pattern of further names, and of the files of each.
        aliases: Other names of subsets.
    """

    repo_id: str
    label: str
    default: tuple[str, ...]
    subsets: dict[str, Subset]
    family: tuple[str, str] | None = None
    aliases: dict[str, str] = field(default_factory=dict)

    def subset(self, name: str) -> Subset | None:
        """The subset of a name, if there is one."""
        name = self.aliases.get(name.lower(), name)
        if self.family and re.fullmatch(self.family[0], name):
            return Subset(name, trained(self.family[1].format(name)), source=name)
        return self.subsets.get(name)


def trained(*patterns: str) -> dict[str, tuple[str, ...]]:
    """The files of the one split `train`."""
    return {TRAIN: patterns}


def collection(repo_id: str, label: str, default: str, *subsets: Subset, **more: Any) -> Collection:
    """A collection of subsets."""
    names = {subset.name: subset for subset in subsets}
    defaults = tuple(name for name in default.split(",") if name)
    return Collection(repo_id, label, defaults, names, **more)


SMOLTALK_PARTS = (
    "apigen-80k,everyday-conversations,explore-instruct-rewriting,longalign,metamathqa-50k,"
    "numina-cot-100k,openhermes-100k,self-oss-instruct,smol-constraints,smol-magpie-ultra,"
    "smol-rewrite,smol-summarize,systemchats-30k"
).split(",")

KNOWN = {
    "fineweb": collection(
        "HuggingFaceFW/fineweb",
        "fineweb",
        "sample-10BT",
        *(
            Subset(f"sample-{size}", trained(f"sample/{size}/*.parquet"), source=f"sample-{size}")
            for size in ("10BT", "100BT", "350BT")
        ),
        Subset("none", trained("data/*/*.parquet"), source="fineweb"),
        family=(r"CC-MAIN-\d{4}-\d+", "data/{}/*.parquet"),
        aliases={"none": "none"},
    ),
    "smoltalk": collection(
        "HuggingFaceTB/smoltalk",
        "smoltalk",
        "all",
        *(
            Subset(name, trained(f"data/{name}/train-*.parquet"), MESSAGES, source=name)
            for name in ("all", *SMOLTALK_PARTS)
        ),
    ),
    "ultrafeedback": collection(
        "HuggingFaceH4/ultrafeedback_binarized",
        "ultrafeedback",
        "sft,prefs",
        Subset("sft", trained("data/train_sft-*.parquet"), MESSAGES, source="ultra-feedback"),
        Subset(
            "prefs", trained("data/train_prefs-*.parquet"), PAIRS, source="ultra-feedback-prefs"
        ),
        aliases={"ultra-feedback": "sft", "ultra-feedback-prefs": "prefs"},
    ),
}

FULL_FINEWEB = "all of FineWeb: about 15 trillion tokens, 30 TB of shards"


def known_collection(name: str) -> Collection | None:
    """The collection that a short name or the id of its repository means."""
    repos = {item.repo_id.lower(): item for item in KNOWN.values()}
    return KNOWN.get(name) or repos.get(name.lower())


def is_hub_id(name: str) -> bool:
    """Whether this could be the id of a data set on the Hub."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None and ".." not in name


def revision_of(repo_id: str, revision: str | None) -> str:
    """The commit that a branch or tag, or the newest state, stands for now.

    Raises:
        MissingError: There is no such data set or revision.
        NetworkError: The Hub cannot be reached.
    """
    from huggingface_hub import HfApi

    with contacting("data set", repo_id, OFFLINE):
        info = HfApi().dataset_info(repo_id, revision=revision)
    if not info.sha:
        raise MissingError("the Hub names no commit of this data set", where=repo_id)
    return info.sha


def described_collection(repo_id: str, revision: str) -> Collection:
    """What the README of a data set says of its subsets, else all its readable files.

    Raises:
        NopeError: The README says something that we do not understand.
    """
    from huggingface_hub import hf_hub_download, metadata_load
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    label = repo_id.rpartition("/")[2]
    with contacting("data set", repo_id, OFFLINE):
        try:
            path = hf_hub_download(repo_id, README, repo_type="dataset", revision=revision)
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            path = None
    try:
        configs = (metadata_load(path) or {}).get("configs") if path else None
        named = [subset_of(config, label) for config in configs or []]
    except Exception as error:  # Whatever YAML can hold, and its library raises.
        raise NopeError(
            f"the configs of its README are not understood ({type(error).__name__}: "
            f"{first_line(error)})",
            where=f"https://huggingface.co/datasets/{repo_id}/blob/{revision}/{README}",
            hint=f"hf download {repo_id} --repo-type dataset --local-dir DIR, then "
            "`nope prepare DIR`",
        ) from None
    if not named:
        named = [Subset("default", {"": tuple(f"**{s}" for s in SUFFIXES)}, source=label)]
    defaults = [subset.name for subset in named if subset.name == "default"]
    only = named[0].name if len(named) == 1 else ""
    return collection(repo_id, label, defaults[0] if defaults else only, *named)


def subset_of(config: dict[str, Any], label: str) -> Subset:
    """One of the `configs` in a README, as the datasets library reads it.

    Raises:
        ValueError: It names no files.
    """
    name, files, folder = config["config_name"], config.get("data_files"), config.get("data_dir")
    if files is None and folder is None:
        raise ValueError(f"{name!r} names no files")
    splits: dict[str, list[str]] = {}
    if files is None:
        splits[""] = ["**"]
    else:
        for entry in [files] if isinstance(files, str | dict) else files:
            split, path = (entry.get("split", TRAIN), entry["path"]) if isinstance(entry, dict) \
                else (TRAIN, entry)  # fmt: skip
            paths = [path] if isinstance(path, str) else path
            splits.setdefault(split, []).extend(paths)
    return Subset(
        str(name),
        {split: all_expanded(patterns, folder or "") for split, patterns in splits.items()},
        source=label if name == "default" else str(name),
    )


def all_expanded(patterns: list[str], folder: str) -> tuple[str, ...]:
    """The patterns that those of a README stand for.

    Raises:
        ValueError: They are more than anybody lists: a few braces in a row stand for millions.
    """
    found = (each for pattern in patterns for each in expanded(pattern, folder))
    result = tuple(itertools.islice(found, MOST_PATTERNS + 1))
    if len(result) > MOST_PATTERNS:
        raise ValueError(f"its files are more than {MOST_PATTERNS:,} patterns")
    return result


def expanded(pattern: str, folder: str) -> Iterator[str]:
    """A pattern of a README as patterns of paths: without `./`, and one for each of `{a,b}`."""
    path = posixpath.normpath(posixpath.join(folder, pattern))
    match = re.fullmatch(r"(.*?)\{([^{}]*)\}(.*)", path)
    if not match:
        yield path
        return
    for word in match[2].split(","):
        yield from expanded(match[1] + word + match[3], "")


def files_of(repo_id: str, revision: str, subset: Subset, split: str) -> list[Remote]:
    """The files of a subset, by name.

    Raises:
        MissingError: There are none that can be read.
        NetworkError: The Hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    where = f"https://huggingface.co/datasets/{repo_id}/tree/{revision}"
    patterns = subset.splits.get(split, subset.splits.get("", ()))
    if not patterns:
        raise no_split(subset, split, sorted(subset.splits), where)
    found: dict[str, Remote] = {}
    for pattern in patterns:
        fixed = re.split(r"[*?\[]", pattern)[0].rpartition("/")[0]
        with contacting("data set", repo_id, OFFLINE):
            entries = HfApi().list_repo_tree(
                repo_id,
                fixed or None,
                recursive=True,
                revision=revision,
                repo_type="dataset",
            )
            for entry in entries:
                if isinstance(entry, RepoFile) and matches(entry.path, pattern):
                    stated = ("sha256", entry.lfs.sha256) if entry.lfs else ("git", entry.blob_id)
                    digest = Digest.of(*stated)
                    if not digest.is_well_formed:
                        raise NetworkError("the Hub lists a file without a hash", where=repo_id)
                    found[entry.path] = Remote(repo_id, revision, entry.path, entry.size, digest)
    readable = [path for path in sorted(found) if path.lower().endswith(SUFFIXES)]
    readable = [path for path in readable if PurePosixPath(path).name != README]
    if readable and split not in subset.splits:
        by_split = of_splits(readable)
        if split not in by_split:
            raise no_split(subset, split, sorted(by_split), where)
        readable = by_split[split]
    if not readable:
        kinds = ", ".join(sorted({PurePosixPath(path).suffix for path in found}))
        raise MissingError(
            f"the subset {subset.name!r} has no {', '.join(SUFFIXES)} file"
            + (f"; it has {kinds}" if kinds else ""),
            where=where,
        )
    return [found[path] for path in readable]


SPLITS = {
    TRAIN: {"train", "training"},
    "test": {"test", "testing", "eval", "evaluation"},
    "validation": {"validation", "valid", "dev", "val"},
}
"""The words in the names of files that tell a split, as the datasets library knows them."""


def matches(path: str, pattern: str) -> bool:
    """Whether a path fits a pattern, whose `*` stays in its folder unless doubled."""
    if "**" in pattern:
        return fnmatch.fnmatchcase(path, pattern.replace("**/", "*").replace("**", "*"))
    return path.count("/") == pattern.count("/") and fnmatch.fnmatchcase(path, pattern)


def of_splits(paths: list[str]) -> dict[str, list[str]]:
    """Files by the split that their names tell; all are to train on if none tells any."""
    result: dict[str, list[str]] = {}
    for path in paths:
        words = set(re.split(r"[^a-z0-9]+", path.lower()))
        for split, spellings in SPLITS.items():
            if words & spellings:
                result.setdefault(split, []).append(path)
    return result or {TRAIN: paths}


def no_split(subset: Subset, split: str, splits: list[str], where: str) -> MissingError:
    """What to say of a split that is not there."""
    return MissingError(
        f"the subset {subset.name!r} has no split {split!r}; it has {', '.join(splits)}",
        where=where,
        hint="choose with --dataset-split",
    )


Choice = dict[str, list[tuple[Subset, str]]]


def choose(collections: list[Collection], wanted: str | None) -> Choice:
    """The subsets that `--dataset-subset` names, for each collection by its id.

    Args:
        collections: Those that were asked for.
        wanted: Comma-separated names, each with `:WEIGHT` and `@COUNT` if wished.

    Returns:
        For each collection its subsets, with what stood behind the name.

    Raises:
        MissingError: A name is unknown; lists those that exist.
        UsageError: One must be named, or one is named twice.
    """
    chosen: Choice = {item.repo_id: [] for item in collections}
    for word in (wanted or "").split(","):
        name, share = named_share(word)
        if not name and not share:
            continue
        owners = [(item, item.subset(name)) for item in collections]
        found = [(item, subset) for item, subset in owners if subset is not None]
        if not found and name != "all":
            raise MissingError(
                f"there is no subset {name!r}; there are "
                + ", ".join(sorted(each for item in collections for each in item.subsets)),
                where=", ".join(item.repo_id for item in collections),
                hint="choose with --dataset-subset",
            )
        for item, subset in found:
            chosen[item.repo_id].append((subset, share))
    for item in collections:
        if not chosen[item.repo_id] and not item.default:
            raise UsageError(
                f"this data set has several subsets: {', '.join(sorted(item.subsets))}",
                where=item.repo_id,
                hint="choose with --dataset-subset",
            )
        if not chosen[item.repo_id]:
            chosen[item.repo_id] = [(item.subsets[name], "") for name in item.default]
        names = [subset.name for subset, _ in chosen[item.repo_id]]
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise UsageError(f"the subset {doubled[0]!r} is named twice", where=item.repo_id)
    return chosen
