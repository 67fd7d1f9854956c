"""The published layout: the names that settings and tensors have on disk, of every generation.

In memory tensors have names that explain themselves; the tables here are the only place where
both are known.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from nope_gpt.config import ModelConfig
from nope_gpt.errors import NopeError
from nope_gpt.hub.locating import CONFIG

HISTORICAL_SETTINGS = {
    "num_layers": ("num_decoder_layers",),
    "num_hidden_layers": ("num_decoder_layers",),
    "feed_forward_ratio": ("hidden_ratio",),
    "num_heads": ("num_q_heads", "num_kv_heads"),
    "num_attention_heads": ("num_q_heads", "num_kv_heads"),
}

HISTORICAL_NAMES = (
    (r"^(?:_orig_mod\.|model\.)+", ""),
    (r"^(?:body|decoder)\.(\d+)\.", r"decoder.layers.\1."),
    (r"\.attention\.", ".stage1."),
    (r"\.(?:mlp\.layers\.0|feedforward\.linear1)\.", ".stage2.linear1."),
    (r"\.(?:mlp\.layers\.2|feedforward\.linear2)\.", ".stage2.linear2."),
    (r"\.stage1\.in_proj_weight$", ".stage1.qkv_proj.weight"),
    (r"^output_norm\.", "token_classifier.norm."),
    (r"^output_layer\.", "token_classifier.linear."),
)

LAYER_NAMES = {
    "norm1": "attention_norm",
    "stage1.q_proj": "attention.q_proj",
    "stage1.k_proj": "attention.k_proj",
    "stage1.v_proj": "attention.v_proj",
    "stage1.out_proj": "attention.out_proj",
    "norm2": "feed_forward_norm",
    "stage2.linear1": "feed_forward.up",
    "stage2.linear2": "feed_forward.down",
}

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""That weights may have."""

TIED = "token_embeddings.weight"
TIED_PUBLISHED = "token_classifier.linear.weight"

FIRST_TOKEN = "first_token"
"""The key of config.json that says what all that a model reads begins with."""


def published_names(num_layers: int) -> dict[str, str]:
    """Map the name of every tensor in memory to its published name."""
    names = {TIED: TIED_PUBLISHED, "norm.weight": "token_classifier.norm.weight"}
    for layer in range(num_layers):
        for published, ours in LAYER_NAMES.items():
            prefix = f"decoder.layers.{layer}."
            names[f"{prefix}{ours}.weight"] = f"{prefix}{published}.weight"
    return names


def rename_settings(settings: dict[str, Any], where: str) -> dict[str, Any]:
    """Give historical settings their published names and check that none is missing.

    Raises:
        NopeError: One is missing.
    """
    result = dict(settings)
    for old, names in HISTORICAL_SETTINGS.items():
        if old in settings:
            result = dict.fromkeys(names, settings[old]) | result
    needed = ("embedding_dimensions", "num_q_heads", "num_kv_heads", "num_decoder_layers")
    for name in (*needed, "hidden_ratio"):
        if name not in result:
            raise NopeError(f"{CONFIG} has no {name}: this is not a NoPE GPT", where=where)
    return result


def translate(tensors: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """Give tensors of any generation the names they have in memory.

    Raises:
        NopeError: A tensor belongs to another network, such as a table of positions.
    """
    published: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for pattern, replacement in HISTORICAL_NAMES:
            name = re.sub(pattern, replacement, name)
        if name.endswith(".stage1.qkv_proj.weight"):
            prefix = name.removesuffix("qkv_proj.weight")
            if tensor.dim() != 2 or tensor.size(0) % 3:
                raise NopeError(f"{name} has shape {tuple(tensor.shape)}", where=where)
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                published[f"{prefix}{part}_proj.weight"] = rows.clone()
        else:
            published[name] = tensor
    if TIED in published:
        embedding = published.pop(TIED)
        head = published.setdefault(TIED_PUBLISHED, embedding)
        if head is not embedding and not torch.equal(head, embedding):
            raise NopeError("the embedding and the head differ, and must be tied", where=where)
    found = (re.match(r"decoder\.layers\.(\d+)", name) for name in published)
    layers = {match[1] for match in found if match}
    ours = {theirs: name for name, theirs in published_names(len(layers)).items()}
    unknown = sorted(published.keys() - ours.keys())
    if unknown:
        positions = any("position" in name for name in unknown)
        reason = "it has positional embeddings" if positions else f"it holds {unknown[0]}"
        raise NopeError(f"this is another network than NoPE GPT: {reason}", where=where)
    return {ours[name]: tensor for name, tensor in published.items()}


def check_shapes(config: ModelConfig, state: dict[str, Tensor], where: str) -> None:
    """Check that every tensor is there and has the shape that the config says.

    Raises:
        NopeError: One is missing, has another shape or type, or is one too many.
    """
    d, kv, hidden = config.embedding_dimensions, config.kv_dimensions, config.hidden_dimensions
    shapes = {
        TIED: (config.vocabulary_size, d),
        "q_proj.weight": (d, d),
        "k_proj.weight": (kv, d),
        "v_proj.weight": (kv, d),
        "out_proj.weight": (d, d),
        "up.weight": (hidden, d),
        "down.weight": (d, hidden),
        "norm.weight": (d,),
    }
    for name in published_names(config.num_decoder_layers):
        if name not in state:
            raise NopeError(f"{CONFIG} asks for {name}, which is not there", where=where)
        expected = next(shape for suffix, shape in shapes.items() if name.endswith(suffix))
        if tuple(state[name].shape) != expected:
            raise NopeError(
                f"{name} has shape {tuple(state[name].shape)}, and {CONFIG} asks for {expected}",
                where=where,
            )
        if state[name].dtype not in DTYPES:
            raise NopeError(f"{name} holds {state[name].dtype}, not weights", where=where)
    extra = sorted(state.keys() - published_names(config.num_decoder_layers).keys())
    if extra:
        raise NopeError(f"{CONFIG} has no place for {extra[0]}", where=where)
