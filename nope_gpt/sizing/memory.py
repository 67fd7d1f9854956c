"""The bytes of training and of generating, in closed form.

Memory is bytes of live tensors; what a device needs on top is what `usable_memory` holds back.
"""

from __future__ import annotations

import dataclasses

from nope_gpt.config import ModelConfig, Workload
from nope_gpt.sizing.arithmetic import Parts, count_parameters
from nope_gpt.sizing.holdings import FLOAT32, Holdings
from nope_gpt.sizing.moments import MemoryPlan, Moments

CPU_PROCESS = 390_000_000
"""Bytes of Python with torch and the stacks of its threads, before there is any tensor."""

CPU_FILLED = 0.8


@dataclasses.dataclass(frozen=True, kw_only=True)
class InferenceMemory(Parts):
    """Bytes that a model holds while it generates."""

    weights: int
    cache: int
    logits: int


def inference_memory(
    config: ModelConfig, context_length: int, bytes_per_value: int, sequences: int = 1
) -> InferenceMemory:
    """Bytes of the weights, of full key/value caches, and of the logits of a token of each.

    Args:
        config: The network.
        context_length: Tokens that each sequence can look back on.
        bytes_per_value: Of weights and cache.
        sequences: That are generated at a time.
    """
    weights = count_parameters(config).total
    cache = 2 * config.num_decoder_layers * config.kv_dimensions * context_length
    return InferenceMemory(
        weights=weights * bytes_per_value,
        cache=sequences * cache * bytes_per_value,
        logits=sequences * config.vocabulary_size * FLOAT32,
    )


def training_memory(work: Workload) -> MemoryPlan:
    """The bytes at the fullest moment of a training step; `peak` is their sum."""
    fullest = max(Moments(work).named().values(), key=lambda moment: moment.peak)
    if work.compile == "on":  # Compiled code has some small change of its own.
        scratch = fullest.total // (50 if work.device == "cuda" else 100)
        return dataclasses.replace(fullest, transient=fullest.transient + scratch)
    return fullest


def snapshot(work: Workload) -> int:
    """Bytes of a checkpoint that is being written: what is trained, and the optimizer's state."""
    held = Holdings(work)
    return FLOAT32 * held.num_trained() + held.state()


def usable_memory(memory: int, device: str = "cuda") -> int:
    """The bytes of a device that live tensors can fill.

    Of a GPU a twentieth is the allocator's slack, and 1 GB, or less below 4 GB, is for the
    device's context. Just above 4 GB the answer stays level, so that more memory never holds less.
    Of a computer's own memory `CPU_PROCESS` is for Python and torch, and more of the rest is lost
    between tensors, as the system's allocator cuts it up.
    """
    if device == "cpu":
        return max(int((memory - CPU_PROCESS) * CPU_FILLED), 0)
    return int(max(0.95 * memory - 1e9, 0.85 * min(memory, 4e9)))
