"""What a run will take, before and when it takes too much."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from nope_gpt import sizing
from nope_gpt.config import ModelConfig, SizeConfig, TrainingConfig
from nope_gpt.errors import CapacityError
from nope_gpt.training.distribution import DEFAULT_LEVEL

EXPECTED_UTILIZATION = 0.4
"""Of the hardware's peak, for an estimate of the time before anything has run."""


@dataclass(frozen=True)
class DryRun:
    """What a run will take.

    Attributes:
        parameters: Of the model.
        tokens_per_step: Over all ranks.
        tokens: Of the whole run.
        flops: Of the whole run, in PaLM's convention.
        memory: Bytes by part, and `peak`, on each rank.
        seconds: At `EXPECTED_UTILIZATION`, or None for hardware that nobody knows.
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


def memory_plan(
    config: TrainingConfig, model: ModelConfig, precision: torch.dtype, ranks: int = 1
) -> sizing.MemoryPlan:
    """The bytes of a training step at its fullest, on each of some ranks."""
    settings = config.as_dict() | model.as_dict()
    settings["precision"] = str(precision).removeprefix("torch.")
    known = SizeConfig.__dataclass_fields__
    plan = sizing.training_memory(
        SizeConfig(**{name: value for name, value in settings.items() if name in known})
    )
    shared = {0: [], 2: ["gradients", "optimizer"], 3: ["gradients", "optimizer", "weights"]}
    level = DEFAULT_LEVEL if config.ddp_sharding_level is None else config.ddp_sharding_level
    return replace(plan, **{name: -(-getattr(plan, name) // ranks) for name in shared[level]})


@contextmanager
def explaining_memory(
    config: TrainingConfig, model: ModelConfig, precision: torch.dtype
) -> Iterator[None]:
    """Turn a failed allocation into the figures of the plan and the cheapest lever.

    Raises:
        CapacityError: The memory is too small.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and not is_of_memory(error):
            raise
        plan = memory_plan(config, model, precision)
        parts = sorted(plan.as_dict().items(), key=lambda item: -item[1])
        listing = ", ".join(
            f"{name.replace('_', ' ')} {sizing.format_bytes(size)}" for name, size in parts if size
        )
        raise CapacityError(
            f"the memory is too small for this step: by plan it takes "
            f"{sizing.format_bytes(plan.peak)} ({listing})",
            hint=lever(config),
        ) from error


def is_of_memory(error: RuntimeError) -> bool:
    """Whether an error is a failed allocation."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def lever(config: TrainingConfig) -> str:
    """What frees most memory at the least cost, as something to type."""
    again, other = "the same command with --resume", f"another run, --run-name {config.run_name}-2,"
    if config.batch_size > 1:
        smaller = config.batch_size // 2
        steps = config.gradient_accumulation_steps * config.batch_size // smaller
        return f"{again} --batch-size {smaller} --gradient-accumulation-steps {steps}"
    if not config.activation_checkpointing:
        return f"{again} --activation-checkpointing"
    if config.optimizer != "adafactor":
        return f"{other} with --optimizer adafactor"
    return f"{other} with fewer tokens in a sample, or a smaller model"
