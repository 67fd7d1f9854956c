"""The memory of a training step, counted while it runs: with fake tensors anywhere in seconds,
with real ones on the device that is to train.
"""

from __future__ import annotations

import gc
import itertools
import math
import time
import weakref
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nope_gpt.adaptation import lora
from nope_gpt.amounts import format_bytes
from nope_gpt.config import ModelConfig, PretrainConfig, Workload
from nope_gpt.data.batches import Batch
from nope_gpt.device import Ranks
from nope_gpt.errors import CapacityError
from nope_gpt.model import NoPEGPT
from nope_gpt.network.recall import Recall
from nope_gpt.sizing import measurements
from nope_gpt.sizing.arithmetic import training_flops_per_token
from nope_gpt.sizing.holdings import NEW_ROWS
from nope_gpt.sizing.measurements import Measurement
from nope_gpt.sizing.memory import training_memory
from nope_gpt.training import compilation
from nope_gpt.training.distribution import synchronizing
from nope_gpt.training.learner import Learner
from nope_gpt.training.objectives import CrossEntropy, Objective, Preference, Recalling
from nope_gpt.training.planning import is_of_memory

ALONE = Ranks(rank=0, local_rank=0, world_size=1)

NUM_STEPS = 3
"""To measure."""


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts every tensor that is made under it, real or fake, until the last use of it ends.

    Attributes:
        now: Bytes alive.
        peak: The most that were ever alive.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self.known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        tensors = [leaf for leaf in leaves if not leaf.is_meta]
        for storage in {tensor.untyped_storage() for tensor in tensors}:
            size = storage.nbytes()
            if storage in self.known or not isinstance(size, int):  # Data says how many documents.
                continue
            self.known.add(storage)
            weakref.finalize(storage, self.count, -size)
            # Autograd adds up the gradients of a weight in place, but not while a mode looks on.
            in_place = function is torch.ops.aten.add.Tensor and result.dim() == 2
            self.count(size, passing=in_place)
        return result

    def count(self, size: int, *, passing: bool = False) -> None:
        """Take in that some bytes are alive now, or no more."""
        self.now += size
        if not passing:
            self.peak = max(self.peak, self.now)


def rehearsed_peak(work: Workload, device: torch.device) -> int:
    """The most bytes alive on one rank in two steps without any computation.

    The network, the loss and the optimizers are those that train, eager, on tensors that have a
    shape and no numbers.

    Args:
        work: What is trained on.
        device: Whose kernels are asked for their shapes; it need not have the memory.
    """
    live = LiveBytes()
    with FakeTensorMode(shape_env=ShapeEnv()), live:
        learner = learner_of(work, device)
        for _ in range(2):
            train_step(learner, work)
    return live.peak


def measured(work: Workload, device: torch.device) -> Measurement:
    """Train some real steps on a device, note what they took, and return it.

    Raises:
        CapacityError: They do not fit.
    """
    try:
        peak, seconds = real_steps(work, device)
    except RuntimeError as error:
        if not is_of_memory(error):
            raise
        needed = training_memory(work).peak
        raise CapacityError(
            f"these steps do not fit on {device}: by plan they take {format_bytes(needed)}",
            hint="a smaller --batch-size, or --activation-checkpointing",
        ) from None
    tokens = tokens_of_step(work)
    flops = tokens * training_flops_per_token(work, work.tokens_per_sample, causal=False)
    is_gpu = device.type == "cuda"
    found = Measurement(
        device=torch.cuda.get_device_name(device) if is_gpu else measurements.own_cpu(),
        peak=peak,
        calculated=training_memory(work).peak,
        tokens_per_second=tokens / seconds,
        flops=flops / seconds,
        precision=work.precision,
        torch=torch.__version__,
    )
    measurements.keep(found)
    return found


