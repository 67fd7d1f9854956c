"""The published layout: what `from_pretrained` of this package, old and new, reads."""

from __future__ import annotations

from pathlib import Path

from nope_gpt.export.source import Source
from nope_gpt.hub import storage

LARGEST_FILE = 5_000_000_000
"""Bytes of a file of weights, as on the Hub."""


def write(directory: Path, source: Source) -> None:
    """Write the model and its tokenizer."""
    storage.save(directory, source.saved, LARGEST_FILE)
    source.tokenizer.save(directory)
