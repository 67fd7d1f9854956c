"""Text to token ids and back, over tiktoken.

A tokenizer is tiktoken's (`r50k_base`, …), a byte-pair one trained on a corpus of
one's own (`bpe-4096`), or plain `bytes`. It travels with every artefact as
`tokenizer.json`, beside which `tokenizer.tiktoken` holds the ranks of an own one.

Text never becomes a control token: only the chat template writes those.
"""

from __future__ import annotations

import codecs
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, SupportsInt

import tiktoken

from nope_gpt.artifacts import DAMAGE, write_file
from nope_gpt.byte_pairs import (
    GPT2_PATTERN,
    as_lines,
    read_lines,
    read_tokenizer_json,
    refuse_gaps,
)
from nope_gpt.config import ENCODINGS
from nope_gpt.errors import MissingError, NetworkError, NopeError, UsageError
from nope_gpt.locating import CONFIG, RANKS, TOKENIZER, locate
from nope_gpt.memory import Message

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

END_OF_TEXT = "<|endoftext|>"
CONTROL_TOKENS = ("<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>")

FILES = (TOKENIZER, RANKS)
"""What travels with an artefact."""

PUBLISHED_RANKS = {
    "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930": "r50k_base",
    "94b5ca7dff4d00767bc256fdd1b27e5b17361d7b8a5f968547f9f23eb70d2069": "p50k_base",
    "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7": "cl100k_base",
    "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d": "o200k_base",
}
"""The sha256 of each file of ranks that OpenAI published, as tiktoken has it."""

LONG_TEXT = 1 << 18
"""Characters beyond which `encode_ordinary` may panic where `encode_to_numpy` raises."""

SMALLEST_BPE = 257
LARGEST_BPE = 1 << 20


class BaseTokenizer:
    """Tokenizer of a base model.

    Args:
        encoding: The ranks, which end with `<|endoftext|>` as the last token.
    """

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self.encoding = encoding
        self.stream = StreamDecoder(self)

    @classmethod
    def from_tiktoken(cls, name: str) -> Self:
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
            return cls(tiktoken.get_encoding(name))
        except (OSError, ValueError) as error:
            raise NetworkError(
                f"the ranks of {name} are not on this machine and cannot be fetched "
                f"({type(error).__name__})",
                where=f"TIKTOKEN_CACHE_DIR={os.environ.get('TIKTOKEN_CACHE_DIR')}",
                hint="try again with a network, or use --token-encoding bpe:4096, which needs none",
            ) from error

    @classmethod
    def of_bytes(cls) -> Self:
        """Every byte is a token: needs no training and fails on nothing."""
        return cls(encoding_of("bytes", {bytes([byte]): byte for byte in range(256)}))

    @classmethod
    def train(cls, texts: Iterable[str], vocabulary_size: int) -> Self:
        """Learn byte-pair ranks from a corpus.

        Args:
            texts: The corpus.
            vocabulary_size: Tokens, `<|endoftext|>` included; at least 257.

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
        return cls(encoding_of(bpe_name(vocabulary_size), ranks))

    @classmethod
    def from_pretrained(cls, model: str | Path, **options: Any) -> Self:
        """The tokenizer that travels with a model.

        Args:
            model: A run, checkpoint or export directory, or a Hub id.
            options: For the Hub: `revision`, `token`, `cache_dir`, `local_files_only`.

        Raises:
            NopeError: There is no such model, or its tokenizer is unknown or damaged.
        """
        return cls.load(locate(model, **options))

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read the tokenizer of an artefact: a data set or a model.

        A model of before tokenizers travelled has none; the size of its vocabulary tells
        which it is.
        """
        path = directory / TOKENIZER
        if not path.is_file() and (directory / CONFIG).is_file():
            return cls.from_tiktoken(encoding_by_size(directory))
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            if "model" in document:
                return cls(encoding_from(*read_tokenizer_json(document, str(path)), str(path)))
            name = document["name"]
        except FileNotFoundError:
            raise MissingError(f"there is no {TOKENIZER} here", where=str(directory)) from None
        except DAMAGE as error:
            raise NopeError(
                f"the tokenizer cannot be read ({type(error).__name__}: {error})", where=str(path)
            ) from None
        if name in ENCODINGS:
            return cls.from_tiktoken(name)
        if name == "bytes":
            return cls.of_bytes()
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
        return cls(encoding_of(name, ranks))

    def save(self, directory: Path) -> None:
        """Write the files that travel with an artefact."""
        content = json.dumps({"name": self.name})
        if self.is_own and self.name != "bytes":
            write_file(directory / RANKS, as_lines(self.ranks))
        write_file(directory / TOKENIZER, content.encode())

    @property
    def name(self) -> str:
        return self.encoding.name

    @property
    def is_own(self) -> bool:
        """Whether the ranks are not tiktoken's and must travel."""
        return self.name not in ENCODINGS

    @property
    def ranks(self) -> dict[bytes, int]:
        return self.encoding._mergeable_ranks

    @functools.cached_property
    def fingerprint(self) -> str:
        """A sha256 that two tokenizers share only if they give the same ids."""
        digest = hashlib.sha256(self.encoding._pat_str.encode())
        for token, rank in sorted(self.ranks.items(), key=lambda item: item[1]):
            digest.update(b"%d:%d:" % (rank, len(token)) + token)
        return digest.hexdigest()

    @property
    def vocabulary_size(self) -> int:
        return self.encoding.n_vocab

    @property
    def pad_token(self) -> int:
        return self.encoding.eot_token

    @property
    def end_of_text(self) -> int:
        """The token that ends a document."""
        return self.encoding.eot_token

    @functools.cached_property
    def end_array(self) -> NDArray[np.uint32]:
        """The token that ends a document, as an array."""
        import numpy as np

        return np.array([self.end_of_text], np.uint32)

    @property
    def stop_tokens(self) -> frozenset[int]:
        return frozenset({self.end_of_text})

    def tokenize(self, text: str) -> list[int]:
        """Encode text; what looks like a control token stays text."""
        self.stream.reset()
        if len(text) > LONG_TEXT:
            return list(map(int, self.encode(text)))
        return self.encoding.encode_ordinary(text)

    def encode(self, text: str) -> NDArray[np.uint32]:
        """The same as an array, without a Python object for each token.

        Raises:
            NopeError: A run of about a million blanks, which tiktoken cannot take.
        """
        try:
            return self.encode_whole(text)
        except UnicodeEncodeError:
            return self.encode(clean(text))
        except ValueError as error:
            raise NopeError(f"the tokenizer cannot take this text: {error}") from None

    @functools.cached_property
    def encode_whole(self) -> Callable[[str], NDArray[np.uint32]]:
        """The fastest exact way to encode a text without lone surrogates."""
        from nope_gpt.splitting import Splitter

        if self.encoding._pat_str == GPT2_PATTERN:
            return Splitter(self.encoding).encode
        return functools.partial(self.encoding.encode_to_numpy, disallowed_special=())

    def bytes_of(self, token: int) -> bytes:
        """The bytes that a token stands for.

        Raises:
            UsageError: The vocabulary has no such token.
        """
        try:
            return self.encoding.decode_single_token_bytes(token)
        except (KeyError, OverflowError):
            if 0 <= token < self.vocabulary_size:
                return b""  # The larger encodings leave some ids out.
            raise UsageError(
                f"token {token} is not in the vocabulary, which ends at {self.vocabulary_size - 1}"
            ) from None

    def decode_tokens(self, tokens: Iterable[SupportsInt]) -> str:
        """Decode a whole text."""
        return b"".join(self.bytes_of(int(token)) for token in tokens).decode(errors="replace")

    def decode_single_token(self, token: SupportsInt) -> str:
        """Decode the next token of a stream.

        A character whose bytes are spread over several tokens comes out whole with the last
        of them. Tokenizing something begins a new stream; for several streams at a time,
        give each a `StreamDecoder` of its own.
        """
        return self.stream.decode(token)