def tokens_per_second(work: Workload, device: torch.device, seconds: float) -> float:
    """How many tokens are trained a second, by the fastest step of some seconds.

    Args:
        work: What is trained on.
        device: What trains.
        seconds: In which steps begin, after a first one that is not counted.
    """
    learner = learner_of(work, device)
    timed_step(learner, work, device)
    best, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:
        best = min(best, timed_step(learner, work, device))
    return tokens_of_step(work) / best


def real_steps(work: Workload, device: torch.device) -> tuple[int, float]:
    """The most bytes that the device's allocator gave out, and the seconds of a step."""
    learner = learner_of(work, device)
    train_step(learner, work)
    seconds = min(timed_step(learner, work, device) for _ in range(NUM_STEPS))
    del learner
    return allocated_peak(work, device), seconds


def timed_step(learner: Learner, work: Workload, device: torch.device) -> float:
    """Train a step, and return its seconds."""
    begun = time.perf_counter()
    train_step(learner, work)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


def batches_of_step(work: Workload) -> int:
    """Micro-batches of a step that is measured: of an update's at most two."""
    return min(work.gradient_accumulation_steps, 2)


def tokens_of_step(work: Workload) -> int:
    """Tokens of a step that is measured."""
    return work.tokens * batches_of_step(work)


def allocated_peak(work: Workload, device: torch.device, ranks: Ranks = ALONE) -> int:
    """The most bytes that torch's allocator gave out in two steps: on a GPU, where libraries of
    matrix products keep some that a first step was given, by its own count, beyond what was out
    before; on a CPU by torch's profiler.
    """

    def steps() -> None:
        learner = learner_of(work, device, ranks)
        for _ in range(2):
            train_step(learner, work)

    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        steps()
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        steps()
    assert profile.profiler is not None
    events = profile.profiler.kineto_results.events()
    allocations = [event for event in events if event.name() == "[memory]"]
    allocations.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(int(event.nbytes()) for event in allocations))


def learner_of(work: Workload, device: torch.device, ranks: Ranks = ALONE) -> Learner:
    """What trains on a workload, as `pretrain` and `tune` build it, with fresh weights."""
    precision = getattr(torch, work.precision)
    shape = {field.name: getattr(work, field.name) for field in fields(ModelConfig)}
    with torch.device(device):
        model = NoPEGPT(**shape).train()
        objective: Objective = CrossEntropy()
        if work.recalls:
            model.recall = Recall(model.embedding_dimensions)
            objective = Recalling(work.recall)
        if not work.trains_all:
            lora.adapt(
                model,
                work.rank,
                precision=precision,
                new_rows=NEW_ROWS,
                embeddings=work.embeddings,
            )
        if work.method == "dpo":
            objective = Preference(model, beta=0.1)
    model.loss_chunk = work.loss_chunk
    if work.recomputed_blocks:
        model.decoder.enable_activation_checkpointing(work.checkpointed_fraction)
    if work.compile == "on":
        compilation.begin(model)
    config = PretrainConfig(optimizer=work.optimizer, ddp_sharding_level=work.ddp_sharding_level)
    return Learner(model, objective, config, precision, ranks)


def train_step(learner: Learner, work: Workload) -> None:
    """Train on a batch of one token over and over."""
    shape = (work.batch_size, work.tokens_per_sample)
    count = 0
    if work.method != "pretrain":  # Answers lie end to end.
        shape, count = (1, work.tokens), work.tokens // work.tokens_per_sample
    tokens = torch.zeros(shape, dtype=torch.long)
    documents = None
    if count:
        documents = torch.arange(count, dtype=torch.int32).repeat_interleave(work.tokens_per_sample)
        documents = documents[None]
    batches = batches_of_step(work)
    for index in range(batches):
        with synchronizing(learner.network, learner.config, index == batches - 1):
            learner.forward_backward(Batch(tokens, tokens, documents, count), tokens.numel())
    learner.clipped_norm()
    learner.update(1.0)
    learner.forget_gradients()
