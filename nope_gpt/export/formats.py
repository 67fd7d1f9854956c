"""The formats of an export: how each is written, read again and run, and what it takes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nope_gpt.config import ExportConfig
from nope_gpt.errors import UsageError
from nope_gpt.export import gguf_files, hub_files, transformers_files, usage
from nope_gpt.export.gguf_reader import GgufReader
from nope_gpt.export.llama_cpp import LlamaCppReader
from nope_gpt.export.readers import OwnReader, Reader, TransformersReader
from nope_gpt.export.source import Source
from nope_gpt.hub.transformers_layout import ARCEE, LLAMA

Readers = list[Callable[[], Reader]]
"""What reads an artefact again."""


def write_hub(directory: Path, source: Source, _: ExportConfig) -> Readers:
    """The published layout."""
    hub_files.write(directory, source)
    return [partial(OwnReader.of, directory)]


def write_transformers(layout: str, directory: Path, source: Source, _: ExportConfig) -> Readers:
    """A layout of transformers."""
    transformers_files.write(directory, source, layout)
    is_there = TransformersReader.is_there()
    return [partial(TransformersReader if is_there else OwnReader.of, directory)]


def write_gguf(directory: Path, source: Source, config: ExportConfig) -> Readers:
    """GGUF files; each is compared tensor by tensor too, as llama.cpp rounds what it computes."""
    readers: Readers = []
    for path, kind in gguf_files.write(directory, source, config):
        readers.append(partial(GgufReader, path, kind))
        if LlamaCppReader.is_there():
            readers.append(partial(LlamaCppReader, path, kind))
    return readers


def bytes_of(source: Source, _: ExportConfig) -> int:
    """Of the weights."""
    return sum(weight.nbytes for weight in source.saved.state.values())


def bytes_with_zeros(source: Source, config: ExportConfig) -> int:
    """Of the weights, and of a matrix of zeros in each MLP."""
    shape = source.saved.config
    zeros = shape.num_decoder_layers * shape.embedding_dimensions * shape.hidden_dimensions
    return bytes_of(source, config) + zeros * source.dtype.itemsize


def bytes_of_gguf(source: Source, config: ExportConfig) -> int:
    """Of all files together at most, one in the dtype and one for each quantization."""
    whole = (bytes_with_zeros if config.dense else bytes_of)(source, config)
    return whole * (1 + len(config.quantizations))


def refuse_for_others(source: Source, _: ExportConfig) -> None:
    """Refuse what no program but ours reads.

    Raises:
        UsageError: It is that; says why.
    """
    size = source.saved.config.head_dimensions
    if size % 2:
        raise UsageError(
            f"heads of {size} dimensions are an odd number, and other programs know only even ones",
            hint="--format hub",
        )
    if source.dtype == torch.float64:
        raise UsageError(
            "the weights are float64, which other programs do not read", hint="--dtype float32"
        )


def refuse_for_gguf(source: Source, config: ExportConfig) -> None:
    """Refuse what llama.cpp does not read, or what cannot be written here.

    Raises:
        NopeError: A library is missing; names it.
        UsageError: It is no model or quantization of llama.cpp's.
    """
    refuse_for_others(source, config)
    gguf_files.refuse_impossible(source, config)


class Format(NamedTuple):
    """What there is to know of one.

    Attributes:
        write: Writes it into a directory, and says what reads it again.
        use: How it is run, for its card.
        refuse: Refuses what cannot be written, before anything is.
        num_bytes: That it takes, nearly.
        depends_on: Settings of `nope export` that are of this format alone.
        library: That the Hub offers to open it with.
        tag: That the Hub lists it by.
        is_computed: Whether it is compared by what it computes in float32 alone.
    """

    write: Callable[[Path, Source, ExportConfig], Readers]
    use: Callable[[str, Source, Path], list[str]]
    refuse: Callable[[Source, ExportConfig], None] = refuse_for_others
    num_bytes: Callable[[Source, ExportConfig], int] = bytes_of
    depends_on: Callable[[ExportConfig], dict[str, Any]] = lambda _: {}
    library: str | None = None
    tag: str | None = None
    is_computed: bool = True


FORMATS: dict[str, Format] = {
    "hub": Format(write_hub, usage.use_hub, refuse=lambda *_: None, library="nope-gpt"),
    "transformers": Format(
        partial(write_transformers, ARCEE), usage.use_transformers, library="transformers"
    ),
    "llama": Format(
        partial(write_transformers, LLAMA),
        usage.use_llama,
        num_bytes=bytes_with_zeros,
        library="transformers",
    ),
    "gguf": Format(
        write_gguf,
        usage.use_gguf,
        refuse=refuse_for_gguf,
        num_bytes=bytes_of_gguf,
        depends_on=lambda config: {"quantize": config.quantizations, "dense": config.dense},
        tag="gguf",
        is_computed=False,
    ),
}
"""By what `--format` calls them."""
