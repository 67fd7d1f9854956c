"""The verb `prepare`: sources to a data set of token shards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nope_gpt import tokenization
from nope_gpt.artifacts import FORMAT_VERSION, publish
from nope_gpt.config import PrepareConfig
from nope_gpt.data.documents import Document, Source, open_sources, subset_name
from nope_gpt.data.shards import EncodedDocument, token_dtype, write_shard
from nope_gpt.errors import NopeError, UsageError
from nope_gpt.tokenization import BaseTokenizer, ChatTokenizer

UNIT_SIZE = 256 * 1000 * 1000
"""Characters of text in a shard, about."""

TRAINING_TEXT = 64 * 1000 * 1000
"""Characters that a byte-pair tokenizer is trained on, at most: the first ones."""


@dataclass
class Prepared:
    """What was made so far, for the report.

    Attributes:
        size: Characters in the sources, about, or 0 where that is not known.
    """

    path: Path
    content: str
    tokenizer: str
    vocabulary_size: int
    size: int = 0
    documents: int = 0
    holdout_documents: int = 0
    tokens: int = 0
    characters: int = 0
    refused: int = 0
    shards: list[dict[str, Any]] = field(default_factory=list)


Progress = Callable[[Prepared], None]


def prepare(
    names: list[str], config: PrepareConfig, progress: Progress = lambda _: None
) -> list[Prepared]:
    """Encode sources into one data set, or one of text and one of conversations.

    Args:
        names: Files, directories, `-` for standard input, or `python-docs`.
        config: Where to, and with which tokenizer.
        progress: Called after each document with the counts so far.

    Raises:
        NopeError: A source is missing, empty or damaged; nothing is left half-made.
    """
    sources = open_sources(names, config.text_column)
    tokenizer = tokenization.resolve(config.token_encoding, training_texts(sources))
    results: list[Prepared] = []
    contents = sorted({source.content for source in sources}, reverse=True)
    targets = {content: target(config, names, tokenizer, content, contents) for content in contents}
    for path in targets.values():
        if path.exists() and not config.overwrite:
            raise UsageError(
                "this data set already exists",
                where=str(path),
                hint="train on it, choose another --name, or add --overwrite to replace it",
            )
    with ExitStack() as stack:  # All are filled before the first appears.
        for content, path in targets.items():
            chosen = [source for source in sources if source.content == content]
            manifest: dict[str, Any] = {}
            directory = stack.enter_context(
                publish(path, manifest=manifest, overwrite=config.overwrite)
            )
            results.append(fill(directory, manifest, chosen, path, tokenizer, config, progress))
    return results


def target(
    config: PrepareConfig,
    names: list[str],
    tokenizer: BaseTokenizer,
    content: str,
    contents: list[str],
) -> Path:
    """Where a data set goes: its root, and a name that tells source and encoding."""
    first = "stdin" if names[0] == "-" else Path(names[0]).stem
    parts = [subset_name(first)]
    if len(contents) > 1 and content == "chat":
        parts.append("chat")
    name = config.name or "-".join([*parts, tokenizer.name])
    if config.name and len(contents) > 1 and content == "chat":
        name = f"{config.name}-chat"
    if subset_name(name) != name:
        raise UsageError(
            f"--name is {name!r}, and must be a plain name",
            hint="use letters, digits, dots, dashes and underscores",
        )
    return Path(config.dataset_path).expanduser() / name


def training_texts(sources: list[Source]) -> Iterator[str]:
    """The beginning of the corpus, for a tokenizer to learn from."""
    remaining = TRAINING_TEXT
    for source in sources:
        for document in source.read():
            for text in contents_of(document):
                yield text
                remaining -= len(text)
            if remaining <= 0:
                return


def contents_of(document: Document) -> list[str]:
    """The texts in a document."""
    if isinstance(document, str):
        return [document]
    return [message["content"] for message in document]


def fill(
    directory: Path,
    manifest: dict[str, Any],
    sources: list[Source],
    path: Path,
    tokenizer: BaseTokenizer,
    config: PrepareConfig,
    progress: Progress,
) -> Prepared:
    """Write the files and the manifest of one data set, which is to appear at `path`."""
    content = sources[0].content
    encoder = ChatTokenizer(tokenizer.encoding) if content == "chat" else tokenizer
    size = sum(source.size for source in sources)
    result = Prepared(path, content, encoder.name, encoder.vocabulary_size, size)
    for source in sources:
        for unit in units(source):
            encoded = encode_unit(unit, encoder, result, progress)
            write_unit(encoded, source, directory, config.holdout_fraction, result)
    if not result.documents:
        raise NopeError(
            f"there is nothing to train on: {result.refused} documents, none of them usable"
            if result.refused
            else "the corpus is empty",
            where=", ".join(source.name for source in sources),
            hint="give files that hold text, or conversations with an answer",
        )
    tokenizer.save(directory)
    manifest |= {
        "kind": "dataset",
        "format_version": FORMAT_VERSION,
        "content": content,
        "tokenizer": {
            "name": tokenizer.name,
            "fingerprint": tokenizer.fingerprint,
            "vocabulary_size": encoder.vocabulary_size,
        },
        "token_dtype": token_dtype(encoder.vocabulary_size).name,
        "holdout": {"rule": HOLDOUT_RULE, "fraction": config.holdout_fraction},
        "sources": [{"name": source.name, "files": source.origin} for source in sources],
        "refused_documents": result.refused,
        "shards": result.shards,
    }
    return result


def units(source: Source) -> Iterator[list[Document]]:
    """Runs of documents of about `UNIT_SIZE`, each of which becomes a shard."""
    unit: list[Document] = []
    size = 0
    for document in source.read():
        unit.append(document)
        size += sum(map(len, contents_of(document)))
        if size >= UNIT_SIZE:
            yield unit
            unit, size = [], 0
    if unit:
        yield unit


def encode_unit(
    unit: list[Document], tokenizer: BaseTokenizer, result: Prepared, progress: Progress
) -> list[tuple[float, EncodedDocument]]:
    """Encode documents, each with its `position`; refuses those with nothing to train on."""
    encoded = []
    for document in unit:
        tokens = encode(document, tokenizer)
        result.characters += sum(map(len, contents_of(document)))
        if tokens.mask is not None and not tokens.mask[1:].any():
            result.refused += 1
        else:
            encoded.append((position(document), tokens))
            result.documents += 1
            result.tokens += tokens.tokens.size
        progress(result)
    return encoded


def write_unit(
    encoded: list[tuple[float, EncodedDocument]],
    source: Source,
    directory: Path,
    fraction: float,
    result: Prepared,
) -> None:
    """Write one unit as one shard, if anything is left of it."""
    if not encoded:
        return
    held = holdout([position for position, _ in encoded], fraction)
    entry = write_shard(
        directory,
        f"shard-{len(result.shards):05d}",
        [document for index, (_, document) in enumerate(encoded) if index not in held],
        [document for index, (_, document) in enumerate(encoded) if index in held],
        token_dtype(result.vocabulary_size),
    )
    result.shards.append(entry | {"source": source.name})
    result.holdout_documents += len(held)


def encode(document: Document, tokenizer: BaseTokenizer) -> EncodedDocument:
    """A text with the end-of-text token behind it, or a conversation with its mask."""
    if isinstance(document, str):
        return EncodedDocument(np.array([*tokenizer.tokenize(document), tokenizer.end_of_text]))
    assert isinstance(tokenizer, ChatTokenizer)
    pieces = [piece for message in document for piece in tokenizer.template(message)]
    tokens = np.array([token for tokens, _ in pieces for token in tokens], dtype=np.int64)
    mask = np.repeat([written for _, written in pieces], [len(tokens) for tokens, _ in pieces])
    return EncodedDocument(tokens, mask.astype(np.uint8))


HOLDOUT_RULE = (
    "a document is held out if the first 8 bytes of its sha256, as a fraction of 2^64, are below "
    "the fraction; a shard of different documents never holds out none or all of them, but at "
    "least the lowest, and never the highest"
)


def position(document: Document) -> float:
    """Where between 0 and 1 the hash of a document falls."""
    text = document if isinstance(document, str) else json.dumps(document, sort_keys=True)
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def holdout(positions: list[float], fraction: float) -> set[int]:
    """Which documents of a shard are held out: `HOLDOUT_RULE`."""
    lowest, highest = min(positions), max(positions)
    if fraction == 0 or lowest == highest:
        return set()
    return {
        index
        for index, value in enumerate(positions)
        if (value < fraction or value == lowest) and value != highest
    }
