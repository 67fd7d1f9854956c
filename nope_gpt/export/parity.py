"""The gate: what was written is read again, and must be what its source is.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

import random
from contextlib import suppress

import torch
from torch import Tensor
from torch.nn import functional as F

from nope_gpt.errors import NopeError
from nope_gpt.export.readers import OwnReader, Reader
from nope_gpt.export.record import NUM_CONTINUED, Report
from nope_gpt.export.source import Source
from nope_gpt.memory import Message
from nope_gpt.tokenization import BaseTokenizer

NUM_TOKENS = 256
"""Tokens whose logits are compared."""

NUM_TEXTS = 400
"""Texts of every script whose tokens are compared."""

WORDS_IN_A_TEXT = 100
"""Tokens of the vocabulary in a text that is made of them."""

CONVERSATION: list[Message] = [
    {"role": "system", "content": "You are brief. Vous êtes bref. 簡潔に。"},
    {"role": "user", "content": "What is  the\ncapital of France?\n\n- Paris\n- Rome"},
    {"role": "assistant", "content": "Paris. 🗼"},
    {"role": "user", "content": "\tAnd of 日本?  "},
]

SCRIPTS = (
    (0x20, 0x7F), (0xA0, 0x250), (0x370, 0x500), (0x590, 0x700), (0x900, 0x980), (0xE00, 0xE5C),
    (0x3041, 0x30FF), (0x4E00, 0x5200), (0xAC00, 0xAD00), (0x2000, 0x2070), (0x1F300, 0x1F700),
    (0x300, 0x370), (1, 0x20),
)  # fmt: skip
"""Of Unicode: Latin to Hangul, punctuation, emoji, marks that join, and what steers terminals."""

BLANKS = (" ", "  ", "\n", "\n\n", "\t", "\r\n", " \n ", "\u3000")


def compare(source: Source, reader: Reader) -> Report:
    """Compare an artefact with its source.

    A file that is rounded by design is compared with the weights as they were found.
    """
    rounded = reader.tolerance.error is None
    own = OwnReader(source.exact_reference if rounded else source.reference, source.tokenizer)
    vocabulary_size = source.saved.config.vocabulary_size
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary_size, (NUM_TOKENS,), generator=generator).tolist()
    right, found = own.logits(tokens), reader.logits(tokens)
    largest = right.abs().max().item()
    error = (found - right).abs().max().item()
    divergence = kl_divergence(right, found)
    opening = tokens[:16]
    continuation = reader.continuation(opening, NUM_CONTINUED)
    slack = 2 * max(reader.tolerance.error or 0.0, 1e-6) * largest
    continued = sum(followed(own.logits([*opening, *continuation]), opening, continuation, slack))
    same, num_texts = same_tokens(source, own, reader)
    allowed = reader.tolerance
    complaints = []
    if not found.isfinite().all():
        complaints.append("its logits are not finite")
    if allowed.error is not None and not error <= allowed.error * largest:
        complaints.append(
            f"its logits are off by {error:.3g}, and {allowed.error * largest:.3g} is allowed"
        )
    if not divergence <= allowed.divergence:
        complaints.append(
            f"its distributions diverge by {divergence:.3g} nats, and {allowed.divergence:.3g} "
            f"is allowed"
        )
    if allowed.error is not None and continued < NUM_CONTINUED:
        complaints.append(f"{NUM_CONTINUED - continued} of its greedy tokens are not likeliest")
    complaints += other_tensors(source, reader)
    if same < num_texts:
        complaints.append(f"{num_texts - same} of {num_texts} texts have other tokens")
    return Report(
        read_by=reader.name,
        num_tokens=NUM_TOKENS,
        largest_error=error,
        largest_logit=largest,
        divergence=divergence,
        likeliest=(found.argmax(-1) == right.argmax(-1)).float().mean().item(),
        continued=continued,
        num_texts=num_texts,
        texts=same,
        complaints=tuple(complaints),
    )


def other_tensors(source: Source, reader: Reader) -> list[str]:
    """Which weights are not the source's, where they are to be the numbers themselves."""
    if not isinstance(reader, OwnReader) or reader.tolerance.error is None:
        return []
    found = reader.model.state_dict()
    return [
        f"{name} has other numbers"
        for name, right in source.reference.state_dict().items()
        if not torch.equal(found[name], right)
    ]


def refuse_difference(report: Report, what: str) -> None:
    """Raise what a report complains of.

    Raises:
        NopeError: The artefact is not what its source is.
    """
    if report.complaints:
        raise NopeError(
            f"the export is not what its source is, and was not kept: "
            f"{'; '.join(report.complaints)}",
            where=f"{what}, read by {report.read_by}",
        )


def kl_divergence(right: Tensor, found: Tensor) -> float:
    """Nats from some distributions to others, in the mean: both [T, V], as logits."""
    right, found = (F.log_softmax(x.double(), dim=-1) for x in (right, found))
    return F.kl_div(found, right, reduction="batchmean", log_target=True).item()


def followed(logits: Tensor, opening: list[int], tokens: list[int], slack: float) -> list[bool]:
    """Which of some tokens are likeliest after those before them, or nearly so."""
    before = logits[len(opening) - 1 : -1]
    chosen = before.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    return (chosen >= before.max(dim=-1).values - slack).tolist()


def same_tokens(source: Source, own: OwnReader, reader: Reader) -> tuple[int, int]:
    """How many texts have the same tokens in both, and how many were compared."""
    listing = [*texts(NUM_TEXTS), *own_words(source.tokenizer)]
    same = sum(own.tokenize(text) == list(reader.tokenize(text)) for text in listing)
    if source.is_chat:
        same += own.tokenize_prompt(CONVERSATION) == list(reader.tokenize_prompt(CONVERSATION))
    return same, len(listing) + source.is_chat


def own_words(tokenizer: BaseTokenizer) -> list[str]:
    """Texts in which every token of a tokenizer that is whole characters is a line."""
    words = []
    for token in tokenizer.ranks:
        with suppress(UnicodeDecodeError):
            words.append(token.decode())
    lines = range(0, len(words), WORDS_IN_A_TEXT)
    return ["\n".join(words[first : first + WORDS_IN_A_TEXT]) for first in lines]


def texts(count: int, seed: int = 0) -> list[str]:
    """Texts of many scripts, blanks and emoji; always the same ones."""
    draw = random.Random(seed)
    result = []
    for _ in range(count):
        parts = []
        for _ in range(draw.randint(1, 6)):
            first, end = draw.choice(SCRIPTS)
            if draw.random() < 0.4:
                parts.append(draw.choice((*BLANKS, " " * draw.randint(1, 60))))
            parts += (chr(draw.randrange(first, end)) for _ in range(draw.choice((1, 2, 3, 8))))
            if draw.random() < 0.2:
                parts.append(chr(draw.randrange(first, end)) * draw.randint(1, 20))
        result.append("".join(parts))
    return result
