"""Whether a model finds a number again that it read long ago (Mohtashami and Jaggi 2023).

The number stands at some depth of a text that has nothing to do with it, and is asked for at the
end. It is found if the model's greedy continuation is the number: if every token of it is the
likeliest one after those before, which one reading of the whole shows.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from nope_gpt.errors import UsageError
from nope_gpt.evaluation.scorers import Scorer, Vocabulary

NEEDLE = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "\nWhat is the pass key? The pass key is"
ANSWER = " {key}"
DIGITS = 5


class Probe(NamedTuple):
    """A text with a number in it.

    Attributes:
        tokens: Up to the question, T of them.
        answer: That are to follow.
    """

    tokens: list[int]
    answer: list[int]


class Found(NamedTuple):
    """How often the number was found.

    Attributes:
        length: T, in tokens.
        depth: Where it stood, from 0 at the beginning to 1 at the question.
        share: Of the keys that were tried.
    """

    length: int
    depth: float
    share: float


def probe(
    tokenizer: Vocabulary, filler: Sequence[int], length: int, depth: float, seed: str
) -> Probe:
    """Hide a number in a text.

    Args:
        tokenizer: Of the model.
        filler: Tokens of a text, repeated if there are too few.
        length: T.
        depth: Share of the filler that stands before the number.
        seed: Which number, and where the filler begins.

    Raises:
        UsageError: The length leaves no room for number and question.
    """
    draw = random.Random(seed)
    key = "".join(draw.choices("0123456789", k=DIGITS))
    needle = tokenizer.tokenize(NEEDLE.format(key=key))
    question = tokenizer.tokenize(QUESTION)
    answer = tokenizer.tokenize(ANSWER.format(key=key))
    room = length - len(needle) - len(question) - (len(answer) - 1)
    if room < 1:
        raise UsageError(
            f"a pass key and what is asked of it take {length - room} tokens, and the context has "
            f"{length}",
            hint="--passkey-keys 0 leaves them out",
        )
    start = draw.randrange(len(filler))
    around = [filler[(start + place) % len(filler)] for place in range(room)]
    before = round(depth * room)
    tokens = [*around[:before], *needle, *around[before:], *question]
    return Probe(tokens, answer)


def finds(scorer: Scorer, probe: Probe) -> bool:
    """Whether the greedy continuation of the text is the number."""
    device = scorer.device
    right = torch.tensor(probe.answer, device=device)
    read = torch.tensor([*probe.tokens, *probe.answer[:-1]], device=device)
    logits = scorer.last_logits(read[None], len(right))[0]
    return bool((logits.argmax(dim=-1) == right).all())


def found_by_depth(
    scorer: Scorer,
    tokenizer: Vocabulary,
    filler: Sequence[int],
    lengths: Sequence[int],
    *,
    num_depths: int,
    num_keys: int,
    seed: int = 0,
    advance: Callable[[int], None] = lambda _: None,
) -> list[Found]:
    """Try several numbers at several depths of several lengths.

    Args:
        scorer: What is asked.
        tokenizer: Of the model.
        filler: Tokens of a text.
        lengths: In tokens.
        num_depths: Spread evenly from the beginning to the question.
        num_keys: At each depth; the same for every length.
        seed: Of the numbers.
        advance: Told how many tokens more were read.
    """
    result = []
    for length in lengths:
        with scorer.planned(length):
            for place in range(num_depths):
                depth = place / max(num_depths - 1, 1)
                hits = 0
                for number in range(num_keys):
                    asked = probe(tokenizer, filler, length, depth, f"{seed} {place} {number}")
                    hits += finds(scorer, asked)
                    advance(length)
                result.append(Found(length, depth, hits / num_keys))
    return result
