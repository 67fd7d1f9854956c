"""Token shards on disk: standard .npy files, memory-mapped, and a manifest.

A shard holds the tokens of its documents one after the other (`.tokens.npy`), where
each document ends (`.ends.npy`, int64) and, for conversations, which tokens the model
is to write (`.mask.npy`, uint8). The documents that are held out come last, so that
each of the two splits is one stretch of the file.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nope_gpt.data.documents import CHAT, CONTENTS, PREFERENCE, TEXT
from nope_gpt.data.encoding import EncodedDocument, Tokens, token_dtype
from nope_gpt.data.report import SOURCE, STATISTICS, used_sources
from nope_gpt.errors import NopeError, UsageError
from nope_gpt.files.artefacts import MANIFEST, read_manifest
from nope_gpt.files.json_files import Pattern, check
from nope_gpt.files.writing import array_file

RECIPE = {"sources": [SOURCE]}
NEEDED = {
    "content": str,
    "tokenizer": {"name": str, "vocabulary_size": int},
    "shards": [
        {
            "name": str,
            "source": str,
            "train_documents": int,
            "train_tokens": int,
            "holdout_documents": int,
            "holdout_tokens": int,
        }
    ],
    "statistics": (dict,),
    "recipe": (RECIPE,),
}
TOLD = {"token_dtype": str, "statistics": STATISTICS, "made_with": [str], "recipe": RECIPE}
"""What the manifest of a data set says besides that of any directory: what reading it needs,
and what is there for people."""


@dataclass(frozen=True)
class Part:
    """Documents that were encoded together, as raw numbers in work files.

    Attributes:
        lengths: Tokens of each document.
        tokens: File of all tokens, one document after the other.
        mask: File of which of them the model writes; not for text.
    """

    lengths: NDArray[np.int64]
    tokens: Path
    mask: Path | None = None


def write_shard(
    directory: Path,
    name: str,
    parts: list[Part],
    train: NDArray[np.bool_],
    holdout: NDArray[np.bool_],
    dtype: np.dtype[Any],
    content: str,
) -> dict[str, Any]:
    """Write one shard, part after part, so that memory does not grow with it.

    Args:
        directory: Of the data set.
        name: Of the shard.
        parts: The documents.
        train: Which documents to train on; they come first.
        holdout: Which documents are held out; what is neither is left out.
        dtype: Of the tokens.
        content: Everything but "text" has a mask.

    Returns:
        The shard's entry in the manifest, with the size and sha256 of its `files`.
    """
    lengths = np.concatenate([part.lengths for part in parts])
    sizes = [lengths[which] for which in (train, holdout)]
    num_tokens = int(sum(size.sum() for size in sizes))
    ends = np.cumsum(np.concatenate(sizes), dtype=np.int64)
    written = []
    with array_file(directory / f"{name}.ends.npy", ends.dtype, ends.size) as file:
        file.write(ends)
        written.append(file)
    kinds = {"tokens": dtype} | ({} if content == TEXT else {"mask": np.dtype(np.uint8)})
    for kind, kind_dtype in kinds.items():
        with array_file(directory / f"{name}.{kind}.npy", kind_dtype, num_tokens) as file:
            for values in selected(parts, kind, kind_dtype, (train, holdout)):
                file.write(values)
            written.append(file)
    return {
        "name": name,
        "train_documents": int(train.sum()),
        "train_tokens": int(sizes[0].sum()),
        "holdout_documents": int(holdout.sum()),
        "holdout_tokens": int(sizes[1].sum()),
        "files": {file.name: file.description for file in written},
    }


def selected(
    parts: list[Part], kind: str, dtype: np.dtype[Any], selections: Iterable[NDArray[np.bool_]]
) -> Iterator[NDArray[Any]]:
    """The numbers of the selected documents, part after part, for each selection in turn."""
    for selection in selections:
        first = 0
        for part in parts:
            wanted = selection[first : first + part.lengths.size]
            first += part.lengths.size
            if wanted.any():
                yield np.fromfile(getattr(part, kind), dtype)[np.repeat(wanted, part.lengths)]


@dataclass(frozen=True)
class Shard:
    """One shard, read through a memory map."""

    directory: Path
    name: str
    source: str
    train_documents: int
    train_tokens: int
    num_documents: int
    num_tokens: int
    vocabulary_size: int
    has_mask: bool

    @functools.cached_property
    def tokens(self) -> Tokens:
        return self.load("tokens", token_dtype(self.vocabulary_size), self.num_tokens)

    @functools.cached_property
    def ends(self) -> NDArray[np.int64]:
        ends = self.load("ends", np.dtype(np.int64), self.num_documents)
        if ends.size and (
            ends[0] < 0 or ends[-1] != self.num_tokens or (ends[1:] < ends[:-1]).any()
        ):
            raise NopeError(
                "the ends of this shard's documents are not in order", where=str(self.file("ends"))
            )
        return ends

    @functools.cached_property
    def mask(self) -> NDArray[np.uint8]:
        return self.load("mask", np.dtype(np.uint8), self.num_tokens)

    def file(self, part: str) -> Path:
        """The file of a part, which lies in the data set's directory whatever its name says."""
        return self.directory / Path(f"{self.name}.{part}.npy").name

    def load(self, part: str, dtype: np.dtype[Any], length: int) -> NDArray[Any]:
        path = self.file(part)
        try:
            array: NDArray[Any] = np.lib.format.open_memmap(path, mode="r")
        except Exception as error:  # What is no array can fail in any way.
            raise NopeError(f"this shard cannot be read: {error}", where=str(path)) from None
        if array.dtype != dtype or array.shape != (length,):
            raise NopeError(
                f"this shard has shape {array.shape} of {array.dtype}, and the manifest says "
                f"({length},) of {dtype}",
                where=str(path),
            )
        return array

    def read(self, start: int, end: int) -> NDArray[np.int64]:
        """Tokens from start to end.

        Raises:
            NopeError: A token is outside the vocabulary.
        """
        tokens = self.tokens[start:end].astype(np.int64)
        if tokens.size and tokens.max() >= self.vocabulary_size:
            raise NopeError(
                f"token {tokens.max()} is outside the vocabulary of {self.vocabulary_size}",
                where=str(self.file("tokens")),
            )
        return tokens

    def split(self, holdout: bool) -> tuple[int, int]:
        """The first document to train on, or of those held out, and the one after the last."""
        if holdout:
            return self.train_documents, self.num_documents
        return 0, self.train_documents

    def document(self, index: int) -> EncodedDocument:
        start = int(self.ends[index - 1]) if index else 0
        end = int(self.ends[index])
        mask = np.asarray(self.mask[start:end]) if self.has_mask else None
        return EncodedDocument(self.read(start, end), mask)


