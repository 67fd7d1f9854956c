"""Workloads and plans in words, as `nope size` tells of them."""

from __future__ import annotations

from typing import Any

from nope_gpt.amounts import format_bytes, format_count, format_seconds
from nope_gpt.cli.tables import Section
from nope_gpt.config import SizeConfig
from nope_gpt.sizing.facts import ADVICE, facts_of_plan
from nope_gpt.sizing.memory import snapshot
from nope_gpt.sizing.plans import Plan
from nope_gpt.sizing.time import Machine


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
        rank = "" if config.trains_all else f", rank {config.rank}"
        words.insert(0, f"{config.method}{rank}")
    if config.recomputed_blocks:
        words.append("activation checkpointing")
    if config.compile == "on":
        words.append("compiled")
    if config.gpus > 1:
        words.append(f"{config.gpus} GPUs, sharding level {config.sharding}")
    return ", ".join(words)


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