class ChatTokenizer(BaseTokenizer):
    """Tokenizer of a chat model: the base tokenizer and four control tokens after it."""

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        super().__init__(encoding)
        first = encoding.n_vocab
        self.control_tokens = {text: first + index for index, text in enumerate(CONTROL_TOKENS)}
        self.control_bytes = {id: text.encode() for text, id in self.control_tokens.items()}

    @functools.cached_property
    def control_arrays(self) -> dict[str, NDArray[np.uint32]]:
        """Each control token as an array of its own."""
        import numpy as np

        return {text: np.array([id], np.uint32) for text, id in self.control_tokens.items()}

    @property
    def vocabulary_size(self) -> int:
        return self.encoding.n_vocab + len(CONTROL_TOKENS)

    @property
    def im_start_index(self) -> int:
        return self.control_tokens["<|im_start|>"]

    @property
    def im_end_index(self) -> int:
        return self.control_tokens["<|im_end|>"]

    @property
    def stop_tokens(self) -> frozenset[int]:
        return frozenset({self.end_of_text, self.im_end_index})

    @property
    def response_tokens(self) -> list[int]:
        """The header of an answer, which a prompt ends with."""
        return [self.im_start_index, *self.encoding.encode_ordinary("assistant\n")]

    def tokenize_message(self, message: Message) -> list[int]:
        """Encode one message with the template."""
        return [token for tokens, _ in self.template(message) for token in tokens.tolist()]

    def template(self, message: Message) -> Iterator[tuple[NDArray[np.uint32], bool]]:
        """The tokens of a message, and which of them are for the model to write.

        Those are the content of an answer and the `<|im_end|>` that ends it, but neither
        its header nor the newline after it. The header of an answer is encoded by itself,
        as in a prompt; any other message is encoded whole.
        """
        role, content = message["role"], message["content"]
        start, end = (self.control_arrays[name] for name in ("<|im_start|>", "<|im_end|>"))
        if role == "assistant":
            yield start, False
            yield self.encode("assistant\n"), False
            yield self.encode(f"{content}\n"), True
            yield end, True
        else:
            yield start, False
            yield self.encode(f"{role}\n{content}\n"), False
            yield end, False
        yield self.encode("\n"), False

    def tokenize_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Encode a conversation and the header of the answer to come.

        Args:
            messages: Dicts with `role` (system, user, assistant or tool) and `content`.
        """
        self.stream.reset()
        tokens = [token for message in messages for token in self.tokenize_message(message)]
        return tokens + self.response_tokens

    def bytes_of(self, token: int) -> bytes:
        return self.control_bytes.get(token) or super().bytes_of(token)


class StreamDecoder:
    """Decode tokens one by one without ever splitting a character."""

    def __init__(self, tokenizer: BaseTokenizer) -> None:
        self.tokenizer = tokenizer
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def decode(self, token: SupportsInt) -> str:
        """The text that is complete with this token; may be empty."""
        return self.utf8.decode(self.tokenizer.bytes_of(int(token)))

    def flush(self) -> str:
        """What is left at the end: a mark for a character that was never completed."""
        return self.utf8.decode(b"", final=True)

    def reset(self) -> None:
        """Begin another stream."""
        self.utf8.reset()


def tokenizer_of(tokenizer: BaseTokenizer, vocabulary_size: int) -> BaseTokenizer:
    """The tokenizer that a model's vocabulary asks for: a chat model has four tokens more.

    Raises:
        NopeError: It fits neither a base nor a chat model.
    """
    for kind in (BaseTokenizer, ChatTokenizer):
        candidate = kind(tokenizer.encoding)
        if candidate.vocabulary_size == vocabulary_size:
            return candidate
    raise NopeError(
        f"the model has {vocabulary_size} tokens, and the tokenizer {tokenizer.name} has "
        f"{tokenizer.encoding.n_vocab}, or {tokenizer.encoding.n_vocab + len(CONTROL_TOKENS)} "
        f"for chat"
    )


def resolve(spec: str, texts: Iterable[str]) -> BaseTokenizer:
    """The tokenizer that `--token-encoding` asks for.

    Args:
        spec: A name of tiktoken's, `bytes`, `bpe:SIZE`, or the directory of an artefact.
        texts: The corpus to train on, read for `bpe:SIZE` alone.

    Raises:
        UsageError: It asks for nothing that exists.
    """
    kind, _, size = spec.partition(":")
    if kind == "bpe" and size.isdecimal():
        return BaseTokenizer.train(texts, int(size))
    if spec == "bytes":
        return BaseTokenizer.of_bytes()
    path = Path(spec).expanduser()
    if path.is_dir():
        has_own = (path / TOKENIZER).is_file()
        return BaseTokenizer.load(path) if has_own else BaseTokenizer.from_pretrained(path)
    return BaseTokenizer.from_tiktoken(spec)


def name_of(spec: str) -> str:
    """What the tokenizer that `--token-encoding` asks for is called, before it is trained."""
    kind, _, size = spec.partition(":")
    if kind == "bpe" and size.isdecimal():
        return bpe_name(int(size))
    is_known = spec in tiktoken.list_encoding_names() and not Path(spec).is_dir()
    return spec if is_known else resolve(spec, ()).name


def bpe_name(vocabulary_size: int) -> str:
    """What a byte-pair tokenizer of one's own is called."""
    return f"bpe-{vocabulary_size}"


