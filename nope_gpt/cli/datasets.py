"""Data sets in words: what they hold, and documents as they are trained on."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from nope_gpt.amounts import format_bytes
from nope_gpt.cli.terminal import result

if TYPE_CHECKING:
    from nope_gpt.data.encoding import EncodedDocument
    from nope_gpt.data.samples import Sample

BAR_WIDTH = 40
KINDS = {"text": "documents", "chat": "conversations", "preference": "pairs"}


def summary(manifest: dict[str, Any]) -> str:
    """What a data set holds, in a line."""
    from nope_gpt.data.report import bytes_per_token

    stats = manifest["statistics"]
    return (
        f"{stats['documents']:,} {KINDS[manifest['content']]} "
        f"({stats['holdout_documents']:,} held out), {stats['tokens']:,} tokens of "
        f"{manifest['tokenizer']['name']}, {bytes_per_token(stats):.2f} bytes a token"
    )


def report(manifest: dict[str, Any]) -> str:
    """What a data set holds, in lines, with a histogram of the lengths."""
    from nope_gpt.data.report import bytes_per_token, num_refused, used_sources

    stats, tokenizer = manifest["statistics"], manifest["tokenizer"]
    kind = KINDS[manifest["content"]]
    lines = [
        f"{stats['documents']:,} {kind}, {stats['holdout_documents']:,} of them held out",
        f"{stats['tokens']:,} tokens of {tokenizer['name']} "
        f"({tokenizer['vocabulary_size']:,} in the vocabulary, {manifest['token_dtype']})",
        f"{bytes_per_token(stats):.2f} bytes of text a token, "
        f"{format_bytes(stats['text_bytes'])} in all",
        f"{counted(len(manifest['shards']), 'shard')} from "
        + ", ".join(dict.fromkeys(map(source_line, used_sources(manifest)))),
    ]
    if stats["cut"]:
        lines.append(f"{stats['cut']:,} were too long and lost their last messages")
    if num_refused(stats):
        lines.append(f"{num_refused(stats):,} refused:")
    for reason, entry in stats["refused"].items():
        lines.append(f"  {entry['count']:>9,}  {reason} (first: {entry['first']})")
    if stats["dropped"]:
        lines.append(f"{stats['dropped']:,} repeated an earlier one and were left out")
    elif stats["duplicates"]:
        lines.append(f"{stats['duplicates']:,} repeat another of the same shard (--deduplicate)")
    return "\n".join([*lines, "tokens a document", *histogram(stats["lengths"])])


def counted(count: int, noun: str) -> str:
    """A number and its noun."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def source_line(source: dict[str, Any]) -> str:
    """A source and where it comes from."""
    files = counted(len(source["files"]), "file")
    if "repo" in source:
        revision = (source.get("revision") or "")[:12]
        return f"{source['name']} ({files} of {source['repo']}@{revision})"
    return f"{source['name']} ({files})"


def histogram(lengths: list[int]) -> list[str]:
    """A bar for each power of two, from the first to the last that occurs."""
    first = next((power for power, count in enumerate(lengths) if count), 0)
    most = max([1, *lengths])
    return [
        f"  {2**power:>9,} – {2 ** (power + 1) - 1:<9,} "
        f"{'█' * round(BAR_WIDTH * count / most) or ('▏' if count else ''):<{BAR_WIDTH}} {count:,}"
        for power, count in enumerate(lengths)
        if power >= first
    ]


def show_samples(samples: Iterable[Sample], json: bool) -> None:
    """Print documents as they are trained on, or as one JSON object."""
    if json:
        result("", {"samples": [described(sample) for sample in samples]}, True)
        return
    for sample in samples:
        show_sample(sample)


def described(sample: Sample) -> dict[str, Any]:
    """A document for programs."""
    streams = []
    for index, stream in enumerate(sample.streams):
        runs = [{"text": text, "trained": trained} for text, trained in pieces(sample, index)]
        streams.append({"tokens": stream.tokens.size, "trained": num_trained(stream), "runs": runs})
    return {"source": sample.source, "streams": streams}


def num_trained(stream: EncodedDocument) -> int:
    """Tokens that the model is to write."""
    return int(stream.tokens.size if stream.mask is None else stream.mask.sum())


def show_sample(sample: Sample) -> None:
    """Print a document on stdout; what the model writes is green, or stands in brackets."""
    console = Console(highlight=False, soft_wrap=True, emoji=False)
    for index, stream in enumerate(sample.streams):
        side = ("", " (chosen)", " (rejected)")[index + 1 if len(sample.streams) > 1 else 0]
        sizes = f"{stream.tokens.size:,} tokens, {num_trained(stream):,} trained"
        console.rule(Text(f"{sample.source}{side}: {sizes}"), align="left")
        for text, written in pieces(sample, index):
            if console.is_terminal and not console.no_color:
                console.print(text, style="green" if written else "dim", markup=False, end="")
            else:
                sys.stdout.write(f"⟦{text}⟧" if written and stream.mask is not None else text)
        sys.stdout.write("\n")
        sys.stdout.flush()


def pieces(sample: Sample, index: int) -> list[tuple[str, bool]]:
    """Runs of tokens that are all trained, or none of them, as text."""
    import numpy as np

    stream = sample.streams[index]
    if stream.mask is None:
        return [(sample.tokenizer.decode_tokens(stream.tokens.tolist()), True)]
    edges = [0, *(np.flatnonzero(np.diff(stream.mask)) + 1).tolist(), stream.tokens.size]
    return [
        (sample.tokenizer.decode_tokens(stream.tokens[a:b].tolist()), bool(stream.mask[a]))
        for a, b in pairwise(edges)
        if b > a
    ]
