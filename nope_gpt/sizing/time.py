"""How long a run takes, and what that costs."""

from __future__ import annotations

import dataclasses

from nope_gpt.config import SizeConfig, Workload
from nope_gpt.errors import UsageError
from nope_gpt.sizing import measurements
from nope_gpt.sizing.arithmetic import training_flops_per_token
from nope_gpt.sizing.hardware import GPUS, known_gpu
from nope_gpt.sizing.measurements import Measurement

RECOMPUTED = 1 / 3
"""Of the operations, that a recomputed block adds: its forward pass a second time."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """Devices that train together.

    Attributes:
        flops: That each could do in a second at best, or None if that is not known.
        utilization: The share of them that a run gets, as PaLM counts them.
        watts: Of each, or None.
        memory: Of each in bytes, or None.
        count: How many there are.
        measurement: What was measured on it, which goes before what is assumed.
    """

    flops: float | None = None
    utilization: float = SizeConfig.utilization
    watts: int | None = None
    memory: int | None = None
    count: int = 1
    measurement: Measurement | None = None

    @classmethod
    def of(cls, config: SizeConfig) -> Machine:
        """What a config names.

        Raises:
            UsageError: It names a GPU that is not known, or asks for times without any.
        """
        gpu = known_gpu(config.gpu) if config.gpu else None
        flops = None if config.peak_tflops is None else config.peak_tflops * 1e12
        if config.gpu and gpu is None and flops is None:
            raise UsageError(
                f"--gpu is {config.gpu!r}, which is not known",
                where=f"known are {', '.join(GPUS)}",
                hint="--peak-tflops N, its dense bfloat16 peak, and --memory",
            )
        if flops is None and gpu is not None:
            flops = gpu.flops
        measured = measured_of(config)
        if (
            flops is None
            and measured is None
            and (config.days is not None or config.price is not None)
        ):
            flag = "--days" if config.days is not None else "--price"
            raise UsageError(
                f"{flag} needs to know how fast the device is",
                hint="--gpu rtx4090, or another, or --peak-tflops N; or measure it: --measure",
            )
        return cls(
            flops=flops,
            utilization=config.utilization,
            watts=gpu.watts if gpu else None,
            memory=gpu.memory if gpu else None,
            count=config.gpus,
            measurement=measured,
        )

    @property
    def speed(self) -> float | None:
        """Operations a second that training gets of each device, as PaLM counts them."""
        if self.measurement:
            return self.measurement.flops
        return None if self.flops is None else self.flops * self.utilization

    @property
    def memory_ratio(self) -> float:
        """Measured bytes to calculated ones."""
        return self.measurement.memory_ratio if self.measurement else 1.0

    def seconds(self, work: Workload, tokens: int) -> float | None:
        """To train on some tokens, or None for a device that nobody knows."""
        if self.speed is None:
            return None
        each = training_flops_per_token(work, work.tokens_per_sample, causal=False)
        again = RECOMPUTED * work.recomputed_blocks / work.num_decoder_layers
        return tokens * each * (1 + again) / (self.speed * self.count)

    def kilowatt_hours(self, seconds: float) -> float | None:
        """Of the boards at full power; the rest of a computer comes on top."""
        return None if self.watts is None else self.watts * self.count * seconds / 3.6e6

    def cost(self, seconds: float, price: float) -> float:
        """At a price for each device and hour."""
        return price * self.count * seconds / 3600


def measured_of(config: SizeConfig) -> Measurement | None:
    """What was measured on the device that a config means, with its precision."""
    if config.peak_tflops is not None or (config.device == "cuda" and config.gpu is None):
        return None
    for name, found in measurements.known().items():
        same = name == measurements.own_cpu() if config.device == "cpu" else False
        gpu = known_gpu(config.gpu) if config.gpu else None
        same = same or (gpu is not None and known_gpu(name) == gpu)
        if same and found.precision == config.precision:
            return found
    return None
