"""Everything that the calculator knows of a workload and of a plan, as numbers."""

from __future__ import annotations

from typing import Any

from nope_gpt.config import SizeConfig
from nope_gpt.sizing.arithmetic import (
    compute_optimal_tokens,
    count_parameters,
    forward_flops,
    training_flops_per_token,
)
from nope_gpt.sizing.holdings import FLOAT32, MATMUL_BYTES
from nope_gpt.sizing.memory import inference_memory, snapshot, training_memory
from nope_gpt.sizing.plans import Plan
from nope_gpt.sizing.time import Machine

ADVICE = {
    "dimensions per layer": ("32 to 128", 32, 128),
    "dimensions per head": ("64 to 128", 64, 128),
    "query heads per key": ("1 to 8", 1, 8),
    "hidden ratio": ("2 to 4", 2, 4),
}
"""What models of this kind have, from GPT-2 (33 dimensions per layer, Radford et al. 2019) to
GPT-3 (128, Brown et al. 2020); within these the loss hardly depends on the shape (Kaplan et al.,
"Scaling Laws for Neural Language Models", 2020, figure 5). Kernels of attention are made for heads
of 64 and 128."""


def ratios(config: SizeConfig) -> dict[str, float]:
    """How the parts of a shape relate."""
    values = (
        config.embedding_dimensions / config.num_decoder_layers,
        config.head_dimensions,
        config.num_q_heads / config.num_kv_heads,
        config.hidden_ratio,
    )
    return dict(zip(ADVICE, map(float, values), strict=True))


def facts(config: SizeConfig, machine: Machine) -> dict[str, Any]:
    """Everything about a workload, in units of one: bytes, operations, tokens, seconds."""
    count, tokens = count_parameters(config), config.tokens_per_sample
    forward, memory = forward_flops(config, tokens), training_memory(config)
    width = MATMUL_BYTES[config.precision]
    generating = inference_memory(config, config.context_length, width, config.sequences)
    optimal = compute_optimal_tokens(config, config.tokens_per_parameter)
    per_token = training_flops_per_token(config, tokens, causal=True)
    found: dict[str, Any] = {
        "parameters": count.as_dict() | {"total": count.total},
        "ratios": ratios(config),
        "training_memory": memory.as_dict() | {"peak": memory.peak},
        "inference_memory": generating.as_dict() | {"total": generating.total},
        "disk": {
            "model": FLOAT32 * count.total,
            "checkpoint": FLOAT32 * count.total + snapshot(config),
        },
        "forward_flops_per_sample": forward.as_dict() | {"total": forward.total},
        "training_flops_per_token": {
            "causal": per_token,
            "palm": training_flops_per_token(config, tokens, causal=False),
        },
    }
    if config.method == "pretrain":
        found["compute_optimal"] = {
            "tokens": optimal,
            "flops": optimal * per_token,
            "steps": -(-optimal // config.tokens_per_step),
            "data_bytes": optimal * (2 if config.vocabulary_size <= 1 << 16 else 4),
        } | expense(machine, machine.seconds(config, optimal), config.price)
    return found | {"settings": config.as_dict()}


def expense(machine: Machine, seconds: float | None, price: float | None) -> dict[str, Any]:
    """What a time means."""
    if seconds is None:
        return {}
    found = {
        "seconds": seconds,
        "kilowatt_hours": machine.kilowatt_hours(seconds),
        "cost": None if price is None else machine.cost(seconds, price),
    }
    return {name: value for name, value in found.items() if value is not None}


def facts_of_plan(plan: Plan, price: float | None) -> dict[str, Any]:
    """A plan in units of one."""
    return {
        "names": list(plan.names),
        "parameters": count_parameters(plan.work).total,
        "memory": plan.memory.as_dict() | {"peak": plan.memory.peak},
        "needed": plan.needed,
        "usable": plan.usable,
        "tokens": plan.tokens,
        "steps": plan.steps,
        **expense(plan.machine, plan.seconds, price),
        "settings": plan.work.as_dict(),
        "command": plan.command,
    }
