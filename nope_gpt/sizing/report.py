"""Everything that the calculator knows of a workload, as numbers and as tables."""

from __future__ import annotations

import dataclasses
from typing import Any

from nope_gpt.amounts import format_bytes, format_count, format_seconds
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


@dataclasses.dataclass(frozen=True)
class Section:
    """A table: a row is a name, a value, and perhaps a share of the whole to draw."""

    title: str
    rows: list[tuple[str, str, float | None]]


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


def shares(amounts: dict[str, int], of: int, written: Any) -> list[tuple[str, str, float | None]]:
    """Amounts as rows, each with its share of the whole."""
    names = {name: name.replace("_", " ") for name in amounts}
    return [
        (names[name], written(amount), amount / of if name not in ("total", "peak") else None)
        for name, amount in amounts.items()
        if amount
    ]


def workload_in_words(config: SizeConfig) -> str:
    """How it is trained."""
    words = [
        f"{config.batch_size} x {config.tokens_per_sample:,} tokens",
        config.optimizer,
        config.precision,
    ]
    if config.method != "pretrain":
        words.insert(0, config.method if config.trains_all else f"{config.method}, {config.rank=}")
    if config.recomputed_blocks:
        words.append("activation checkpointing")
    if config.compile == "on":
        words.append("compiled")
    if config.gpus > 1:
        words.append(f"{config.gpus} GPUs, sharding level {config.sharding}")
    return ", ".join(words).replace("config.rank=", "rank ")


def sections(config: SizeConfig, machine: Machine, found: dict[str, Any]) -> list[Section]:
    """The facts for people, a section for each question."""
    count, memory = found["parameters"], found["training_memory"]
    generating, forward = found["inference_memory"], found["forward_flops_per_sample"]
    per_token = found["training_flops_per_token"]
    result = [
        Section("Parameters", shares(count, count["total"], "{:,}".format)),
        Section(
            "Shape",
            [
                (name, f"{value:g}{advice(name, value)}", None)
                for name, value in found["ratios"].items()
            ],
        ),
        Section(
            f"Memory to train: {workload_in_words(config)}",
            shares(memory, memory["peak"], format_bytes),
        ),
        Section(
            f"Memory to generate: {config.sequences} x {config.context_length:,} tokens, "
            f"{config.precision}",
            shares(generating, generating["total"], format_bytes),
        ),
        Section(
            "Disk",
            [
                ("model", format_bytes(found["disk"]["model"]), None),
                ("checkpoint", format_bytes(found["disk"]["checkpoint"]), None),
            ],
        ),
        Section(
            f"Operations of a forward pass: {config.tokens_per_sample:,} tokens",
            shares(forward, forward["total"], "{:.3e}".format),
        ),
        Section(
            "Operations to train, per token",
            [
                ("causal", f"{per_token['causal']:.3e}", None),
                ("PaLM convention", f"{per_token['palm']:.3e}", None),
            ],
        ),
    ]
    if "compute_optimal" in found:
        result.append(horizon(config, machine, found["compute_optimal"]))
    return result


def advice(name: str, value: float) -> str:
    """What is usual, where a shape is not."""
    words, least, most = ADVICE[name]
    return "" if least <= value <= most else f"   (usual are {words})"


def horizon(config: SizeConfig, machine: Machine, found: dict[str, Any]) -> Section:
    """A whole run."""
    rows = [
        ("tokens", format_count(found["tokens"])),
        ("data", format_bytes(found["data_bytes"])),
        ("steps", f"{found['steps']:,} of {format_count(config.tokens_per_step)} tokens"),
        ("operations", f"{found['flops']:.2e} (causal)"),
        *expense_in_words(machine, found),
    ]
    title = f"Compute-optimal run: {config.tokens_per_parameter:g} tokens per parameter"
    return Section(title, [(name, value, None) for name, value in rows])


def expense_in_words(machine: Machine, found: dict[str, Any]) -> list[tuple[str, str]]:
    """Time, energy and cost, as far as they are known."""
    if "seconds" not in found:
        return [("time", "n/a: name the device with --gpu, or measure it with --measure")]
    measured = machine.measurement
    share = f"as measured on {measured.device}" if measured else ""
    share = share or f"at {machine.utilization:.0%} of the peak"
    rows = [("time", f"{format_seconds(found['seconds'])} {share}")]
    if "kilowatt_hours" in found:
        rows.append(("energy", f"{found['kilowatt_hours']:,.1f} kWh for the boards"))
    if "cost" in found:
        rows.append(("cost", f"{found['cost']:,.2f}"))
    return rows


def section_of_plan(plan: Plan, config: SizeConfig) -> Section:
    """A plan with its breakdown and its line."""
    found = facts_of_plan(plan, config.price)
    shape, size = plan.work, format_count(found["parameters"])
    rows = shares(plan.memory.as_dict(), plan.usable, format_bytes)
    if plan.work.device == "cpu":
        extra = snapshot(plan.work)
        rows.append(("checkpoint being written", format_bytes(extra), extra / plan.usable))
    margin = plan.usable - plan.needed
    rows += [("free", format_bytes(margin), margin / plan.usable)]
    if plan.tokens is not None:
        rows.append(("tokens", f"{format_count(plan.tokens)} in {plan.steps:,} steps", None))
        rows += [(name, value, None) for name, value in expense_in_words(plan.machine, found)]
    rows.append(("run", plan.command, None))
    names = " = ".join(plan.names)
    return Section(
        f"{names}: {size}, {shape.embedding_dimensions} x {shape.num_decoder_layers} layers, "
        f"{workload_in_words(plan.work)}",
        rows,
    )