def encoding_of(name: str, ranks: dict[bytes, int]) -> tiktoken.Encoding:
    """An encoding of our own, with `<|endoftext|>` after the ranks."""
    return tiktoken.Encoding(
        name,
        pat_str=GPT2_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: len(ranks)},
    )


def encoding_from(
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
    own = {text: id for text, id in added.items() if text not in CONTROL_TOKENS}
    if END_OF_TEXT not in own:
        raise NopeError(f"the tokenizer has no {END_OF_TEXT}", where=where)
    taken = set(ranks.values())
    for text, id in own.items():
        if id in taken or not 0 <= id < 2 * LARGEST_BPE:
            raise NopeError(f"the tokenizer gives {text} the id {id}", where=where)
    encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=own)
    for index, text in enumerate(CONTROL_TOKENS):
        if added.get(text, encoding.n_vocab + index) != encoding.n_vocab + index:
            raise NopeError(f"{text} is token {added[text]}, not one after all others", where=where)
    return encoding


def encoding_by_size(directory: Path) -> str:
    """Which of tiktoken's encodings a model without a tokenizer.json was trained with."""
    sizes = {50257: "r50k_base", 50281: "p50k_base", 100277: "cl100k_base", 200019: "o200k_base"}
    try:
        size = json.loads((directory / CONFIG).read_text(encoding="utf-8"))["vocabulary_size"]
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
        cache = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
        os.environ["TIKTOKEN_CACHE_DIR"] = str(Path(cache) / "nope-gpt" / "tiktoken")


def clean(text: str) -> str:
    """Replace lone surrogates, which no UTF-8 can hold, as tiktoken does."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