@dataclass(frozen=True)
class Dataset:
    """A prepared data set."""

    path: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> Dataset:
        """Open a data set's directory.

        Raises:
            NopeError: It is missing, damaged or something else.
        """
        dataset = cls(path, read_manifest(path, "dataset")).with_keys(NEEDED)
        if dataset.content not in CONTENTS:
            raise NopeError(
                f"its content is none of {', '.join(CONTENTS)}", where=str(path / MANIFEST)
            )
        return dataset

    def with_keys(self, pattern: Pattern) -> Dataset:
        """Return this data set if its manifest has what a pattern says.

        Raises:
            NopeError: It lacks something.
        """
        try:
            check(self.manifest, pattern)
        except ValueError as error:
            raise NopeError(
                f"the manifest is damaged: {error}", where=str(self.path / MANIFEST)
            ) from None
        return self

    @property
    def content(self) -> str:
        return str(self.manifest["content"])

    @property
    def tokenizer(self) -> dict[str, Any]:
        """Identity of the tokenizer: name, fingerprint and vocabulary_size."""
        return dict(self.manifest["tokenizer"])

    @property
    def fingerprint(self) -> str:
        """What two data sets share only if they hold the same tokens."""
        hashes = (
            f"{name} {entry['sha256']}"
            for name, entry in sorted(self.manifest["files"].items())
            if name.startswith("shard-")
        )
        return hashlib.sha256("\n".join(hashes).encode()).hexdigest()

    @property
    def origin(self) -> dict[str, Any]:
        """What it is made from, for people: its name and size, and its sources."""
        sources = []
        for source in used_sources(self.manifest):
            entry = {name: source[name] for name in ("name", "repo", "revision") if name in source}
            sources.append(entry | {"files": len(source["files"])})
        stats = self.manifest.get("statistics") or {}
        counts = {name: stats[name] for name in ("documents", "tokens") if name in stats}
        return {"name": self.path.name, **counts, "sources": sources}

    @functools.cached_property
    def shards(self) -> list[Shard]:
        return [
            Shard(
                directory=self.path,
                name=entry["name"],
                source=entry["source"],
                train_documents=entry["train_documents"],
                train_tokens=entry["train_tokens"],
                num_documents=entry["train_documents"] + entry["holdout_documents"],
                num_tokens=entry["train_tokens"] + entry["holdout_tokens"],
                vocabulary_size=self.tokenizer["vocabulary_size"],
                has_mask=self.content != TEXT,
            )
            for entry in self.manifest["shards"]
        ]

    @property
    def sides(self) -> list[tuple[Shard, ...]]:
        """The shards; of pairs, those of the better answers beside those of the worse.

        Raises:
            NopeError: The shards are not pairs.
        """
        if self.content != PREFERENCE:
            return [(shard,) for shard in self.shards]
        better, worse = self.shards[::2], self.shards[1::2]
        sizes = [[shard.split(holdout=True) for shard in side] for side in (better, worse)]
        if sizes[0] != sizes[1]:
            raise NopeError("its shards are not pairs", where=str(self.path / MANIFEST))
        return list(zip(better, worse, strict=True))

    def require_tokenizer(self, name: str, fingerprint: str, model: str) -> None:
        """Check that the tokens are those of a model.

        Args:
            name: Of the model's tokenizer.
            fingerprint: Of it.
            model: Where that is.

        Raises:
            UsageError: They are not.
        """
        if fingerprint != self.tokenizer["fingerprint"]:
            raise UsageError(
                f"the model's tokenizer is {name}, and the data set's is {self.tokenizer['name']}",
                where=f"{model} and {self.path}",
                hint=f"prepare the data again: nope prepare FILE --token-encoding {model}",
            )

    def require(self, content: str) -> Dataset:
        """Return this data set if it holds text, or conversations, as a command needs.

        Raises:
            UsageError: It holds the other.
        """
        if self.content != content:
            held, hint = {
                TEXT: ("text", "`nope pretrain` uses it"),
                CHAT: ("conversations", "`nope tune` uses it"),
                PREFERENCE: ("pairs of answers", "give a data set of text or conversations"),
            }[self.content]
            raise UsageError(f"this data set holds {held}", where=str(self.path), hint=hint)
        return self


