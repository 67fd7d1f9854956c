"""What fewer bits for a weight cost a trained model, and what guessing ahead saves it.

    python benchmarks/approximations.py MODEL DATASET [--tokens 20000] [--prompts 20]

MODEL is a run, DATASET the directory of a data set of text in its tokenizer. The first table reads
held-out text, `--length` tokens at a time, in every dtype: the perplexity, and how often the
likeliest token is not that of float32 (a flip), wherever that one's lead is small or not. The
second continues held-out texts with the likeliest tokens, one at a time and with guesses of up to
7 tokens: how many tokens come from one reading of the weights, how much sooner they come (medians
of the ratios, the two taking turns), and whether they are the same ones. Its last line is of a
model that would write the held-out texts as people did.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nope_gpt.config import SamplingConfig
from nope_gpt.data.shards import Dataset, TokenStream
from nope_gpt.generation.continuation import Lookahead, cache_for, drawn
from nope_gpt.generation.sampling import Draws
from nope_gpt.hub.locating import locate
from nope_gpt.model import NoPEGPT
from nope_gpt.network.caching import KVCache

DTYPES: dict[str, Callable[[NoPEGPT], NoPEGPT]] = {
    "float32": lambda model: model.float(),
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "int8": lambda model: model.quantize(torch.bfloat16),
}


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--guess", type=int, default=7)
    options = parser.parse_args()
    text = TokenStream(Dataset.open(options.dataset), holdout=True)
    models = {name: change(load(options.model)) for name, change in DTYPES.items()}
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, ", end="")
    print(f"torch {torch.__version__}; {models['float32'].num_weights:,} parameters\n")
    print(approximations(models, text, options))
    print(guesses(models, text, options))


def load(name: str) -> NoPEGPT:
    """A copy of the model."""
    return NoPEGPT.from_pretrained(locate(name))


def approximations(
    models: dict[str, NoPEGPT], text: TokenStream, options: argparse.Namespace
) -> str:
    """The table of what each dtype costs."""
    count = min(options.tokens, len(text) - 1) // options.length
    samples = [
        torch.from_numpy(text.read(i * options.length, options.length + 1)) for i in range(count)
    ]
    exact = [likeliest(models["float32"], sample) for sample in samples]
    lines = ["| weights | perplexity | flipped | flipped where float32 leads by 1% or more |"]
    lines.append("|---|---|---|---|")
    for name, model in models.items():
        loss, flips, sure_flips, sure = 0.0, 0, 0, 0
        for sample, (best, lead) in zip(samples, exact, strict=True):
            logits = model(sample[None, :-1])[0].float()
            loss += F.cross_entropy(logits, sample[1:], reduction="sum").item()
            flipped, is_sure = logits.argmax(-1) != best, lead > 0.01
            flips += int(flipped.sum())
            sure_flips += int((flipped & is_sure).sum())
            sure += int(is_sure.sum())
        total = count * options.length
        lines.append(
            f"| {name} | {math.exp(loss / total):.3f} | {flips / total:.2%} of {total:,} "
            f"| {sure_flips / sure:.2%} of {sure:,} |"
        )
    return "\n".join(lines) + "\n"


def likeliest(model: NoPEGPT, sample: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest token after each, and by how much probability it leads, both [T]."""
    with torch.no_grad():
        best = model(sample[None, :-1])[0].softmax(-1).topk(2)
    return best.indices[:, 0], best.values[:, 0] - best.values[:, 1]


def guesses(models: dict[str, NoPEGPT], text: TokenStream, options: argparse.Namespace) -> str:
    """The table of what guessing ahead saves."""
    lines = [
        "| text | tokens for each reading | times as fast | same tokens |",
        "|---|---|---|---|",
    ]
    for name, model in [*models.items(), ("as people wrote it", None)]:
        ratios, readings, same = [], 0, 0
        for number in range(options.prompts):
            place = number * (len(text) - options.length) // options.prompts
            written = text.read(place, options.length + options.new_tokens).tolist()
            writer = model or Author(models["float32"], written)
            prompt = written[: options.length]
            plain, seconds, _ = greedy(writer, prompt, 0, options.new_tokens)
            guessed, sooner, count = greedy(writer, prompt, options.guess, options.new_tokens)
            ratios.append(seconds / sooner)
            readings += count
            same += plain == guessed
        faster = f"{statistics.median(ratios):.2f} (from {min(ratios):.2f} to {max(ratios):.2f})"
        total = options.prompts * options.new_tokens
        lines.append(
            f"| {name} | {total / readings:.2f} | {faster if model else 'n/a'} "
            f"| {same} of {options.prompts} |"
        )
    return "\n".join(lines) + "\n"


class Author:
    """Stands in for a model, and always says what a text says next."""

    def __init__(self, model: NoPEGPT, text: list[int]) -> None:
        self.model = model
        self.text = text
        self.device = model.device
        self.vocabulary_size = model.vocabulary_size

    def new_cache(self, *sizes: int, **options: Any) -> KVCache:
        """An empty cache, which only remembers."""
        return self.model.new_cache(*sizes, **options)

    def predict(
        self, tokens: Tensor, cache: KVCache, rows: object = None, *, every: bool = False
    ) -> Tensor:
        """Certain of the text, and after the end of it of token 0."""
        del rows
        start = len(cache.tokens[0]) + 1
        cache.remember([0], tokens)
        said = [*self.text, *[0] * 16][start : start + tokens.size(1)]
        logits = F.one_hot(torch.tensor([said]), self.vocabulary_size).float()
        return logits if every else logits[:, -1]


def greedy(
    model: NoPEGPT | Author, prompt: list[int], guess: int, count: int
) -> tuple[list[int], float, int]:
    """The likeliest tokens after a prompt, the seconds from the first to the last one, and how
    often the weights were read for them.
    """
    sampling = SamplingConfig(
        temperature=0.0, max_tokens=count, draft_tokens=guess, compile="on", repeat_penalty=0.0
    )
    cache = cache_for(model, len(prompt), sampling)
    ahead = Counted(model, cache, guess)
    tokens, started = [], 0.0
    for choice in drawn(ahead, prompt, Draws(sampling), count):
        started = started or time.perf_counter()
        tokens.append(int(choice.token))
    return tokens, time.perf_counter() - started, ahead.readings


class Counted(Lookahead):
    """Counts how often the weights are read."""

    readings = 0

    def predict(self, tokens: list[int]) -> Tensor:
        """As it is, but counted where nothing was known."""
        known = len(self.logits)
        logits = super().predict(tokens)
        self.readings += len(self.logits) != known - 1
        return logits


if __name__ == "__main__":
    main()
