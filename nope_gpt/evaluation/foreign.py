"""Models of the transformers library, to compare with.

Shapes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import importlib.util
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nope_gpt.config import EvaluateConfig
from nope_gpt.device import resolve_device, resolve_precision
from nope_gpt.errors import NopeError, UsageError, first_line
from nope_gpt.evaluation.scorers import beginning_with
from nope_gpt.network.cross_entropy import IGNORED
from nope_gpt.network.sharpening import NONE, Sharpening


class ForeignScorer:
    """A causal language model of the transformers library.

    Args:
        model: In eval mode, on its device.
        first_token: What its tokenizer puts before every text, if it does.
    """

    def __init__(self, model: Any, first_token: int | None = None) -> None:
        self.model = model
        self.first_token = first_token

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device  # type: ignore[no-any-return]

    @torch.inference_mode()
    def losses(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The cross entropy of each target [B, T], a row at a time, as all its logits exist."""
        tokens = beginning_with(self.first_token, tokens)
        rows = [
            F.cross_entropy(
                self.model(input_ids=row[None], use_cache=False).logits[0].float(),
                right,
                reduction="none",
                ignore_index=IGNORED,
            )
            for row, right in zip(tokens, targets, strict=True)
        ]
        return torch.stack(rows)

    @torch.inference_mode()
    def last_logits(self, tokens: Tensor, count: int) -> Tensor:
        """The logits after each of the last tokens: [B, T] to [B, count, V]."""
        tokens = beginning_with(self.first_token, tokens)
        output = self.model(input_ids=tokens, use_cache=False, logits_to_keep=count)
        return output.logits  # type: ignore[no-any-return]

    def planned(self, length: int) -> AbstractContextManager[Sharpening]:  # noqa: ARG002
        """As it always is."""
        return nullcontext(NONE)


class ForeignTokenizer:
    """A tokenizer of the transformers library."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def tokenize(self, text: str) -> list[int]:
        """The tokens of a text, and no others around them."""
        found = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return list(found)

    @property
    def first_token(self) -> int | None:
        """What it puts before every text, if it does."""
        whole, alone = list(self.tokenizer("a")["input_ids"]), self.tokenize("a")
        return whole[0] if whole[0] != alone[0] else None

    def num_bytes(self, tokens: list[int]) -> int:
        """Of the text that some tokens stand for."""
        text = self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
        return len(text.encode())


def open_foreign(config: EvaluateConfig) -> tuple[ForeignScorer, ForeignTokenizer, int | None]:
    """Load a model by the transformers library, its tokenizer, and how long its contexts were.

    No code of the model's is run, and nothing pickled is read.

    Raises:
        UsageError: The library is not installed, or cannot do what is asked for.
        NopeError: There is no such model, or the library does not read it.
    """
    refuse_impossible(config)
    import transformers

    device = resolve_device(config.device)
    dtype = resolve_precision(config.dtype, device)
    name, safe = str(config.model), {"trust_remote_code": False}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **safe)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, use_safetensors=True, **safe
        )
    except (OSError, ValueError, KeyError) as error:
        raise NopeError(
            f"transformers does not read this model: {first_line(error)}", where=name
        ) from None
    length = getattr(model.config, "max_position_embeddings", None)
    vocabulary = ForeignTokenizer(tokenizer)
    scorer = ForeignScorer(model.eval().to(device), vocabulary.first_token)
    return scorer, vocabulary, length


def refuse_impossible(config: EvaluateConfig) -> None:
    """Refuse what is for models of this program alone.

    Raises:
        UsageError: Names it.
    """
    if importlib.util.find_spec("transformers") is None:
        raise UsageError(
            "--library transformers needs transformers, which is not installed",
            hint="pip install 'nope-gpt[transformers]'",
        )
    if config.model is None:
        raise UsageError("there is no model", hint="--model DIRECTORY, or a Hub id")
    if config.adapter or config.dtype == "int8":
        given = "--adapter" if config.adapter else "--dtype int8"
        raise UsageError(f"{given} is for models of nope's own", hint="leave it out")
    if config.text is None:
        raise UsageError(
            "a data set holds the tokens of one of nope's tokenizers",
            hint="--text FILE, whose bits per byte can be compared",
        )
