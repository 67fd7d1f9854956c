"""Documents as they are trained on, for people to look at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nope_gpt.data.documents import TEXT
from nope_gpt.data.encoding import EncodedDocument
from nope_gpt.data.shards import Dataset
from nope_gpt.tokenization import BaseTokenizer, ChatTokenizer


@dataclass(frozen=True)
class Sample:
    """A document as it would be trained on: its tokens, and which the model writes."""

    source: str
    tokenizer: BaseTokenizer
    streams: tuple[EncodedDocument, ...]


def samples_of(dataset: Dataset, count: int) -> Iterator[Sample]:
    """The first documents of each source of a data set."""
    kind = BaseTokenizer if dataset.content == TEXT else ChatTokenizer
    tokenizer = kind.load(dataset.path)
    left: dict[str, int] = {}
    for sides in dataset.sides:
        source = sides[0].source
        for index in range(min(left.setdefault(source, count), sides[0].num_documents)):
            yield Sample(source, tokenizer, tuple(side.document(index) for side in sides))
            left[source] -= 1
