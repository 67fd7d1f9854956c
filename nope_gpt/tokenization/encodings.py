"""Where the ranks of a tokenizer come from: tiktoken, a corpus, or the files of an artefact."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from operator import itemgetter
from pathlib import Path

import tiktoken

from nope_gpt.config import CONTROL_TOKENS, ENCODINGS
from nope_gpt.errors import MissingError, NetworkError, NopeError, UsageError
from nope_gpt.files.json_files import DAMAGE, read_json
from nope_gpt.files.places import cache_directory
from nope_gpt.hub.locating import CONFIG, RANKS, TOKENIZER
from nope_gpt.tokenization.byte_pairs import (
    CL100K_PATTERN,
    GPT2_PATTERN,
    O200K_PATTERN,
    as_lines,
    read_lines,
    read_tokenizer_json,
    refuse_gaps,
)

END_OF_TEXT = "<|endoftext|>"

PUBLISHED_RANKS = {
    "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930": "r50k_base",
    "94b5ca7dff4d00767bc256fdd1b27e5b17361d7b8a5f968547f9f23eb70d2069": "p50k_base",
    "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7": "cl100k_base",
    "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d": "o200k_base",
}
"""The sha256 of each file of ranks that OpenAI published, as tiktoken has it."""

PATTERNS = {"cl100k_base": CL100K_PATTERN, "o200k_base": O200K_PATTERN}
"""Those that are not GPT-2's."""

SMALLEST_BPE = 257
LARGEST_BPE = 1 << 20


def published(name: str) -> tiktoken.Encoding:
    """One of tiktoken's encodings.

    Raises:
        UsageError: There is no such encoding.
        NetworkError: Its ranks are not on this machine and cannot be fetched.
    """
    if name not in ENCODINGS:
        raise UsageError(
            f"unknown encoding {name!r}",
            hint=f"choose one of {', '.join(ENCODINGS)}, bytes, or bpe:4096",
        )
    keep_downloads()
    try:
        return tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:
        raise NetworkError(
            f"the ranks of {name} are not on this machine and cannot be fetched "
            f"({type(error).__name__})",
            where=f"TIKTOKEN_CACHE_DIR={os.environ.get('TIKTOKEN_CACHE_DIR')}",
            hint="try again with a network, or use --token-encoding bpe:4096, which needs none",
        ) from error


def of_bytes() -> tiktoken.Encoding:
    """An encoding in which every byte is a token."""
    return own("bytes", {bytes([byte]): byte for byte in range(256)})


def trained(texts: Iterable[str], vocabulary_size: int) -> tiktoken.Encoding:
    """Learn byte-pair ranks from a corpus.

    Raises:
        UsageError: The size is out of range, or the corpus has too little variety.
    """
    from rustbpe import Tokenizer

    if not SMALLEST_BPE <= vocabulary_size <= LARGEST_BPE:
        raise UsageError(
            f"a byte-pair vocabulary of {vocabulary_size} is out of range",
            hint=f"choose a size from {SMALLEST_BPE} to {LARGEST_BPE}, such as bpe:4096",
        )
    trainer = Tokenizer()
    trainer.train_from_iterator(
        (clean(text) for text in texts), vocabulary_size - 1, pattern=GPT2_PATTERN
    )
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    if len(ranks) < vocabulary_size - 1:
        raise UsageError(
            f"the corpus has variety for {len(ranks) + 1} tokens, not for {vocabulary_size}",
            hint=f"use --token-encoding bpe:{len(ranks) + 1}, or bytes, or a larger corpus",
        )
    return own(bpe_name(vocabulary_size), ranks)


