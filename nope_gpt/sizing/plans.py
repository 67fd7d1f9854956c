"""Plans: what can be trained with some memory, devices and time, as lines to type.

Shapes come from one family, in which depth follows width as it does in the published models. For
each shape the settings are tried from the fastest to the leanest, so that a plan never gets worse
with more memory.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import math
import shlex
from collections.abc import Iterator

from nope_gpt.amounts import format_bytes
from nope_gpt.config import (
    LOSS_CHUNK,
    MODEL,
    SHAPE_400M,
    ModelConfig,
    PretrainConfig,
    SizeConfig,
    TrainingConfig,
    TuneConfig,
    Workload,
)
from nope_gpt.config.knobs import as_words, differences, flag_of
from nope_gpt.errors import CapacityError, UsageError
from nope_gpt.sizing.arithmetic import compute_optimal_tokens, count_parameters
from nope_gpt.sizing.memory import snapshot, training_memory, usable_memory
from nope_gpt.sizing.moments import MemoryPlan
from nope_gpt.sizing.time import Machine

HEAD = 64
"""Dimensions of a head, as in the published models."""

WIDTHS = [64, 128, 192, 256, 384, *range(512, 8193, 256)]
"""Embedding dimensions of the family."""

PUBLISHED = "NoPE-GPT-400M"

TOKENS_PER_STEP = 1 << 20
"""At most, as in the published models."""

FEWEST_STEPS = 2000
"""Of a run: smaller models, which see fewer tokens, take fewer of them in each step."""

LOSS_CHUNKS = (LOSS_CHUNK, 256, 64)
"""To try: small ones cost a little speed."""

SHORTEST_SAMPLE = 64
"""A shorter context has hardly anything to attend to."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """A shape and the settings to train it with.

    Attributes:
        names: What it is the best of.
        work: Its step.
        tokens: To train on, or None where the data decide.
        usable: Bytes that tensors may take.
        machine: What it is to run on.
    """

    names: tuple[str, ...]
    work: SizeConfig
    tokens: int | None
    usable: int
    machine: Machine

    @functools.cached_property
    def memory(self) -> MemoryPlan:
        return training_memory(self.work)

    @property
    def needed(self) -> int:
        """Bytes: on a CPU a checkpoint that is being written is in the same memory."""
        written = snapshot(self.work) if self.work.device == "cpu" else 0
        return round(self.memory.peak * self.machine.memory_ratio) + written

    @property
    def fits(self) -> bool:
        return self.needed <= self.usable

    @property
    def steps(self) -> int | None:
        """Updates of the weights."""
        return None if self.tokens is None else -(-self.tokens // self.work.tokens_per_step)

    @property
    def seconds(self) -> float | None:
        """Of the whole run, if the speed of the machine is known."""
        return None if self.tokens is None else self.machine.seconds(self.work, self.tokens)

    @property
    def command(self) -> str:
        """The line to type: the flags that differ from their defaults, the shape first."""
        work = self.work
        values = work.as_dict() | {"device": "cpu" if work.device == "cpu" else "auto"}
        kind: type[TrainingConfig] = PretrainConfig
        words = ["nope", "pretrain"]
        if self.steps is not None:
            values["max_steps"] = self.steps
        if work.method != "pretrain":
            kind, words = TuneConfig, ["nope", "tune"]
            values |= {"full": work.method == "full", "dropout": TuneConfig.dropout}
            values["max_tokens_per_sample"] = work.tokens_per_sample
            values["objective"] = "dpo" if work.method == "dpo" else "auto"
        values["compile"] = kind.compile
        fields = dataclasses.fields(kind)
        settings = {field.name: values[field.name] for field in fields if field.name in values}
        flags = differences(kind(**settings))
        shape = {flag_of(field) for field in fields if field.metadata["panel"] == MODEL}
        words += as_words(dict(sorted(flags.items(), key=lambda item: item[0] not in shape)))
        if work.gpus > 1:
            words += ["--gpus", str(work.gpus)]
        return shlex.join(words)


class Planner:
    """Finds plans.

    Args:
        config: Vocabulary, context, optimizer and precision; with a model, its shape too.
        memory: Of each device, in bytes.
        machine: What it is to run on.
    """

    def __init__(self, config: SizeConfig, memory: int, machine: Machine) -> None:
        self.config = config
        self.memory = memory
        self.usable = usable_memory(memory, config.device)
        self.machine = machine

    def plans(self) -> list[Plan]:
        """The best in each respect; one that is so in several is there once.

        Raises:
            CapacityError: Nothing fits; names the largest part, and a command that does.
            UsageError: A method of tuning is to be planned without a model.
        """
        if self.config.method != "pretrain" and self.config.model is None:
            raise UsageError(
                f"--method {self.config.method} needs a model to tune",
                hint="--model runs/pretrain, or --model andrewdalpino/NoPE-GPT-400M-Base",
            )
        if self.config.model is not None:
            found = {"your model": self.fastest(self.config)}
        else:
            found = {
                "fastest": self.largest(at_full_speed=True),
                "best in the time": self.largest(in_time=True),
                "largest": self.largest(),
                PUBLISHED: self.fastest(self.shaped(ModelConfig(**SHAPE_400M))),
            }
        plans: dict[str, Plan] = {}
        for name, plan in found.items():
            if plan:
                names = plans[plan.command].names if plan.command in plans else ()
                plans[plan.command] = dataclasses.replace(plan, names=(*names, name))
        if not plans:
            raise self.complaint()
        return list(plans.values())

    def largest(self, *, at_full_speed: bool = False, in_time: bool = False) -> Plan | None:
        """The largest of the family that fits.

        Args:
            at_full_speed: Recompute nothing.
            in_time: Be done in the days that there are.
        """

        def plan_of(width: int) -> Plan | None:
            config = self.shaped(shape_of(width, self.config))
            return self.fastest(config, at_full_speed=at_full_speed, in_time=in_time)

        # A larger one takes more memory and more time.
        count = bisect.bisect_left(WIDTHS, True, key=lambda width: plan_of(width) is None)
        return plan_of(WIDTHS[count - 1]) if count else None

    def shaped(self, shape: ModelConfig) -> SizeConfig:
        """The config with another shape; the vocabulary is the data's."""
        values = shape.as_dict() | {"vocabulary_size": self.config.vocabulary_size}
        return self.config.changed(**values)

    def fastest(
        self, config: SizeConfig, *, at_full_speed: bool = False, in_time: bool = False
    ) -> Plan | None:
        """The fastest settings of a shape that fit, if any do; the arguments of `largest`."""
        days = self.config.days
        if in_time and (days is None or not self.machine.speed):
            return None
        settings = self.settings(config, at_full_speed=at_full_speed)
        if not self.plan(config, *settings[-1]).fits:
            return None
        plan = next(p for p in (self.plan(config, *each) for each in settings) if p.fits)
        is_late = in_time and days is not None and (plan.seconds or 0.0) > days * 86400
        return None if is_late else plan

    def settings(
        self, config: SizeConfig, *, at_full_speed: bool = False
    ) -> list[tuple[bool, int, int]]:
        """Whether to recompute, the chunk of the loss and the batch, from fast to lean."""
        _, samples = self.horizon(config)
        batches = [1 << power for power in reversed(range((samples // config.gpus).bit_length()))]
        recomputing = [False] if at_full_speed else [False, True]
        if config.activation_checkpointing:
            recomputing = [True]
        chunks = [chunk for chunk in LOSS_CHUNKS if chunk <= config.loss_chunk]
        return list(itertools.product(recomputing, chunks or [config.loss_chunk], batches))

    def plan(self, config: SizeConfig, recompute: bool, chunk: int, batch: int) -> Plan:
        """To train a shape with some settings."""
        tokens, samples = self.horizon(config)
        work = config.changed(
            activation_checkpointing=recompute,
            loss_chunk=chunk,
            batch_size=batch,
            gradient_accumulation_steps=samples // batch,
        )
        return Plan((), work, tokens, self.usable, self.machine)

    def horizon(self, config: SizeConfig) -> tuple[int | None, int]:
        """The tokens to train on, and the samples of each step, which the ranks can share."""
        if config.method != "pretrain":
            samples = TuneConfig.batch_size * TuneConfig.gradient_accumulation_steps
            return None, config.gpus * (1 << int(math.log2(max(samples // config.gpus, 1))))
        tokens = compute_optimal_tokens(config, config.tokens_per_parameter)
        most = min(TOKENS_PER_STEP, tokens // FEWEST_STEPS)
        each = max(most // (config.tokens_per_sample * config.gpus), 1)
        return tokens, config.gpus * (1 << int(math.log2(each)))

    def complaint(self) -> CapacityError:
        """What does not fit, by how much, and the least change that does."""
        config, name = self.config, "the model"
        if config.method == "pretrain" and config.model is None:
            config = self.shaped(shape_of(WIDTHS[0], config))
            name = f"the smallest shape, {format_count_of(config)},"
        leanest = self.plan(config, *self.settings(config)[-1])
        part, amount = max(leanest.memory.as_dict().items(), key=lambda item: item[1])
        fitting = (self.fastest(each) for each in reductions(config))
        reduced = next((plan for plan in fitting if plan), None)
        return CapacityError(
            f"{name} needs {format_bytes(leanest.needed)} even with activation checkpointing and "
            f"a small loss chunk, and {format_bytes(self.usable)} are usable; the largest part is "
            f"{part}, {format_bytes(amount)}",
            where=f"--memory {self.config.memory or format_bytes(self.memory)}",
            hint=reduced.command if reduced else "train on a device with more memory",
        )


def format_count_of(config: ModelConfig) -> str:
    """How many parameters, in words."""
    return f"{count_parameters(config).total:,} parameters"


def shape_of(width: int, config: Workload) -> ModelConfig:
    """The member of the family with so many embedding dimensions.

    As in the published models a head has 64 dimensions, four query heads share a key, and there is
    a layer for each 64 dimensions; small ones are a little deeper.
    """
    heads = width // HEAD
    shared = max(share for share in range(1, 5) if heads % share == 0)
    return ModelConfig(
        embedding_dimensions=width,
        num_q_heads=heads,
        num_kv_heads=heads // shared,
        num_decoder_layers=max(width // HEAD, 4),
        hidden_ratio=config.hidden_ratio,
        dropout=config.dropout,
        vocabulary_size=config.vocabulary_size,
    )


def reductions(config: SizeConfig) -> Iterator[SizeConfig]:
    """Settings that need less memory, from the least change to the greatest."""
    tokens = config.tokens_per_sample
    while tokens >= SHORTEST_SAMPLE:
        for optimizer in (config.optimizer, "adafactor"):
            yield config.changed(tokens_per_sample=tokens, optimizer=optimizer)
        tokens //= 2
