"""The published layout: what `from_pretrained` of this package, old and new, reads."""

from __future__ import annotations

from pathlib import Path

import torch

from nope_gpt import hub
from nope_gpt.artifacts import publish
from nope_gpt.config import ExportConfig
from nope_gpt.errors import NopeError, UsageError
from nope_gpt.export.card import model_card
from nope_gpt.export.legacy import read_checkpoint
from nope_gpt.locating import locate
from nope_gpt.model import NoPEGPT
from nope_gpt.tokenization import BaseTokenizer, tokenizer_of


def export(config: ExportConfig) -> Path:
    """Write a model in the published layout, checked before it appears.

    Returns:
        The directory.

    Raises:
        NopeError: There is no such model, the place cannot be written, or what was
            written does not compute what the source computes.
    """
    if config.model is None:
        raise UsageError("there is no model to export", hint="nope export --model runs/tune")
    model, tokenizer, name = open_source(config.model)
    path = Path(config.output).expanduser() if config.output else Path("exports") / name
    with publish(path, overwrite=config.overwrite) as directory:
        hub.save(directory, model.saved())
        tokenizer.save(directory)
        (directory / "README.md").write_text(
            model_card(path.name, model, tokenizer), encoding="utf-8"
        )
        refuse_difference(model, NoPEGPT.from_saved(hub.load(directory)))
    return path


def open_source(model: str) -> tuple[NoPEGPT, BaseTokenizer, str]:
    """Load what is to be exported, and find a name for it."""
    path = Path(model).expanduser()
    if path.is_file():
        saved, tokenizer = read_checkpoint(path)
        name = path.stem
    else:
        directory = locate(model)
        saved, tokenizer = hub.load(directory), BaseTokenizer.load(directory)
        name = path.resolve().name if path.is_dir() else path.name
    return NoPEGPT.from_saved(saved), tokenizer_of(tokenizer, saved.config.vocabulary_size), name


@torch.no_grad()
def refuse_difference(source: NoPEGPT, exported: NoPEGPT) -> None:
    """Compare the logits of both on tokens spread over the vocabulary."""
    tokens = torch.linspace(0, source.vocabulary_size - 1, 64).long().unsqueeze(0)
    if not torch.equal(source(tokens), exported(tokens)):
        raise NopeError("the export does not compute what its source computes; nothing was kept")
