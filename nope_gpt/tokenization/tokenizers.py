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
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, SupportsInt

import tiktoken

from nope_gpt.config import CONTROL_TOKENS, ENCODINGS
from nope_gpt.errors import NopeError, UsageError
from nope_gpt.files.writing import write_file
from nope_gpt.hub.locating import RANKS, TOKENIZER, locate
from nope_gpt.memory import Message
from nope_gpt.tokenization import encodings
from nope_gpt.tokenization.byte_pairs import (
    GPT2_PATTERN,
    as_lines,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FILES = (TOKENIZER, RANKS)
"""What travels with an artefact."""

LONG_TEXT = 1 << 18
"""Characters beyond which `encode_ordinary` may panic where `encode_to_numpy` raises."""


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
        return cls(encodings.published(name))

    @classmethod
    def of_bytes(cls) -> Self:
        """Every byte is a token: needs no training and fails on nothing."""
        return cls(encodings.of_bytes())

    @classmethod
    def train(cls, texts: Iterable[str], vocabulary_size: int) -> Self:
        """Learn byte-pair ranks from a corpus.

        Args:
            texts: The corpus.
            vocabulary_size: Tokens, `<|endoftext|>` included; at least 257.

        Raises:
            UsageError: The size is out of range, or the corpus has too little variety.
        """
        return cls(encodings.trained(texts, vocabulary_size))

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
        return cls(encodings.load(directory))

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
            return self.encode(encodings.clean(text))
        except ValueError as error:
            raise NopeError(f"the tokenizer cannot take this text: {error}") from None

    @functools.cached_property
    def encode_whole(self) -> Callable[[str], NDArray[np.uint32]]:
        """The fastest exact way to encode a text without lone surrogates."""
        from nope_gpt.tokenization.splitting import Splitter

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

    def num_bytes(self, tokens: Sequence[int]) -> int:
        """Of the text that some tokens stand for; those that steer stand for none."""
        steering = self.stop_tokens | set(self.encoding._special_tokens.values())
        return sum(len(self.bytes_of(token)) for token in tokens if token not in steering)

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
    size = size_to_train(spec)
    if size is not None:
        return BaseTokenizer.train(texts, size)
    if spec == "bytes":
        return BaseTokenizer.of_bytes()
    path = Path(spec).expanduser()
    if path.is_dir():
        has_own = (path / TOKENIZER).is_file()
        return BaseTokenizer.load(path) if has_own else BaseTokenizer.from_pretrained(path)
    return BaseTokenizer.from_tiktoken(spec)


def size_to_train(spec: str) -> int | None:
    """Tokens of the tokenizer that `bpe:SIZE` asks to train on the corpus; None for another."""
    kind, _, size = spec.partition(":")
    return int(size) if kind == "bpe" and size.isdecimal() else None


def name_of(spec: str) -> str:
    """What the tokenizer that `--token-encoding` asks for is called, before it is trained."""
    size = size_to_train(spec)
    if size is not None:
        return encodings.bpe_name(size)
    is_known = spec in tiktoken.list_encoding_names() and not Path(spec).is_dir()
    return spec if is_known else resolve(spec, ()).name
