"""What a run will take, before and when it takes too much."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

import torch

from nope_gpt.amounts import format_bytes
from nope_gpt.config import ModelConfig, TrainingConfig, TuneConfig, Workload
from nope_gpt.device import memory_of, resolve_precision
from nope_gpt.errors import CapacityError
from nope_gpt.sizing.memory import snapshot, training_memory, usable_memory
from nope_gpt.training.runs import Launch

C = TypeVar("C", bound=TrainingConfig)

SMALL_CHUNK = 256
"""Tokens of the loss at a time, where memory is dear."""


@dataclass(frozen=True)
class DryRun:
    """What a run will take.

    Attributes:
        parameters: Of the model.
        tokens_per_step: Over all ranks.
        tokens: Of the whole run.
        flops: Of the whole run, in PaLM's convention.
        memory: Bytes by part, and `peak`, on each rank.
        seconds: At the share of the peak that `nope size` assumes, or None where the peak is not
            known.
        told: What else people want to know.
    """

    parameters: int
    tokens_per_step: int
    tokens: int
    flops: int
    memory: dict[str, int]
    seconds: float | None
    told: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def workload(
    config: TrainingConfig, model: ModelConfig, device: torch.device, ranks: int = 1
) -> Workload:
    """What a step of a run is made of, as far as its memory depends on it."""
    settings = config.as_dict() | model.as_dict()
    settings["precision"] = str(resolve_precision(config.precision, device)).removeprefix("torch.")
    settings |= {"gpus": ranks, "device": "cpu" if device.type == "cpu" else "cuda"}
    if isinstance(config, TuneConfig):
        settings["tokens_per_sample"] = config.max_tokens_per_sample
        method = "dpo" if config.objective == "dpo" else "lora"
        settings["method"] = "full" if config.full else method
    known = {field.name for field in fields(Workload)}
    return Workload(**{name: value for name, value in settings.items() if name in known})


@contextmanager
def explaining_memory(config: TrainingConfig, model: ModelConfig, launch: Launch) -> Iterator[None]:
    """Turn a failed allocation into the figures of the plan and the cheapest lever.

    Raises:
        CapacityError: The memory is too small.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and not is_of_memory(error):
            raise
        plan = training_memory(workload(config, model, launch.device, launch.ranks.world_size))
        parts = sorted(plan.as_dict().items(), key=lambda item: -item[1])
        listing = ", ".join(
            f"{name.replace('_', ' ')} {format_bytes(size)}" for name, size in parts if size
        )
        raise CapacityError(
            f"the memory is too small for this step: by plan it takes "
            f"{format_bytes(plan.peak)} ({listing})",
            hint=lever(config),
        ) from error


def is_of_memory(error: RuntimeError) -> bool:
    """Whether an error is a failed allocation."""
    said = ("can't allocate memory", "could not create a primitive")  # Of torch, and of oneDNN.
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in said)


def fitted(config: C, model: ModelConfig, device: torch.device, ranks: int = 1) -> C:
    """The config with as many samples at a time as the device has memory for, if that is asked for.

    What each update trains on stays the same, so only numbers that divide its samples are tried.

    Raises:
        CapacityError: Not even one sample fits.
    """
    if not config.auto_batch_size:
        return config
    samples = config.batch_size * config.gradient_accumulation_steps
    capacity = memory_of(device)
    usable = usable_memory(capacity, device.type)
    sizes = range(samples // ranks, 0, -1)
    for batch in (size for size in sizes if samples % (size * ranks) == 0):
        changes: dict[str, Any] = {"batch_size": batch, "auto_batch_size": False}
        changes["gradient_accumulation_steps"] = samples // batch
        smaller = config.changed(**changes)
        work = workload(smaller, model, device, ranks)
        needed = training_memory(work).peak + (snapshot(work) if work.device == "cpu" else 0)
        if needed <= usable:
            return smaller
    raise CapacityError(
        f"one sample at a time needs {format_bytes(needed)} by plan, and {device} has "
        f"{format_bytes(usable)} for it",
        hint=f"add {cheapest(config.changed(batch_size=1))}",
    )


def lever(config: TrainingConfig) -> str:
    """What frees most memory at the least cost, as something to type."""
    again, other = "the same command with --resume", f"another run, --run-name {config.run_name}-2,"
    if config.batch_size > 1:
        smaller = config.batch_size // 2
        steps = config.gradient_accumulation_steps * config.batch_size // smaller
        return f"{again} --batch-size {smaller} --gradient-accumulation-steps {steps}"
    cheap = cheapest(config)
    changes_the_run = "optimizer" in cheap or "fewer" in cheap
    return f"{other} with {cheap}" if changes_the_run else f"{again} {cheap}"


def cheapest(config: TrainingConfig) -> str:
    """What frees memory at the least cost, where there is one sample at a time already."""
    if not config.activation_checkpointing:
        return "--activation-checkpointing"
    if config.loss_chunk > SMALL_CHUNK:
        return f"--loss-chunk {SMALL_CHUNK}"
    if config.optimizer != "adafactor":
        return "--optimizer adafactor"
    return "fewer tokens in a sample, or a smaller model"
