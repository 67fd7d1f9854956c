"""Low-rank adapters: attach them to a model, and fold them into its weights.

W' = W + alpha * B @ A, with A [rank, in] drawn and B [out, rank] zero at the start, on
the six matrices of every layer, as the published chat model was tuned (Hu et al.,
"LoRA", 2021, without its division by the rank).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nope_gpt.errors import UsageError
from nope_gpt.model import NoPEGPT


class LoRALinear(nn.Linear):
    """A linear layer with an adapter beside its weight.

    Args:
        linear: The layer to adapt; its weight is shared, not copied.
        rank: Rows of A and columns of B.
        alpha: Strength of the adapter.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight
        self.alpha = alpha
        new = linear.weight.detach().new_empty
        self.lora_a = nn.Parameter(new(rank, linear.in_features).normal_() / math.sqrt(rank))
        self.lora_b = nn.Parameter(new(linear.out_features, rank).zero_())

    def forward(self, x: Tensor) -> Tensor:
        adapter = F.linear(F.linear(x, self.lora_a), self.lora_b)
        return F.linear(x, self.weight) + self.alpha * adapter


def attach(model: NoPEGPT, *, rank: int, alpha: float) -> None:
    """Adapt the six matrices of every layer, and train nothing but the adapters.

    Raises:
        UsageError: The model has adapters already, or the rank exceeds a matrix.
    """
    largest = model.config.kv_dimensions
    if rank > largest:
        raise UsageError(f"--rank is {rank}, and the smallest matrix has rank {largest}")
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise UsageError("this model has adapters already: merge them first")
    model.freeze_model_parameters()
    for layer in model.decoder.layers:
        for block in (layer.attention, layer.feed_forward):
            for name, module in list(block.named_children()):
                if isinstance(module, nn.Linear):
                    setattr(block, name, LoRALinear(module, rank, alpha))


@torch.no_grad()
def merged_state(model: NoPEGPT, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The weights of a model with its adapters folded in; the model stays as it is.

    Args:
        model: With adapters.
        state: Its weights by name, if they are not those that it has now.
    """
    state = dict(state or model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            a, b = state.pop(f"{name}.lora_a"), state.pop(f"{name}.lora_b")
            state[f"{name}.weight"] = state[f"{name}.weight"] + module.alpha * (b @ a)
    return state
