"""Documents to tokens, with the mask of what the model is to write. Knows no files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nope_gpt.data.documents import Conversation, Document, Preference, Refused
from nope_gpt.errors import NopeError
from nope_gpt.tokenization import BaseTokenizer, ChatTokenizer

Tokens = NDArray[np.integer[Any]]

TEMPLATE = "ChatML; content and <|im_end|> of an answer are trained, its header is not"
"""Part of what a data set is made by; changes whenever `encode` gives other tokens or masks."""


TOO_LONG = "more tokens than the limit"


@dataclass(frozen=True)
class EncodedDocument:
    """A document as tokens; for a conversation also which of them the model writes."""

    tokens: Tokens
    mask: NDArray[np.uint8] | None = None


@dataclass(frozen=True)
class Limit:
    """How long a conversation may be.

    Attributes:
        num_tokens: At most, or None for any length.
        filter_long: Refuse longer ones, instead of leaving out their last messages.
    """

    num_tokens: int | None = None
    filter_long: bool = False


def token_dtype(vocabulary_size: int) -> np.dtype[Any]:
    """The narrowest unsigned integer that holds every token of a vocabulary."""
    return np.dtype(np.uint16 if vocabulary_size <= 1 << 16 else np.uint32)


def encode(
    document: Document, tokenizer: BaseTokenizer, limit: Limit | None = None
) -> tuple[tuple[EncodedDocument, ...], bool]:
    """Encode a document: one stream of tokens, or two for a pair.

    Args:
        document: A text gets the end-of-text token behind it.
        tokenizer: For conversations a `ChatTokenizer`.
        limit: Of conversations.

    Returns:
        The streams, and whether messages were left out for their length.

    Raises:
        Refused: There is nothing to train on.
    """
    try:
        return encode_as_is(document, tokenizer, limit)
    except NopeError as error:
        raise Refused(error.what) from None


def encode_as_is(
    document: Document, tokenizer: BaseTokenizer, limit: Limit | None
) -> tuple[tuple[EncodedDocument, ...], bool]:
    """The same for a document that the tokenizer can take."""
    if isinstance(document, str):
        tokens = np.concatenate([tokenizer.encode(document), tokenizer.end_array])
        return (EncodedDocument(tokens),), False
    assert isinstance(tokenizer, ChatTokenizer)
    if isinstance(document, Conversation):
        encoded, was_cut = shortened(encode_conversation(document, tokenizer), tokenizer, limit)
        if not is_trained(encoded):
            raise Refused(TOO_LONG if was_cut else "no answer")
        return (encoded,), was_cut
    return encode_pair(document, tokenizer, limit), False


def encode_pair(
    pair: Preference, tokenizer: ChatTokenizer, limit: Limit | None
) -> tuple[EncodedDocument, ...]:
    """Both conversations of a pair; one that is too long cannot be compared, so none is cut."""
    streams = tuple(encode_conversation(side, tokenizer) for side in (pair.chosen, pair.rejected))
    if not all(is_trained(stream) for stream in streams):
        raise Refused("no answer")
    if limit and limit.num_tokens and max(s.tokens.size for s in streams) > limit.num_tokens + 1:
        raise Refused(TOO_LONG)
    return streams


def encode_conversation(conversation: Conversation, tokenizer: ChatTokenizer) -> EncodedDocument:
    """A conversation in the template, with its mask."""
    pieces = [
        (tokens, written and index >= conversation.first_trained)
        for index, message in enumerate(conversation.messages)
        for tokens, written in tokenizer.template(message)
    ]
    tokens = np.concatenate([np.empty(0, np.uint32), *(tokens for tokens, _ in pieces)])
    lengths = [tokens.size for tokens, _ in pieces]
    mask = np.repeat(np.array([written for _, written in pieces], np.uint8), lengths)
    return EncodedDocument(tokens, mask)


def shortened(
    document: EncodedDocument, tokenizer: ChatTokenizer, limit: Limit | None
) -> tuple[EncodedDocument, bool]:
    """A conversation within the limit, and whether it had to be cut.

    A sample of so many tokens also needs the token after each, so one more fits.

    Raises:
        Refused: It is longer, and longer ones are filtered.
    """
    if limit is None or limit.num_tokens is None or document.tokens.size <= limit.num_tokens + 1:
        return document, False
    if limit.filter_long:
        raise Refused(TOO_LONG)
    return cut(document, limit.num_tokens + 1, tokenizer.im_start_index), True


def cut(document: EncodedDocument, size: int, message_start: int) -> EncodedDocument:
    """Keep the whole messages among the first `size` tokens."""
    starts = np.flatnonzero(document.tokens == message_start)
    inside = starts[starts <= size]
    end = int(inside[-1]) if inside.size else 0
    assert document.mask is not None
    return EncodedDocument(document.tokens[:end], document.mask[:end])


def is_trained(document: EncodedDocument) -> bool:
    """Whether a conversation has a token to train on after its first."""
    return document.mask is not None and bool(document.mask[1:].any())
