"""Several ranks under torchrun are one run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from small import byte_dataset, small_run

from nope_gpt.locating import newest_checkpoint

ARGUMENTS = (
    "--embedding_dimensions=32 --num_q_heads=4 --num_kv_heads=2 --num_hidden_layers=2 "
    "--feed_forward_ratio=2 --tokens_per_sample=16 --batch_size=4 --max_steps=4 "
    "--eval_interval=3 --checkpoint_interval=3 --learning_rate=0.01 --device=cpu "
    "--precision=float32 --seed=0"
).split()


def torchrun(ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`torchrun -m nope_gpt.cli pretrain`, as people type it."""
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *(f"--nproc-per-node={ranks}", "-m", "nope_gpt.cli", "pretrain", *arguments),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )


def losses(root: Path) -> list[float]:
    rows = map(json.loads, (root / "pretrain" / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def evaluations(root: Path) -> list[float]:
    rows = map(json.loads, (root / "pretrain" / "metrics.jsonl").read_text().splitlines())
    return [row["eval_loss"] for row in rows if "eval_loss" in row]


@pytest.mark.skipif(sys.platform == "win32", reason="gloo under torchrun")
def test_two_ranks_train_what_one_trains(corpus: Path, tmp_path: Path) -> None:
    dataset = byte_dataset(corpus, tmp_path / "datasets")
    done = torchrun(
        2,
        *ARGUMENTS,
        "--gradient_accumulation_steps=2",
        f"--dataset_path={dataset}",
        f"--run_dir_path={tmp_path / 'two'}",
    )
    assert done.returncode == 0, done.stderr
    small_run(dataset, tmp_path / "one", max_steps=4)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert evaluations(tmp_path / "two") == pytest.approx(evaluations(tmp_path / "one"), rel=1e-5)
    one, two = (
        load_file(newest_checkpoint(tmp_path / name / "pretrain" / "checkpoints") / file)
        for file in ("model.safetensors",)
        for name in ("one", "two")
    )
    assert one.keys() == two.keys()
    for name in one:
        assert (one[name] - two[name]).abs().max() < 1e-4, name


@pytest.mark.skipif(sys.platform == "win32", reason="gloo under torchrun")
def test_a_step_that_ranks_cannot_share_is_refused_with_the_arithmetic(
    corpus: Path, tmp_path: Path
) -> None:
    dataset = byte_dataset(corpus, tmp_path / "datasets")
    done = torchrun(2, *ARGUMENTS, "--gradient_accumulation_steps=3", f"--dataset_path={dataset}")
    assert done.returncode != 0
    assert "--gradient-accumulation-steps is 3, which 2 ranks cannot share evenly" in done.stderr
    assert "--gradient-accumulation-steps 2 or 4" in done.stderr
