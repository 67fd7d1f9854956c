"""Runs the command line with a fault: `faulty.py FAULT STEP RANK ARGUMENTS...`.

The fault happens in the first micro-batch of a step (counted from 0), on one rank.
"""

from __future__ import annotations

import os
import signal
import sys
import time

import torch

from nope_gpt.cli import main
from nope_gpt.data.batches import Batch
from nope_gpt.training.loop import Trainer
from nope_gpt.training.objectives import Outcome

FAULT, STEP, RANK = sys.argv[1], int(sys.argv[2]), sys.argv[3]

original = Trainer.forward_backward
seen = set()


def faulty(self: Trainer, batch: Batch, count: float) -> Outcome:
    step = self.progress.step
    outcome = original(self, batch, count)
    if step < STEP or os.environ.get("RANK", "0") != RANK:
        return outcome
    is_first, _ = step not in seen, seen.add(step)
    if FAULT == "nan":
        return outcome._replace(loss=outcome.loss * torch.nan)
    if FAULT == "nan-once" and step == STEP and is_first:
        self.trained[0].grad.mul_(torch.nan)  # After the ranks have shared it.
    if FAULT == "spike" and step == STEP and is_first:
        return outcome._replace(loss=outcome.loss + 5.0 * count)
    if FAULT == "memory":
        torch.empty(1 << 60)
    if FAULT == "raise":
        raise ValueError("on purpose")
    if FAULT == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if FAULT == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if FAULT == "hang":
        time.sleep(60)
    return outcome


Trainer.forward_backward = faulty
sys.argv = ["nope", *sys.argv[4:]]
main()
