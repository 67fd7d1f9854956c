"""`nope size`."""

from __future__ import annotations

from typing import Any

from nope_gpt import sizing
from nope_gpt.cli.options import JSON, configured
from nope_gpt.cli.terminal import result
from nope_gpt.config import SizeConfig
from nope_gpt.sizing import format_bytes, format_count


@configured(SizeConfig, JSON)
def command(config: SizeConfig, json: bool) -> None:
    """Calculate parameters, memory and arithmetic of a shape, before training it.

    With --memory, find the largest published shape that trains in that much, and the
    line that does it.

    Examples:

    - `nope size --embedding-dimensions 2048 --num-q-heads 32 --num-kv-heads 8`

    - `nope size --memory 24GB`
    """
    plan = None
    if config.memory is not None:
        memory = sizing.parse_memory(config.memory)
        plan = sizing.largest_that_trains(memory, config)
        config = plan.config
    facts = describe(config)
    if plan is not None:
        usable = sizing.usable_memory(memory)
        facts |= {"plan": plan.name, "usable_memory": usable, "command": plan.command}
    result(table(config, facts), facts, json)


def describe(config: SizeConfig) -> dict[str, Any]:
    """Everything that `nope size` knows about a shape, in units of one."""
    tokens = config.tokens_per_sample
    optimal = sizing.compute_optimal_tokens(config)
    memory = sizing.training_memory(config)
    return {
        "parameters": {
            **sizing.count_parameters(config).as_dict(),
            "total": sizing.count_parameters(config).total,
        },
        "forward_flops_per_sample": sizing.forward_flops(config, tokens),
        "training_flops_per_token": {
            "causal": sizing.training_flops_per_token(config, tokens, causal=True),
            "palm": sizing.training_flops_per_token(config, tokens, causal=False),
        },
        "compute_optimal_tokens": optimal,
        "compute_optimal_flops": sizing.training_flops(config, tokens, optimal, causal=True),
        "training_memory": {**memory.as_dict(), "peak": memory.peak},
        "inference_memory": {
            "tokens": tokens,
            "bytes": sizing.inference_memory(config, tokens, 4).total,
        },
        "settings": config.as_dict(),
    }


def table(config: SizeConfig, facts: dict[str, Any]) -> str:
    """The facts for people, a section for each question."""
    parameters, memory = facts["parameters"], facts["training_memory"]
    flops = facts["training_flops_per_token"]
    head = [
        f"{config.embedding_dimensions} dimensions, {config.num_q_heads}/{config.num_kv_heads} "
        f"heads, {config.num_decoder_layers} layers, hidden ratio {config.hidden_ratio}, "
        f"vocabulary {config.vocabulary_size:,}",
        "",
        *section("Parameters", {name: f"{count:,}" for name, count in parameters.items()}),
        *section(
            f"Memory to train, {config.batch_size} x {config.tokens_per_sample:,} tokens, "
            f"{config.optimizer}, {config.precision}"
            f"{', activation checkpointing' if config.activation_checkpointing else ''}",
            {name: format_bytes(amount) for name, amount in memory.items() if amount},
        ),
        *section(
            "Arithmetic",
            {
                "forward pass of a sample": f"{facts['forward_flops_per_sample']:.3e} FLOPs",
                "training, per token": f"{flops['causal']:.3e} FLOPs (causal), "
                f"{flops['palm']:.3e} (PaLM convention)",
                "compute-optimal": f"{format_count(facts['compute_optimal_tokens'])} tokens "
                f"(20 per parameter), {facts['compute_optimal_flops']:.3e} FLOPs",
            },
        ),
        *section(
            f"Memory to generate with {config.tokens_per_sample:,} tokens of context, float32",
            {"weights and cache": format_bytes(facts["inference_memory"]["bytes"])},
        ),
    ]
    if "plan" in facts:
        usable = format_bytes(facts["usable_memory"])
        head += [f"{facts['plan']} trains in {usable} of usable memory:", f"  {facts['command']}"]
    return "\n".join(head).rstrip()


def section(title: str, rows: dict[str, str]) -> list[str]:
    """A title and rows below it, names and values in columns."""
    width = max(map(len, rows)) + 2
    lines = [f"  {name.replace('_', ' '):<{width}}{value}" for name, value in rows.items()]
    return [title, *lines, ""]