class TokenStream:
    """All tokens of one split, one shard after the other.

    Args:
        dataset: Of text.
        holdout: The held-out split instead of the trained one.
    """

    def __init__(self, dataset: Dataset, *, holdout: bool = False) -> None:
        self.dataset = dataset
        self.stretches = []
        for shard in dataset.shards:
            start, end = 0, shard.train_tokens
            if holdout:
                start, end = end, shard.num_tokens
            if end > start:
                self.stretches.append((shard, start, end))
        sizes = [end - start for _, start, end in self.stretches]
        self.offsets = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        """`count` tokens from `start`, fewer at the end of the stream."""
        pieces = [shard.read(begin, end) for shard, begin, end in self.pieces(start, count)]
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)

    def documents(self, start: int, count: int) -> NDArray[np.int64]:
        """The document that each of those tokens belongs to, the first one numbered 0."""
        found: list[NDArray[np.int64]] = []
        for shard, begin, end in self.pieces(start, count):
            numbers = np.searchsorted(shard.ends, np.arange(begin, end), side="right")
            following = found[-1][-1] + 1 if found else 0
            found.append(numbers - numbers[0] + following)
        return np.concatenate(found) if found else np.empty(0, dtype=np.int64)

    def pieces(self, start: int, count: int) -> Iterator[tuple[Shard, int, int]]:
        """Where `count` tokens from `start` lie: shards, and from where to where in each."""
        index = int(np.searchsorted(self.offsets, start, side="right")) - 1
        while count > 0 and index < len(self.stretches):
            shard, first, last = self.stretches[index]
            begin = first + start - int(self.offsets[index])
            end = min(begin + count, last)
            yield shard, begin, end
            start, count, index = start + end - begin, count - (end - begin), index + 1
