"""Text to tokens and back, and the chat template."""

from nope_gpt.tokenization.tokenizers import (
    FILES,
    BaseTokenizer,
    ChatTokenizer,
    StreamDecoder,
    name_of,
    resolve,
    size_to_train,
    tokenizer_of,
)

__all__ = [
    "FILES",
    "BaseTokenizer",
    "ChatTokenizer",
    "StreamDecoder",
    "name_of",
    "resolve",
    "size_to_train",
    "tokenizer_of",
]
