"""The losses of a seeded run through the real command line, written down.

`python tests/test_golden.py` prints them anew. They change only with a change to what the
network or the loop computes, which belongs in the changelog.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

GOLDEN = Path(__file__).with_name("golden_losses.json")

TEXT = "".join(
    f"The {noun} of the {other} is {verb} when the {noun} {verb}s number {number}.\n"
    for number in range(40)
    for noun, other, verb in (("list", "module", "read"), ("name", "object", "clear"))
)


def losses(directory: Path) -> list[float]:
    """Prepare the text and train 20 steps: fp32, eager, one thread."""
    (directory / "text.txt").write_text(TEXT, encoding="utf-8")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    lines = [
        "prepare text.txt --token-encoding bytes --holdout-fraction 0",
        "pretrain --embedding-dimensions 32 --num-q-heads 4 --num-kv-heads 2 "
        "--num-hidden-layers 2 --feed-forward-ratio 2 --tokens-per-sample 32 --batch-size 4 "
        "--gradient-accumulation-steps 2 --max-steps 20 --learning-rate 0.01 --seed 0 "
        "--device cpu --precision float32",
    ]
    for line in lines:
        subprocess.run(
            [sys.executable, "-m", "nope_gpt.cli", *line.split()],
            cwd=directory,
            env=environment,
            check=True,
            capture_output=True,
        )
    rows = (directory / "runs" / "pretrain" / "metrics.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, rows) if "loss" in row]


def test_a_seeded_run_gives_the_losses_written_down(tmp_path: Path) -> None:
    assert losses(tmp_path) == pytest.approx(json.loads(GOLDEN.read_text()), rel=1e-3)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        text = json.dumps([round(loss, 6) for loss in losses(Path(temporary))], indent=1)
    GOLDEN.write_text(text + "\n")
    print(text)
