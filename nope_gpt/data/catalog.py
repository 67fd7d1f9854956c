"""Data sets on the Hub: what their subsets are, and which files belong to one.

Three are known by name. Any other is asked for its own list, the `configs` of its
README, or read by the names of its files. The revision is always a commit.
"""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from nope_gpt.data.documents import MESSAGES, PAIRS, Schema
from nope_gpt.data.downloads import Remote
from nope_gpt.data.reading import SUFFIXES
from nope_gpt.errors import MissingError, NetworkError, UsageError
from nope_gpt.remote import contacting

OFFLINE = "try again with a network, or give local files"
README = "README.md"


@dataclass(frozen=True)
class Subset:
    """Files of a data set that belong together.

    Attributes:
        name: What `--dataset-subset` calls it.
        patterns: Of the paths of its files; `*` matches within one folder.
        schema: What its rows are, where that is known.
        source: What the subset is called in a prepared data set.
    """

    name: str
    patterns: tuple[str, ...]
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
            return Subset(name, (self.family[1].format(name),), source=name)
        return self.subsets.get(name)


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
            Subset(f"sample-{size}", (f"sample/{size}/*.parquet",), source=f"sample-{size}")
            for size in ("10BT", "100BT", "350BT")
        ),
        Subset("none", ("data/*/*.parquet",), source="fineweb"),
        family=(r"CC-MAIN-\d{4}-\d+", "data/{}/*.parquet"),
        aliases={"none": "none"},
    ),
    "smoltalk": collection(
        "HuggingFaceTB/smoltalk",
        "smoltalk",
        "all",
        *(
            Subset(name, (f"data/{name}/train-*.parquet",), MESSAGES, source=name)
            for name in ("all", *SMOLTALK_PARTS)
        ),
    ),
    "ultrafeedback": collection(
        "HuggingFaceH4/ultrafeedback_binarized",
        "ultrafeedback",
        "sft,prefs",
        Subset("sft", ("data/train_sft-*.parquet",), MESSAGES, source="ultra-feedback"),
        Subset("prefs", ("data/train_prefs-*.parquet",), PAIRS, source="ultra-feedback-prefs"),
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
    """The commit that a branch or tag, or the newest state, stands for now."""
    from huggingface_hub import HfApi

    with contacting("data set", repo_id, OFFLINE):
        info = HfApi().dataset_info(repo_id, revision=revision)
    if not info.sha:
        raise MissingError("the Hub names no commit of this data set", where=repo_id)
    return info.sha


def described_collection(repo_id: str, revision: str, split: str) -> Collection:
    """What the README of a data set says of its subsets, else all its readable files."""
    from huggingface_hub import hf_hub_download, metadata_load
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    with contacting("data set", repo_id, OFFLINE):
        try:
            path = hf_hub_download(repo_id, README, repo_type="dataset", revision=revision)
            configs = (metadata_load(path) or {}).get("configs")
        except LocalEntryNotFoundError:
            raise
        except (EntryNotFoundError, ValueError):
            configs = None
    label = repo_id.rpartition("/")[2]
    subsets = [subset_of(config, label, split) for config in configs or []]
    named = [subset for subset in subsets if subset is not None]
    if not named:
        patterns = tuple(f"**{suffix}" for suffix in SUFFIXES)
        named = [Subset("default", patterns, source=label)]
    defaults = [subset.name for subset in named if subset.name == "default"]
    only = named[0].name if len(named) == 1 else ""
    return collection(repo_id, label, defaults[0] if defaults else only, *named)


def subset_of(config: Any, label: str, split: str) -> Subset | None:
    """The files of one split of one of the `configs` in a README."""
    if not isinstance(config, dict) or not isinstance(config.get("config_name"), str):
        return None
    name, files = config["config_name"], config.get("data_files")
    source = label if name == "default" else name
    if isinstance(files, str):
        return Subset(name, (files,), source=source)
    patterns: list[str] = []
    for entry in files if isinstance(files, list) else []:
        if isinstance(entry, str):
            patterns.append(entry)
        elif isinstance(entry, dict) and entry.get("split", split) == split:
            path = entry.get("path", [])
            patterns += [path] if isinstance(path, str) else path
    return Subset(name, tuple(patterns), source=source) if patterns else None


def files_of(repo_id: str, revision: str, subset: Subset, split: str) -> list[Remote]:
    """The files of a subset, by name.

    Raises:
        MissingError: There are none that can be read.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    found: dict[str, Remote] = {}
    for pattern in subset.patterns:
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
                    digest = f"sha256:{entry.lfs.sha256}" if entry.lfs else f"git:{entry.blob_id}"
                    if not re.fullmatch(r"(sha256:[0-9a-f]{64}|git:[0-9a-f]{40})", digest):
                        raise NetworkError("the Hub lists a file without a hash", where=repo_id)
                    found[entry.path] = Remote(repo_id, revision, entry.path, entry.size, digest)
    readable = [path for path in sorted(found) if path.lower().endswith(SUFFIXES)]
    readable = [path for path in readable if PurePosixPath(path).name != README]
    if subset.patterns[0].startswith("**"):
        readable = of_split(readable, split)
    if not readable:
        kinds = ", ".join(sorted({PurePosixPath(path).suffix for path in found}))
        raise MissingError(
            f"the subset {subset.name!r} has no {', '.join(SUFFIXES)} file"
            + (f"; it has {kinds}" if kinds else ""),
            where=f"https://huggingface.co/datasets/{repo_id}/tree/{revision}",
        )
    return [found[path] for path in readable]


def matches(path: str, pattern: str) -> bool:
    """Whether a path fits a pattern, whose `*` stays in its folder unless doubled."""
    if "**" in pattern:
        return fnmatch.fnmatchcase(path, pattern.replace("**/", "*").replace("**", "*"))
    return path.count("/") == pattern.count("/") and fnmatch.fnmatchcase(path, pattern)


def of_split(paths: list[str], split: str) -> list[str]:
    """The files that name a split, or all files if none names any."""
    names = {path: set(re.split(r"[^a-z0-9]+", path.lower())) for path in paths}
    splits = {"train", "test", "validation", "valid", "dev", "eval"}
    if not any(words & splits for words in names.values()):
        return paths
    return [path for path in paths if split.lower() in names[path]]


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
    """
    chosen: Choice = {item.repo_id: [] for item in collections}
    for word in (wanted or "").split(","):
        match = re.fullmatch(r"\s*([^:@]*?)\s*((?:[:@].*)?)", word)
        name, share = (match[1], match[2]) if match else (word, "")
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
