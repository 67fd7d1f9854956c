"""What a checkpoint costs a run: the time by which saving delays the steps around it.

    python benchmarks/checkpoints.py [--shape small] [--rounds 7] [--steps 8]

Round after round the same steps are taken twice, once as they are and once with a checkpoint
begun before the first of them and written while they go on; a round waits for the writing.
The table gives the median delay, as a share of the 100 steps that lie between two checkpoints.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from train import SHAPES, hardware, now, ours

from nope_gpt.amounts import format_bytes
from nope_gpt.config import PretrainConfig
from nope_gpt.device import autocast
from nope_gpt.hub import storage
from nope_gpt.training import state
from nope_gpt.training.checkpoints import Progress, Saver, Snapshot
from nope_gpt.training.optimization import make_optimizers

INTERVAL = 100


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape, device = SHAPES[options.shape], torch.device(options.device)
    model, loss_of = ours(shape, device, compiled=True)
    model.to(device).train()
    (optimizer,) = optimizers = make_optimizers(
        model, PretrainConfig(optimizer="adamw"), torch.bfloat16
    )
    tokens = torch.randint(0, shape["vocabulary"], (shape["B"], shape["T"]), device=device)

    def step() -> None:
        with autocast(device, torch.bfloat16):
            loss = loss_of(tokens, tokens)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    step()
    step()
    plain, saving, sizes = [], [], []
    with tempfile.TemporaryDirectory() as place:
        saver = Saver(
            Path(place),
            lambda path, snapshot: storage.save(path, model.saved(snapshot.model)),
            keep=2,
            keep_every=None,
            written=lambda _: None,
        )
        for number in range(options.rounds):
            started = now(device)
            for _ in range(options.steps):
                step()
            plain.append(now(device) - started)
            started = time.perf_counter()
            snapshot = Snapshot(Progress(step=number + 1), *state.gathered(model, optimizers))
            saver.save(snapshot)
            for _ in range(options.steps):
                step()
            now(device)
            saver.wait()
            saving.append(time.perf_counter() - started)
            sizes.append(snapshot.size)
    once = statistics.median(plain) / options.steps
    delay = statistics.median(b - a for a, b in zip(plain, saving, strict=True))
    print(f"{hardware(options)}\n{shape}\n")
    print("| checkpoint | a step | delay for each | share of 100 steps |\n|---|---|---|---|")
    print(
        f"| {format_bytes(sizes[0])} | {once:.3f} s | {delay:.3f} s | "
        f"{delay / (INTERVAL * once):.2%} |"
    )


if __name__ == "__main__":
    main()
