"""Preparing a model for contexts that are longer than it was trained on.

Shapes: L layers, H query heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from nope_gpt.model import NoPEGPT
from nope_gpt.network.quantization import Int8Linear
from nope_gpt.network.sharpening import NONE, Growth, Sharpening, for_context, scaled_heads


def prepare_for_context(model: NoPEGPT, length: int) -> Sharpening:
    """Prepare for a context by what was found for it, from now on.

    What was found for other contexts is dropped, being of the weights as they were. Keys that are
    in a cache were computed with the scale of their time, so a conversation has one for all of it.

    Args:
        model: Any.
        length: In tokens; see `sharpening.for_context`.
    """
    found = for_context(model.sharpenings, model.trained_context_length, length)
    if found != NONE:
        sharpen(model, found)
        model.sharpenings = {}
    return found


def sharpen(model: NoPEGPT, found: Sharpening) -> None:
    """Multiply the scores of attention before their softmax."""
    assert model.trained_context_length is not None or not found.growth
    scale_attention(model, found.scale)
    growth = Growth(found.growth, model.trained_context_length or 1) if found.growth else None
    model.decoder.set_growth(growth)


@contextmanager
def sharpened(model: NoPEGPT, found: Sharpening, trained_length: int) -> Iterator[None]:
    """Let a model attend otherwise for a while; then it is again as it was.

    Args:
        model: Any.
        found: How.
        trained_length: From which on attention grows sharper, if it does.
    """
    layers = [layer.attention.q_proj for layer in model.decoder.layers]
    parts = [each.scale if isinstance(each, Int8Linear) else each.weight.data for each in layers]
    before = [part.clone() for part in parts]
    growth = model.decoder.growth
    scale_attention(model, found.scale)
    model.decoder.set_growth(Growth(found.growth, trained_length) if found.growth else None)
    try:
        yield
    finally:
        model.decoder.set_growth(growth)
        for part, own in zip(parts, before, strict=True):
            part.copy_(own)


@torch.no_grad()
def scale_attention(model: NoPEGPT, scale: float | Tensor) -> None:
    """Multiply the scores of attention, by way of the queries' weights.

    Args:
        model: Any.
        scale: Of every head, or of each [L, H].
    """
    heads = torch.as_tensor(scale, dtype=torch.float32, device=model.device)
    heads = heads.expand(model.config.num_decoder_layers, model.config.num_q_heads)
    for layer, own in zip(model.decoder.layers, heads, strict=True):
        q_proj = layer.attention.q_proj
        if isinstance(q_proj, Int8Linear):
            q_proj.scale *= own.repeat_interleave(model.config.head_dimensions)
        else:
            q_proj.weight.copy_(scaled_heads(q_proj.weight, own))
