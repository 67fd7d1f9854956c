"""A nanoGPT-class network on characters, with the settings that nanoGPT publishes for a CPU.

What `learn.py` compares with; nothing here is of this project but the evaluation.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nope_gpt.evaluation.lengths import bits_per_byte, spans_of, windowed_losses


class Peer(nn.Module):
    """A nanoGPT-class network: learned positions, LayerNorm, GELU, tied head."""

    def __init__(self, vocabulary: int, d: int = 128, layers: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.length = heads, 64
        self.tokens, self.places = nn.Embedding(vocabulary, d), nn.Embedding(self.length, d)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "before": nn.LayerNorm(d, bias=False),
                    "qkv": nn.Linear(d, 3 * d, bias=False),
                    "out": nn.Linear(d, d, bias=False),
                    "between": nn.LayerNorm(d, bias=False),
                    "up": nn.Linear(d, 4 * d, bias=False),
                    "down": nn.Linear(4 * d, d, bias=False),
                }
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(d, bias=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                deep = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * layers) if deep else 0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The loss of each target [B, T]."""
        x = self.tokens(tokens) + self.places.weight[: tokens.size(1)]
        for block in self.blocks:
            q, k, v = (
                part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                for part in block["qkv"](block["before"](x)).chunk(3, dim=-1)
            )
            seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + block["out"](seen.transpose(1, 2).flatten(2))
            x = x + block["down"](F.gelu(block["up"](block["between"](x))))
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")


class PeerNetwork:
    """The same, to be evaluated as ours is."""

    device = torch.device("cpu")

    def __init__(self, model: Peer) -> None:
        self.model = model

    @torch.inference_mode()
    def losses(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return self.model(tokens, targets)  # type: ignore[no-any-return]


def train_peer(train: str, held_out: str, seconds: float, seed: int) -> dict[str, Any]:
    """nanoGPT's published settings for a CPU, its schedule stretched over the seconds."""
    torch.manual_seed(seed)
    letters = {letter: i for i, letter in enumerate(sorted(set(train)))}
    tokens = torch.tensor([letters[letter] for letter in train])
    model = Peer(len(letters))
    matrices = [weight for weight in model.parameters() if weight.dim() == 2]
    rest = [weight for weight in model.parameters() if weight.dim() != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))
    begun_at, step, elapsed = time.perf_counter(), 0, 0.0
    while elapsed < seconds:
        part = elapsed / seconds
        rate = 1e-4 + 0.5 * (1 + math.cos(math.pi * part)) * (1e-3 - 1e-4)
        for group in optimizer.param_groups:
            group["lr"] = min(rate, 1e-3 * (step + 1) / 100)
        starts = torch.randint(len(tokens) - 65, (12,))
        rows = torch.stack([tokens[start : start + 65] for start in starts])
        model(rows[:, :-1], rows[:, 1:]).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step, elapsed = step + 1, time.perf_counter() - begun_at
    text = "".join(letter for letter in held_out if letter in letters)
    spans = spans_of(torch.tensor([letters[letter] for letter in text]), 64, 10**9)
    losses = windowed_losses(PeerNetwork(model), spans, 64)
    size = len(text.encode()) * losses.numel() / len(text)
    return {
        "bits_per_byte": bits_per_byte(float(losses.sum()), round(size)),
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "seconds": elapsed,
        "steps": step,
        "tokens": step * 12 * 64,
    }
