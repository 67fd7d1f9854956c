"""Independent oracles: the published layout and its mathematics in plain PyTorch.

Nothing here imports the package; the names and formulas are those of the published files.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

SETTINGS = {
    "vocabulary_size": 61,
    "embedding_dimensions": 48,
    "num_q_heads": 6,
    "num_kv_heads": 2,
    "num_decoder_layers": 3,
    "hidden_ratio": 2,
    "dropout": 0.0,
}


def published_tensors(settings: dict[str, float], seed: int = 0) -> dict[str, Tensor]:
    """Random weights under their published names."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / math.sqrt(shape[-1])

    d = int(settings["embedding_dimensions"])
    kv = d // int(settings["num_q_heads"]) * int(settings["num_kv_heads"])
    hidden = d * int(settings["hidden_ratio"])
    tensors = {
        "token_classifier.linear.weight": draw(int(settings["vocabulary_size"]), d),
        "token_classifier.norm.weight": 1 + draw(d),
    }
    for layer in range(int(settings["num_decoder_layers"])):
        prefix = f"decoder.layers.{layer}"
        tensors |= {
            f"{prefix}.norm1.weight": 1 + draw(d),
            f"{prefix}.norm2.weight": 1 + draw(d),
            f"{prefix}.stage1.q_proj.weight": draw(d, d),
            f"{prefix}.stage1.k_proj.weight": draw(kv, d),
            f"{prefix}.stage1.v_proj.weight": draw(kv, d),
            f"{prefix}.stage1.out_proj.weight": draw(d, d),
            f"{prefix}.stage2.linear1.weight": draw(hidden, d),
            f"{prefix}.stage2.linear2.weight": draw(d, hidden),
        }
    return tensors


def write_published(
    path: Path,
    *,
    stated_vocabulary: int | None = None,
    tokenizer: str | None = None,
    **changes: float,
) -> dict[str, Tensor]:
    """Write a directory in the published layout; returns its tensors.

    Args:
        path: The directory to make.
        stated_vocabulary: What config.json claims, where that differs from the tensor.
        tokenizer: The name in tokenizer.json.
        changes: Settings other than `SETTINGS`.
    """
    settings = SETTINGS | changes
    tensors = published_tensors(settings)
    path.mkdir(parents=True)
    metadata = {"token_embeddings.weight": "token_classifier.linear.weight"}
    save_file(tensors, path / "model.safetensors", metadata=metadata)
    stated = settings | {"vocabulary_size": stated_vocabulary or settings["vocabulary_size"]}
    (path / "config.json").write_text(json.dumps(stated, indent=2, sort_keys=True))
    (path / "README.md").write_text("---\ntags:\n- model_hub_mixin\n---\n")
    if tokenizer:
        (path / "tokenizer.json").write_text(json.dumps({"name": tokenizer}))
    return tensors


def forward(
    tensors: dict[str, Tensor],
    tokens: Tensor,
    *,
    num_q_heads: int,
    num_kv_heads: int,
    window: int | None = None,
    pinned: int = 0,
    scales: Tensor | None = None,
    growth: tuple[float, int] | None = None,
) -> Tensor:
    """Logits [T, V] of one sequence [T], each token seeing itself and those before it.

    Args:
        tensors: Under their published names.
        tokens: [T].
        num_q_heads, num_kv_heads: Of the network.
        window: How many tokens each may see, itself included; None for all.
        pinned: How many of those are the first ones, wherever it stands.
        scales: Of the scores of each layer and head.
        growth: A rate and a length, beyond which the scores grow with the tokens that are seen.
    """
    head = tensors["token_classifier.linear.weight"]
    x = head[tokens]
    num_tokens, d = x.shape
    size = d // num_q_heads
    distance = torch.arange(num_tokens)[:, None] - torch.arange(num_tokens)[None, :]
    near = (distance < (window or num_tokens) - pinned) | (torch.arange(num_tokens) < pinned)
    visible = (distance >= 0) & near
    num_seen = visible.sum(dim=1, keepdim=True)
    layer = 0
    while f"decoder.layers.{layer}.norm1.weight" in tensors:
        prefix = f"decoder.layers.{layer}"
        normed = rms_norm(x, tensors[f"{prefix}.norm1.weight"])
        q, k, v = (normed @ tensors[f"{prefix}.stage1.{part}_proj.weight"].T for part in "qkv")
        outputs = []
        for index in range(num_q_heads):
            group = index // (num_q_heads // num_kv_heads)
            own = slice(index * size, (index + 1) * size)
            shared = slice(group * size, (group + 1) * size)
            scores = q[:, own] @ k[:, shared].T / math.sqrt(size)
            scores = scores if scales is None else scores * scales[layer, index]
            if growth:
                beyond = (num_seen / growth[1]).clamp(min=1.0)
                scores = scores * (1 + growth[0] * torch.log(beyond))
            scores = scores.masked_fill(~visible, -math.inf)
            outputs.append(torch.softmax(scores, dim=-1) @ v[:, shared])
        x = x + torch.cat(outputs, dim=-1) @ tensors[f"{prefix}.stage1.out_proj.weight"].T
        normed = rms_norm(x, tensors[f"{prefix}.norm2.weight"])
        hidden = normed @ tensors[f"{prefix}.stage2.linear1.weight"].T
        hidden = hidden * torch.sigmoid(hidden)
        x = x + hidden @ tensors[f"{prefix}.stage2.linear2.weight"].T
        layer += 1
    return rms_norm(x, tensors["token_classifier.norm.weight"]) @ head.T


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Divide by the root of the mean square, and scale."""
    return x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + 1.1920929e-07) * weight


def sample(
    logits: Tensor,
    recent: list[int],
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    repeat_penalty: float,
) -> tuple[int, float]:
    """One draw as the published program made it, on torch's global generator."""
    logits = logits.clone()
    for token in recent:
        logits[token] -= repeat_penalty * abs(logits[token])
    values, indices = torch.topk(logits, top_k, sorted=True)
    probabilities = torch.softmax(values / temperature, dim=-1)
    total = torch.cumsum(probabilities, dim=-1)
    keep = total <= max(top_p, float(probabilities[0]))
    indices, values = indices[keep], values[keep]
    probabilities = torch.softmax(values / temperature, dim=-1)
    choice = int(torch.multinomial(probabilities, 1))
    return int(indices[choice]), float(probabilities[choice])