def load(directory: Path) -> tiktoken.Encoding:
    """Read the encoding of an artefact: a data set or a model.

    Raises:
        NopeError: Its files are damaged.
        MissingError: There is none, and the vocabulary does not tell which it is.
        NetworkError: Its ranks are not here, and cannot be fetched.
    """
    path = directory / TOKENIZER
    if not path.is_file() and (directory / CONFIG).is_file():
        return published(name_by_size(directory))
    try:
        document = read_json(path)
        if "model" in document:
            return described(*read_tokenizer_json(document, str(path)), str(path))
        name = document["name"]
    except FileNotFoundError:
        raise MissingError(f"there is no {TOKENIZER} here", where=str(directory)) from None
    except DAMAGE as error:
        raise NopeError(
            f"the tokenizer cannot be read ({type(error).__name__}: {error})", where=str(path)
        ) from None
    if name in ENCODINGS:
        return published(name)
    if name == "bytes":
        return of_bytes()
    if not (directory / RANKS).is_file():
        raise NopeError(
            f"the tokenizer is {str(name)[:80]!r}, which is none of tiktoken's, and there is "
            f"no {RANKS} with its ranks",
            where=str(path),
        )
    ranks = read_lines(directory / RANKS)
    if name != bpe_name(len(ranks) + 1):
        raise NopeError(
            f"the tokenizer is {str(name)[:80]!r}, and {RANKS} has {len(ranks)} ranks",
            where=str(path),
        )
    return own(name, ranks)


def bpe_name(vocabulary_size: int) -> str:
    """What a byte-pair tokenizer of one's own is called."""
    return f"bpe-{vocabulary_size}"


def own(name: str, ranks: dict[bytes, int]) -> tiktoken.Encoding:
    """An encoding of our own, with `<|endoftext|>` after the ranks."""
    return tiktoken.Encoding(
        name,
        pat_str=GPT2_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: len(ranks)},
    )


def described(
    ranks: dict[bytes, int], pattern: str, added: dict[str, int], where: str
) -> tiktoken.Encoding:
    """The encoding that another tool's files describe, without a network.

    Args:
        ranks: Of the byte-pair tokens.
        pattern: For cutting text into words.
        added: Every other token, the control tokens too.
        where: It was read from.

    Raises:
        NopeError: It is damaged, or not one that this program writes.
    """
    digest = hashlib.sha256(as_lines(dict(sorted(ranks.items(), key=itemgetter(1))))).hexdigest()
    if digest in PUBLISHED_RANKS:
        name = PUBLISHED_RANKS[digest]
    else:
        refuse_gaps(ranks, where)
        is_bytes = len(ranks) == 256 and all(token[0] == rank for token, rank in ranks.items())
        name = "bytes" if is_bytes else bpe_name(len(ranks) + 1)
    if pattern != PATTERNS.get(name, GPT2_PATTERN):
        raise NopeError(f"the tokenizer cuts text into words otherwise than {name}", where=where)
    special = {text: id for text, id in added.items() if text not in CONTROL_TOKENS}
    if END_OF_TEXT not in special:
        raise NopeError(f"the tokenizer has no {END_OF_TEXT}", where=where)
    taken = set(ranks.values())
    for text, id in special.items():
        if id in taken or not 0 <= id < 2 * LARGEST_BPE:
            raise NopeError(f"the tokenizer gives {text} the id {id}", where=where)
    encoding = tiktoken.Encoding(
        name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
    )
    for index, text in enumerate(CONTROL_TOKENS):
        if added.get(text, encoding.n_vocab + index) != encoding.n_vocab + index:
            raise NopeError(f"{text} is token {added[text]}, not one after all others", where=where)
    return encoding


def name_by_size(directory: Path) -> str:
    """Which of tiktoken's encodings a model without a tokenizer.json was trained with.

    Raises:
        MissingError: Its vocabulary is none of theirs.
    """
    sizes = {50257: "r50k_base", 50281: "p50k_base", 100277: "cl100k_base", 200019: "o200k_base"}
    try:
        size = read_json(directory / CONFIG)["vocabulary_size"]
        return sizes.get(size) or sizes[size - len(CONTROL_TOKENS)]
    except DAMAGE:
        raise MissingError(
            f"this model has no {TOKENIZER}, and its vocabulary is none of tiktoken's",
            where=str(directory),
        ) from None


def keep_downloads() -> None:
    """Have tiktoken keep ranks where a reboot does not remove them."""
    chosen = any(name in os.environ for name in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"))
    if not chosen and Path("~").expanduser().is_dir():
        os.environ["TIKTOKEN_CACHE_DIR"] = str(cache_directory() / "tiktoken")


def clean(text: str) -> str:
    """Replace lone surrogates, which no UTF-8 can hold, as tiktoken does."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
