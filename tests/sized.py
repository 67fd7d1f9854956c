"""Under torchrun: what each rank's allocator gives out at every level of sharding, as JSON.

Gloo's threads let go of a buffer sooner or later, so that the peak of a step differs from one
reading to the next, by 15% at level 2 and by a third at level 3: the least and the most of several
readings are given.
"""

from __future__ import annotations

import json

import torch
import torch.distributed as dist

from nope_gpt.config import Workload
from nope_gpt.device import Ranks
from nope_gpt.sizing.memory import training_memory
from nope_gpt.training.measuring import allocated_peak

READINGS = 5

WORK = Workload(
    embedding_dimensions=256,
    num_q_heads=4,
    num_kv_heads=2,
    num_decoder_layers=8,
    vocabulary_size=3000,
    tokens_per_sample=64,
    batch_size=1,
    optimizer="adamw",
    device="cpu",
    gpus=2,
)

if __name__ == "__main__":
    dist.init_process_group("gloo")
    ranks = Ranks.from_environment()
    for precision in ("float32", "bfloat16"):
        for level in (0, 2, 3):
            work = WORK.changed(ddp_sharding_level=level, precision=precision)
            peaks = [allocated_peak(work, torch.device("cpu"), ranks) for _ in range(READINGS)]
            if ranks.is_first:
                plan = training_memory(work)
                found = [precision, level, min(peaks), max(peaks), plan.peak, plan.as_dict()]
                print(json.dumps(found), flush=True)
            dist.barrier()
    dist.destroy_process_group()
