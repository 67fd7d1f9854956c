"""`nope size`."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from nope_gpt.amounts import format_bytes, parse_memory
from nope_gpt.cli.options import JSON, configured, option
from nope_gpt.cli.tables import Section, markdown, text
from nope_gpt.cli.terminal import result
from nope_gpt.cli.workloads import section_of_plan, sections, workload_in_words
from nope_gpt.config import ModelConfig, SizeConfig
from nope_gpt.errors import UsageError
from nope_gpt.sizing.facts import facts, facts_of_plan
from nope_gpt.sizing.measurements import store
from nope_gpt.sizing.memory import training_memory, usable_memory
from nope_gpt.sizing.plans import Planner
from nope_gpt.sizing.time import Machine

FORMAT = option("format", str, "text, or markdown.", default="text", metavar="[text|markdown]")

VERIFY = option(
    "verify",
    bool,
    "Rehearse the step of training on tensors without numbers, and compare: seconds, no GPU.",
    default=False,
)

MEASURE = option(
    "measure",
    bool,
    "Train three real steps on this machine, and compare the memory and the speed.",
    default=False,
)

PLOT = option(
    "plot",
    Path | None,
    "Draw parameters and operations by part, as PNG or SVG.",
    metavar="FILE",
)


@configured(SizeConfig, VERIFY, MEASURE, PLOT, FORMAT, JSON)
def command(
    config: SizeConfig, verify: bool, measure: bool, plot: Path | None, format: str, json: bool
) -> None:
    """Calculate what a shape takes: parameters, memory, arithmetic, time and money.

    With --memory or --gpu, plan what to train in that: each plan ends in a line to type.

    Examples:

    - `nope size`

    - `nope size --memory 24GB`

    - `nope size --gpu rtx4090 --days 7 --price 0.4`

    - `nope size --embedding-dimensions 2048 --num-q-heads 32 --num-kv-heads 8 --verify`

    - `nope size --model runs/pretrain --method lora --batch-size 4`
    """
    if format not in ("text", "markdown"):
        raise UsageError(f"--format is {format!r}, and must be text or markdown")
    if config.model is not None:
        config = shaped_as_model(config, config.model)
    machine = Machine.of(config)
    found: dict[str, Any]
    if config.memory is None and machine.memory is None:
        found = facts(config, machine)
        tables = sections(config, machine, found)
    else:
        memory = parse_memory(config.memory) if config.memory else machine.memory or 0
        plans = Planner(config, memory, machine).plans()
        found = {
            "memory": memory,
            "usable": usable_memory(memory, config.device),
            "plans": [facts_of_plan(plan, config.price) for plan in plans],
        }
        tables = [section_of_plan(plan, config) for plan in plans]
        tables.insert(0, summary(found, config))
        config = plans[0].work
    if verify or measure:
        add_comparison(config, found, tables, verify=verify, measure=measure)
    if plot is not None:
        from nope_gpt.cli.plotting import draw_shape, figure_for, save

        figure = figure_for(plot, 9, 3.2)
        draw_shape(config, figure)
        save(figure, plot)
    drawn = markdown(tables) if format == "markdown" else text(tables)
    result(drawn, found, json)


def shaped_as_model(config: SizeConfig, model: str) -> SizeConfig:
    """The config with the shape of a model that is there."""
    from nope_gpt.hub import storage
    from nope_gpt.hub.locating import locate

    shape = storage.load(locate(model)).config
    return replace(
        config, **{field.name: getattr(shape, field.name) for field in fields(ModelConfig)}
    )


def summary(found: dict[str, Any], config: SizeConfig) -> Section:
    """What the plans are for."""
    rows: list[tuple[str, str, float | None]] = [
        ("memory", format_bytes(found["memory"]), None),
        ("usable", f"{format_bytes(found['usable'])} for tensors", None),
    ]
    return Section(f"Plans for {config.gpus} x {config.gpu or config.device}", rows)


def add_comparison(
    config: SizeConfig,
    found: dict[str, Any],
    tables: list[Section],
    *,
    verify: bool,
    measure: bool,
) -> None:
    """Count on our own code what was calculated."""
    from nope_gpt.cli.terminal import waiting
    from nope_gpt.device import resolve_device
    from nope_gpt.training import measuring

    device = resolve_device("auto")
    config = config.changed(device="cpu" if device.type == "cpu" else "cuda", gpus=1)
    closed = training_memory(config).peak
    rows: list[tuple[str, str, float | None]] = [("calculated", format_bytes(closed), None)]
    comparison: dict[str, Any] = {"calculated": closed}
    if verify:
        with waiting("rehearsing two steps without numbers"):
            rehearsed = measuring.rehearsed_peak(config, device)
        comparison["rehearsed"] = rehearsed
        rows.append(("rehearsed", compared(rehearsed, closed), None))
    if measure:
        with waiting("training some steps"):
            measured = measuring.measured(config, device)
        comparison["measured"] = measured.as_dict()
        rows += [
            ("measured", compared(measured.peak, closed), None),
            ("speed", f"{measured.tokens_per_second:,.0f} tokens/s", None),
            ("noted in", str(store()), None),
        ]
    found["comparison"] = comparison
    words = workload_in_words(config)
    tables.append(Section(f"Memory of a step on {device.type}: {words}", rows))


def compared(amount: int, closed: int) -> str:
    """An amount, and how far off the calculated one is."""
    return f"{format_bytes(amount)} (calculated: {closed / amount - 1:+.1%})"
