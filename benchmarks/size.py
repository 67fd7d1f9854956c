"""How far calculators of memory are from what a training step takes.

    python benchmarks/size.py [--eleuther calc_transformer_mem.py] [--device cuda]

Each workload is trained for two real steps, with torch's profiler adding up what its allocator for
the CPU gives out, or by the count of that for a GPU, and calculated by `nope size`, by its
rehearsal without numbers, by EleutherAI's calculator (the file of that name from
github.com/EleutherAI/cookbook, if its path is given), by accelerate's rule (four times the weights
in float32, for Adam) and by the notebook that `nope size` replaces (the weights alone). Then `nope
size` itself is timed, whole processes.
"""

from __future__ import annotations

import argparse
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from nope_gpt.config import PRESETS, SHAPE_400M, PretrainConfig, Workload
from nope_gpt.sizing.arithmetic import count_parameters
from nope_gpt.sizing.memory import training_memory
from nope_gpt.training.measuring import allocated_peak, rehearsed_peak

COMMON = {"optimizer": "adamw", "precision": "bfloat16", "recall": 0.0}
"""Nothing beside the loss of the next token, as the others count."""


def preset(name: str) -> dict[str, object]:
    """What a preset says of a step."""
    known = Workload.__dataclass_fields__
    values = PRESETS[PretrainConfig][name]
    return {key: value for key, value in values.items() if key in known} | COMMON


WORKLOADS = {
    "tiny, 8 x 256": Workload(**preset("tiny")),
    "small, 16 x 512": Workload(**preset("small")),
    "125M, 2 x 1,024": Workload(**preset("125m") | {"batch_size": 2, "tokens_per_sample": 1024}),
    "408M, 1 x 4,096": Workload(**SHAPE_400M, **COMMON, batch_size=1),
    "125M, 4 x 2,048, recomputed": Workload(
        **preset("125m")
        | {"batch_size": 4, "tokens_per_sample": 2048, "activation_checkpointing": True}
    ),
}


def eleuther(script: Path, work: Workload) -> float:
    """Bytes by EleutherAI's calculator, which prints gibibytes."""
    words = [
        "--num-gpus=1",
        "--tensor-parallel-size=1",
        "--pipeline-parallel-size=1",
        "--zero-stage=0",
        f"--batch-size-per-gpu={work.batch_size}",
        f"--sequence-length={work.tokens_per_sample}",
        f"--vocab-size={work.vocabulary_size}",
        f"--hidden-size={work.embedding_dimensions}",
        f"--num-attention-heads={work.num_q_heads}",
        f"--num-layers={work.num_decoder_layers}",
        f"--ffn-expansion-factor={work.hidden_ratio}",
        f"--kv-size-ratio={work.num_kv_heads / work.num_q_heads}",
        *(["--checkpoint-activations"] if work.activation_checkpointing else []),
    ]
    done = subprocess.run(
        [sys.executable, str(script), *words], capture_output=True, text=True, check=True
    )
    return (
        float(re.findall(r"Per-GPU Memory Required for Training: ([\d.]+)", done.stdout)[0]) * 2**30
    )


def seconds_of(command: list[str], times: int = 15) -> float:
    """The median of whole processes."""
    taken = []
    for _ in range(times):
        begun = time.perf_counter()
        subprocess.run(command, capture_output=True, check=True)
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken)


def main() -> None:
    """Print the table."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--eleuther", type=Path, help="calc_transformer_mem.py")
    options.add_argument("--largest", type=float, default=16e9, help="bytes to train in, at most")
    options.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    chosen = options.parse_args()
    device = torch.device(chosen.device)
    name = platform.processor() or platform.machine()
    if chosen.device == "cuda":
        name = torch.cuda.get_device_name()
        allocated_peak(next(iter(WORKLOADS.values())), device)  # What libraries keep.
    print(f"torch {torch.__version__}, {name}")
    print("| workload | measured | nope size | rehearsed | EleutherAI | accelerate | notebook |")
    print("|---|---|---|---|---|---|---|")
    for name, work in WORKLOADS.items():
        work = work.changed(device=chosen.device)
        ours, rehearsed = training_memory(work).peak, rehearsed_peak(work, device)
        measured = allocated_peak(work, device) if ours < chosen.largest else None
        weights = 4 * count_parameters(work).total
        others = [ours, rehearsed, None, 4 * weights, weights]
        if chosen.eleuther:
            others[2] = eleuther(chosen.eleuther, work)
        of = measured or rehearsed
        cells = [
            "n/a" if other is None else f"{other / 1e9:.2f} GB ({other / of - 1:+.1%})"
            for other in others
        ]
        shown = f"{measured / 1e9:.2f} GB" if measured else "too large here"
        print(f"| {name} | {shown} | {' | '.join(cells)} |", flush=True)
    for words in (["size"], ["size", "--memory", "24GB"]):
        command = [sys.executable, "-m", "nope_gpt.cli", *words]
        print(f"nope {' '.join(words)}: {seconds_of(command):.3f} s")


if __name__ == "__main__":
    main()
