"""Every benchmark, one after another, as the documents quote them.

    python benchmarks/all.py CLASSICS.parquet SHAKESPEARE.txt CONVERSATIONS.jsonl PAIRS.jsonl
        [--eleuther calc_transformer_mem.py] [--into benchmarks/results] [--only train tune ...]

What each prints goes into a file of its own, and from there `make docs` takes the tables of the
documents. It takes some hours, and a machine that does nothing else; what is not measured in time
comes last. One that fails is told and leaves NAME.part, and the others go on.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from pathlib import Path

COMMANDS = {
    "train": "train.py",
    "train-vocabulary": "train.py --shape vocabulary",
    "cross_entropy": "cross_entropy.py",
    "checkpoints": "checkpoints.py",
    "size": "size.py {eleuther}",
    "tune": "tune.py {conversations} --rounds 4 --steps 3",
    "tune-dpo": "tune.py {pairs} --objective dpo --learning-rate 1e-4 --tokenizer {conversations} "
    "--rounds 4 --steps 3",
    "prepare": "prepare.py {classics}",
    "chat": "chat.py",
    "export": "export.py",
    "generate": "generate.py --case 1x512 --case 1x8192 --rounds 4 --steps 6",
    "generate-batch": "generate.py --case 16x512 --rounds 3 --steps 4",
    "learn-shakespeare": "learn.py time {shakespeare} --workers 2 --set tokens_per_sample=128",
    "learn-classics": "learn.py time {classics} --workers 2 --set tokens_per_sample=128",
    "reach": "reach.py {classics} --steps 1000",
    "ablation": "learn.py ablation {classics} --steps 300 --seeds 3 --workers 2",
    "variations": "learn.py variations {classics} --steps 300 --workers 2",
}
"""By name; `approximations.py` and `tool_calls.py` need models that training made."""

RESULTS = Path(__file__).with_name("results")


def main() -> None:
    """Run them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("classics", "shakespeare", "conversations", "pairs"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--eleuther", type=Path, help="EleutherAI's calculator, to compare")
    parser.add_argument("--into", type=Path, default=RESULTS)
    parser.add_argument("--only", nargs="*", choices=COMMANDS, default=list(COMMANDS))
    options = parser.parse_args()
    options.into.mkdir(parents=True, exist_ok=True)
    eleuther = f"--eleuther {options.eleuther}" if options.eleuther else ""
    failed = []
    for name in options.only:
        command = COMMANDS[name].format(**vars(options) | {"eleuther": eleuther})
        script, *words = shlex.split(command)
        print(f"{time.strftime('%H:%M:%S')} {command}", flush=True)
        output = options.into / f"{name}.md"
        part = output.with_suffix(".part")
        with part.open("w") as out:
            line = [sys.executable, str(Path(__file__).with_name(script)), *words]
            done = subprocess.run(line, stdout=out, check=False)
        if done.returncode:
            failed.append(name)
        else:
            part.replace(output)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
