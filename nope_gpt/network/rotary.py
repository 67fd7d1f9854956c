"""The rotary scaffold: queries and keys are turned by their position while a model begins to learn.

Without positions the order of the tokens has to be found out from the causal mask, which takes a
model long; turned, queries and keys know how far they are apart from the first step on (Su et al.
2021, equation 34). No weight belongs to it, so that it can be taken away in the middle of a run:
what is left is a NoPE GPT, which learns to do without in a few steps (Gelberg et al. 2025).

Shapes: B batch, H heads, T tokens, D head dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

BASE = 10_000.0
"""The slowest pair turns about once in 2 pi * BASE tokens."""


def turned(x: Tensor) -> Tensor:
    """Turn each pair of dimensions of [B, H, T, D], D even, by its position times its speed."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = turns(x.size(2), first.size(3), x.device)
    cos, sin = cos.type_as(x), sin.type_as(x)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def turns(length: int, pairs: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angle of each position and pair, [T, D / 2] in float32."""
    speeds = BASE ** (-torch.arange(pairs, device=device, dtype=torch.float32) / pairs)
    angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] * speeds
    return angles.cos(), angles.sin()
