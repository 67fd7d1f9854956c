"""What is exported: a model with its adapters folded in, its tokenizer and its history."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from nope_gpt.adaptation import adapters
from nope_gpt.config import UNKNOWN_CONTEXT, ExportConfig
from nope_gpt.errors import UsageError
from nope_gpt.evaluation import record
from nope_gpt.export.legacy import read_checkpoint
from nope_gpt.hub import storage
from nope_gpt.hub.history import Stage, stages_of
from nope_gpt.hub.locating import locate
from nope_gpt.hub.published_layout import TIED
from nope_gpt.hub.storage import SavedModel
from nope_gpt.model import NoPEGPT
from nope_gpt.network.sharpening import NONE, Sharpening, for_context, scaled_heads
from nope_gpt.tokenization import BaseTokenizer, ChatTokenizer, tokenizer_of


@dataclass(frozen=True)
class Source:
    """A model to export.

    Attributes:
        name: For people, and for files.
        saved: Its weights, in the dtype to write.
        exact: The same in the dtype that they were found in.
        tokenizer: A `ChatTokenizer` for a chat model.
        context_length: Tokens that programs may plan for.
        history: The stages that made it, as far as they are known.
        license: Its name, if one was given.
        evaluation: What `nope eval --record` found of these weights, and its picture.
        sharpening: What attention is to be scaled by in contexts of that length; a scale is folded
            into the weights, a growth is not.
    """

    name: str
    saved: SavedModel
    exact: SavedModel
    tokenizer: BaseTokenizer
    context_length: int
    history: list[Stage]
    license: str | None
    evaluation: tuple[dict[str, Any], bytes | None] | None = None
    sharpening: Sharpening = NONE

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights to write."""
        return self.saved.state[TIED].dtype

    @property
    def num_parameters(self) -> int:
        return sum(weight.numel() for weight in self.saved.state.values())

    def notes(self, format: str) -> dict[str, str]:
        """What those should know who run a format, by what it is about."""
        found = {}
        if longer := self.longer(format):
            found["In longer contexts"] = longer
        if self.saved.first_token is not None:
            token = self.tokenizer.decode_tokens([self.saved.first_token])
            found["Begins with"] = (
                f"{token}, before every text: {'nope' if format == 'hub' else 'its tokenizer'} "
                "puts it there"
            )
        return found

    def longer(self, format: str) -> str | None:
        """What a format says of contexts longer than were trained."""
        found, known = self.sharpening, self.saved.sharpenings
        length = f"contexts of {self.context_length:,} tokens"
        if found.scale != 1.0:
            return f"attention is scaled by {found.scale:g}, for {length}"
        if format == "hub" or not known:
            return None
        if found.growth:
            return (
                f"in {length} attention is to be scaled by {found.told}, n of them being seen, "
                "which this format cannot say: only nope does it"
            )
        return (
            "what was calibrated for longer contexts is left out; --context-length "
            f"{' or '.join(map(str, sorted(known)))} folds it in"
        )

    @property
    def is_chat(self) -> bool:
        return isinstance(self.tokenizer, ChatTokenizer)

    @property
    def ends(self) -> list[int]:
        """The tokens that end a text or an answer, the usual one first."""
        if isinstance(self.tokenizer, ChatTokenizer):
            return [self.tokenizer.im_end_index, self.tokenizer.end_of_text]
        return [self.tokenizer.end_of_text]

    @property
    def special_tokens(self) -> dict[str, int]:
        """The tokens that steer, which other programs look for in a text."""
        controls: dict[str, int] = {}
        if isinstance(self.tokenizer, ChatTokenizer):
            controls = self.tokenizer.control_tokens
        steering = {text: id for text, id in controls.items() if text.startswith("<|")}
        return self.tokenizer.encoding._special_tokens | steering

    @property
    def plain_tokens(self) -> dict[str, int]:
        """The tokens around tool calls: text, once a model writes them."""
        controls: dict[str, int] = {}
        if isinstance(self.tokenizer, ChatTokenizer):
            controls = self.tokenizer.control_tokens
        return {text: id for text, id in controls.items() if not text.startswith("<|")}

    @cached_property
    def fingerprint(self) -> str:
        """A sha256 of the weights to write and of the tokenizer."""
        digest = hashlib.sha256(self.tokenizer.fingerprint.encode())
        for name, tensor in sorted(self.saved.state.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @cached_property
    def reference(self) -> NoPEGPT:
        """The weights to write, computing in float32."""
        return in_float32(self.saved)

    @cached_property
    def exact_reference(self) -> NoPEGPT:
        """The weights as they were found, computing in float32."""
        return self.reference if self.saved is self.exact else in_float32(self.exact)


def in_float32(saved: SavedModel) -> NoPEGPT:
    """A model that computes in float32 with the weights that it is given."""
    return NoPEGPT.from_saved(cast(saved, torch.float32))


def cast(saved: SavedModel, dtype: torch.dtype) -> SavedModel:
    """A model in another dtype."""
    return replace(saved, state={name: x.to(dtype) for name, x in saved.state.items()})


def open_source(config: ExportConfig) -> Source:
    """Load what is to be exported, and find a name for it.

    Raises:
        NopeError: There is no such model, it is damaged, or it holds numbers that are not finite.
    """
    if config.model is None:
        raise UsageError("there is no model to export", hint="nope export --model runs/tune")
    path = Path(os.path.expanduser(config.model))  # noqa: PTH111  Which raises nothing.
    if os.path.isfile(path):  # noqa: PTH113
        saved, tokenizer = read_checkpoint(path)
        name, history, evaluation = path.stem, list[Stage](), None
    else:
        directory = locate(config.model)
        chosen = [adapters.place_of(name) for name in config.adapter]
        saved = adapters.folded(storage.load(directory), directory, chosen)
        tokenizer, history = (
            BaseTokenizer.load(directory),
            stages_of(chosen[-1] if chosen else directory),
        )
        name = path.resolve().name if path.is_dir() else path.name
        evaluation = None if chosen else record.kept(config.model, directory)
    storage.refuse_infinite(saved.state, config.model)
    found = for_context(saved.sharpenings, saved.trained_context_length, config.context_length or 0)
    saved = with_scale(saved, found.scale)
    if found.scale != 1.0:
        evaluation = None
    exact = saved
    if config.dtype != "auto":
        saved = cast(saved, getattr(torch, config.dtype))
        storage.refuse_infinite(saved.state, f"{config.model} in {config.dtype}")
    return Source(
        name=name,
        saved=saved,
        exact=exact,
        tokenizer=tokenizer_of(tokenizer, saved.config.vocabulary_size),
        context_length=config.context_length or saved.trained_context_length or UNKNOWN_CONTEXT,
        history=history,
        license=config.license,
        evaluation=evaluation,
        sharpening=found,
    )


def with_scale(saved: SavedModel, scale: float) -> SavedModel:
    """A model whose attention is scaled, by way of the queries' weights."""
    if scale == 1.0:
        return saved
    every = torch.tensor([scale])
    state = {
        name: scaled_heads(x, every) if ".q_proj." in name else x for name, x in saved.state.items()
    }
    return replace(saved, state=state, sharpenings={})
