"""Opening the model that `--model` names, for the commands that use one."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from nope_gpt.adaptation import adapters, reach
from nope_gpt.cli.terminal import say, waiting
from nope_gpt.config import GenerateConfig, ModelChoice, WritingConfig
from nope_gpt.device import draw_seed, resolve_device, resolve_precision, seed_of
from nope_gpt.errors import UsageError
from nope_gpt.hub import storage
from nope_gpt.hub.locating import locate
from nope_gpt.hub.storage import Tell
from nope_gpt.model import NoPEGPT
from nope_gpt.network.sharpening import NONE
from nope_gpt.tokenization import BaseTokenizer, tokenizer_of


def open_model(config: WritingConfig, command: str) -> tuple[NoPEGPT, BaseTokenizer]:
    """Load a model and its tokenizer, and seed the draws.

    Raises:
        NopeError: There is no such model, or its files are damaged.
    """
    directory = find_model(config, command)
    with waiting(f"loading {config.model}"):
        model, tokenizer = load_model(directory, config)
    torch.manual_seed(draw_seed() if config.seed is None else config.seed)
    return model, tokenizer


def prepare_for_context(model: NoPEGPT, planned: int, *, is_told_later: bool = False) -> None:
    """Prepare a model for a context of so many tokens, and say what that means.

    Args:
        model: Any.
        planned: Tokens.
        is_told_later: Whether it is told, once it is so, that a context is longer than was trained.
    """
    trained = model.trained_context_length
    if trained is None or planned <= trained:
        return
    found = reach.prepare_for_context(model, planned)
    done = (
        f"its attention is scaled by {found.told}, as `nope eval --calibrate` found"
        if found != NONE
        else "what it writes beyond them may be worse"
    )
    if found != NONE or not is_told_later:
        say(f"note: trained on {trained:,} tokens of context; {done}", style="dim")


def find_model(config: ModelChoice, command: str) -> Path:
    """The directory of the model that is named, downloaded if it is on the Hub.

    Raises:
        NopeError: None is named, or there is no such model.
    """
    if config.model is None:
        raise UsageError(
            "there is no model",
            hint=f"nope {command} --model runs/tune, or --model andrewdalpino/NoPE-GPT-400M-Chat",
        )
    return locate(config.model, partial(say, style="yellow"))


def load_model(
    directory: Path, config: ModelChoice, tell: Tell = lambda _: None
) -> tuple[NoPEGPT, BaseTokenizer]:
    """Load a model and its tokenizer, adapters folded in, without a word on the terminal.

    Raises:
        NopeError: Files are damaged, or there is no such adapter or device.
    """
    device = resolve_device(config.device)
    chosen = [adapters.place_of(name) for name in config.adapter]
    saved = adapters.folded(storage.load(directory, tell), directory, chosen)
    model = in_dtype(NoPEGPT.from_saved(saved), config.dtype, device).to(device)
    return model, tokenizer_of(BaseTokenizer.load(directory), model.vocabulary_size)


def in_dtype(model: NoPEGPT, name: str, device: torch.device) -> NoPEGPT:
    """A model in the dtype that --dtype names; the integers are of the stored weights."""
    if name == "int8":
        return model.quantize(resolve_precision("auto", device))
    return model.to(resolve_precision(name, device))


def seed_for(config: GenerateConfig, prompt: int, sample: int) -> int:
    """The seed of one continuation of one of several prompts, drawn if none was given."""
    return draw_seed() if config.seed is None else seed_of(config.seed, prompt, sample)
