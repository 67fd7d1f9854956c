"""The loop: accumulation, resuming, seeds and signals change nothing that they should not."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small import RECIPE, byte_dataset, small_run
from torch._inductor.exc import InductorError

from nope_gpt.config import PretrainConfig
from nope_gpt.config.knobs import resolve
from nope_gpt.config.training import LEARNING_RATES
from nope_gpt.data.batches import TextBatches
from nope_gpt.data.shards import Dataset
from nope_gpt.errors import Interrupted, MissingError, NopeError, UsageError
from nope_gpt.files.artefacts import FORMAT_VERSION, MANIFEST, publish, read_manifest, verify
from nope_gpt.hub.locating import newest_checkpoint
from nope_gpt.model import NoPEGPT
from nope_gpt.signals import StopRequest
from nope_gpt.training.checkpoints import prune
from nope_gpt.training.compilation import compiling
from nope_gpt.training.loop import Trainer
from nope_gpt.training.objectives import Outcome
from nope_gpt.training.runs import resumed_from, stored_record
from nope_gpt.training.schedules import rate_fraction


@pytest.fixture
def dataset(corpus: Path, tmp_path: Path) -> Path:
    return byte_dataset(corpus, tmp_path / "datasets")


def final(root: Path, step: int = 6) -> dict[str, torch.Tensor]:
    """All tensors of a run's checkpoint, the optimizer's included."""
    path = root / "pretrain" / "checkpoints" / f"step-{step}"
    return load_file(path / "model.safetensors") | load_file(path / "optimizer.safetensors")


def metrics(root: Path) -> list[dict[str, Any]]:
    lines = (root / "pretrain" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "muon"])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(
    dataset: Path, tmp_path: Path, optimizer: str
) -> None:
    recipe = {"optimizer": optimizer, "dropout": 0.1}
    whole = small_run(dataset, tmp_path / "whole", **recipe)
    first = small_run(dataset, tmp_path / "parts", **recipe)
    for path in (tmp_path / "parts" / "pretrain" / "checkpoints").glob("step-6"):
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    second = small_run(dataset, tmp_path / "parts", resume=True, **recipe)
    assert first.losses == whole.losses
    assert second.losses == whole.losses[3:]
    assert_equal(final(tmp_path / "parts"), final(tmp_path / "whole"))
    logged = [row["loss"] for row in metrics(tmp_path / "parts") if "loss" in row]
    assert logged == whole.losses


def test_accumulating_two_batches_of_four_is_one_batch_of_eight(
    dataset: Path, tmp_path: Path
) -> None:
    split = small_run(dataset, tmp_path / "a", batch_size=4, gradient_accumulation_steps=2)
    joint = small_run(dataset, tmp_path / "b", batch_size=8, gradient_accumulation_steps=1)
    assert split.losses == pytest.approx(joint.losses, rel=1e-5)
    norms = [[report.gradient_norm for report in run.reports] for run in (split, joint)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_two_runs_of_one_seed_are_equal_and_zero_is_a_seed(dataset: Path, tmp_path: Path) -> None:
    runs = [
        small_run(dataset, tmp_path / name, seed=seed, max_steps=2)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert runs[0].losses == runs[1].losses != runs[2].losses
    assert stored_record(tmp_path / "a" / "pretrain", "pretrain")["config"]["seed"] == 0


def test_without_a_seed_one_is_drawn_recorded_and_reused_on_resume(
    dataset: Path, tmp_path: Path
) -> None:
    small_run(dataset, tmp_path / "runs", seed=None, max_steps=3)
    stored = stored_record(tmp_path / "runs" / "pretrain", "pretrain")["config"]
    assert isinstance(stored["seed"], int)
    from nope_gpt.training.pretraining import pretrain

    settings = stored | {"max_steps": 4}
    pretrain(PretrainConfig(**settings), [], resume=True)
    assert (
        stored_record(tmp_path / "runs" / "pretrain", "pretrain")["config"]["seed"]
        == stored["seed"]
    )


def test_training_learns(dataset: Path, tmp_path: Path) -> None:
    losses = small_run(dataset, tmp_path, max_steps=60, eval_interval=30).losses
    assert losses[0] == pytest.approx(np.log(257), rel=0.05)
    assert losses[-1] < 0.6 * losses[0]
    held_out = [row["eval_loss"] for row in metrics(tmp_path) if "eval_loss" in row]
    assert held_out[1] < held_out[0]


def test_metrics_say_what_happened(dataset: Path, tmp_path: Path) -> None:
    small_run(dataset, tmp_path)
    rows = [row for row in metrics(tmp_path) if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["tokens"] for row in rows] == [128 * step for step in range(1, 7)]
    for row in rows:
        assert row["tokens_per_second"] > 0
    config = PretrainConfig(**RECIPE)
    assert [row["learning_rate"] for row in rows] == [
        1e-2 * rate_fraction(step, 6, config) for step in range(6)
    ]
    assert list(tmp_path.glob("pretrain/events.out.tfevents.*"))


def test_the_hold_out_loss_is_that_of_its_tokens_each_once(dataset: Path, tmp_path: Path) -> None:
    small_run(dataset, tmp_path, max_steps=1)
    reported = next(row["eval_loss"] for row in metrics(tmp_path) if "eval_loss" in row)
    checkpoint = newest_checkpoint(tmp_path / "pretrain" / "checkpoints")
    model = NoPEGPT.from_pretrained(checkpoint)
    batches = TextBatches(
        Dataset.open(dataset),
        tokens_per_sample=16,
        batch_size=1,
        micro_batches_per_step=1,
        seed=0,
    )
    stream = torch.from_numpy(batches.held_out.read(0, len(batches.held_out)))
    total = 0.0
    for start in range(0, len(stream) - 1, 16):
        piece = stream[start : start + 17]
        log_probabilities = torch.log_softmax(model(piece[None, :-1])[0].double(), dim=-1)
        total -= log_probabilities[range(len(piece) - 1), piece[1:]].sum().item()
    assert reported == pytest.approx(total / (len(stream) - 1), rel=1e-5)


def test_a_checkpoint_is_a_model_that_verifies(dataset: Path, tmp_path: Path) -> None:
    small_run(dataset, tmp_path)
    path = newest_checkpoint(tmp_path / "pretrain" / "checkpoints")
    assert path.name == "step-6"
    verify(path, read_manifest(path, "checkpoint"))
    names = {file.name for file in path.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "optimizer.safetensors"} <= names
    model = NoPEGPT.from_pretrained(tmp_path / "pretrain")
    assert model.trained_context_length == 16
    assert not list(tmp_path.rglob("*.tmp-*"))


def test_only_the_newest_checkpoints_are_kept(dataset: Path, tmp_path: Path) -> None:
    small_run(dataset, tmp_path, checkpoint_interval=1, keep_checkpoints=2)
    directory = tmp_path / "pretrain" / "checkpoints"
    assert sorted(path.name for path in directory.iterdir()) == ["step-5", "step-6"]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", "flip"),
        ("optimizer.safetensors", "flip"),
        ("model.safetensors", "cut"),
        (MANIFEST, "cut"),
        ("optimizer.safetensors", "remove"),
        (MANIFEST, "remove"),
    ],
)
def test_a_damaged_newest_checkpoint_is_passed_over(
    dataset: Path, tmp_path: Path, name: str, damage: str
) -> None:
    small_run(dataset, tmp_path, max_steps=4, checkpoint_interval=2)
    directory = tmp_path / "pretrain" / "checkpoints"
    file = directory / "step-4" / name
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 0x10
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[:-7])
    else:
        file.unlink()
    assert newest_checkpoint(directory).name == "step-2"
    again = small_run(dataset, tmp_path, max_steps=6, checkpoint_interval=2, resume=True)
    assert [report.step for report in again.reports] == [3, 4, 5, 6]
    assert len(again.notices) == 1
    assert again.notices[0].startswith("passed over step-4: ")
    kept = sorted(path.name for path in directory.glob("step-*"))
    assert kept == ["step-2", "step-4", "step-4.damaged", "step-6"]


def test_a_run_keeps_its_checkpoints_where_they_are(dataset: Path, tmp_path: Path) -> None:
    """On a resume another --checkpoint-path would begin anew, or with those of another run."""
    small_run(dataset, tmp_path, max_steps=1)
    small_run(dataset, tmp_path, max_steps=1, run_name="other", seed=1)
    for elsewhere in (tmp_path / "other" / "checkpoints", tmp_path / "empty"):
        with pytest.raises(UsageError, match="the checkpoints of this run are in checkpoints,"):
            small_run(dataset, tmp_path, checkpoint_path=str(elsewhere), resume=True)


def test_a_run_is_not_resumed_to_end_before_where_it_is(dataset: Path, tmp_path: Path) -> None:
    small_run(dataset, tmp_path, max_steps=4)
    record = (tmp_path / "pretrain" / "run.json").read_text()
    with pytest.raises(UsageError, match="has come to step 4, and is to end at step 2"):
        small_run(dataset, tmp_path, max_steps=2, resume=True)
    small_run(dataset, tmp_path, max_steps=4, learning_rate=0.5, resume=True)
    assert (tmp_path / "pretrain" / "run.json").read_text() == record, "nothing was done with it"


def test_a_run_that_goes_on_keeps_the_learning_rate_that_was_taken(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_run(dataset, tmp_path, max_steps=1, learning_rate=None)
    monkeypatch.setitem(LEARNING_RATES, "muon", 1.0)
    _, layers = resumed_from(tmp_path / "pretrain", "pretrain")
    assert resolve(PretrainConfig, layers).peak_learning_rate == 2e-2


def test_non_finite_steps_count_in_a_row_only(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Trainer.forward_backward
    count = 0

    def sometimes(self: Trainer, *arguments: Any) -> Outcome:
        nonlocal count
        count += 1
        outcome = real(self, *arguments)
        return outcome._replace(loss=outcome.loss * (nan if count % 6 in (1, 3) else 1.0))

    monkeypatch.setattr(Trainer, "forward_backward", sometimes)
    done = small_run(dataset, tmp_path, max_steps=9, max_non_finite_steps=3)
    assert len(done.reports) == 9
    assert len(done.notices) == 6


def test_dropout_silences_otherwise_at_every_step_and_place(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []
    real = Trainer.forward_backward

    def noting(self: Trainer, *arguments: Any) -> Outcome:
        seeds.append(torch.initial_seed())
        return real(self, *arguments)

    monkeypatch.setattr(Trainer, "forward_backward", noting)
    small_run(dataset, tmp_path, dropout=0.1, max_steps=4)
    assert len(seeds) == len(set(seeds)) == 8


def test_if_every_checkpoint_is_damaged_each_complaint_is_told(
    dataset: Path, tmp_path: Path
) -> None:
    small_run(dataset, tmp_path, max_steps=1)
    file = tmp_path / "pretrain" / "checkpoints" / "step-1" / "model.safetensors"
    file.write_bytes(b"short")
    with pytest.raises(MissingError, match="step-1: this checkpoint is damaged: model"):
        small_run(dataset, tmp_path, resume=True)


def test_a_run_that_exists_is_never_overwritten(dataset: Path, tmp_path: Path) -> None:
    small_run(dataset, tmp_path, max_steps=1)
    with pytest.raises(UsageError, match="this run already exists") as caught:
        small_run(dataset, tmp_path, max_steps=1)
    assert "--resume" in str(caught.value)
    assert "--run-name pretrain-2" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"embedding_dimensions": 64}, "the model changed"),
        ({"tokens_per_sample": 8}, "the tokens per sample changed"),
        ({"batch_size": 8}, "the samples per step changed"),
        ({"optimizer": "adamw"}, "the optimizer changed"),
        ({"seed": 1}, "the seed changed"),
    ],
)
def test_resuming_another_network_is_refused(
    dataset: Path, tmp_path: Path, changes: dict[str, int], what: str
) -> None:
    small_run(dataset, tmp_path, max_steps=1)
    with pytest.raises(UsageError, match=what):
        small_run(dataset, tmp_path, resume=True, **changes)


def test_resuming_on_other_data_is_refused(dataset: Path, corpus: Path, tmp_path: Path) -> None:
    small_run(dataset, tmp_path, max_steps=1)
    (corpus / "99.txt").write_text("another document")
    other = byte_dataset(corpus, tmp_path / "others")
    with pytest.raises(UsageError, match="the data set changed"):
        small_run(other, tmp_path, resume=True)


def test_a_loss_that_is_not_finite_updates_and_saves_nothing(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(NopeError, match=r"nothing was updated"):
        small_run(dataset, tmp_path, learning_rate=1e30, max_gradient_norm=1e30, max_steps=40)
    assert not (tmp_path / "pretrain" / "checkpoints").exists()


def test_gradients_that_are_no_numbers_move_no_weight(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Trainer.forward_backward

    def spoiling(self: Trainer, *arguments: Any) -> Outcome:
        outcome = real(self, *arguments)
        if self.progress.step == 2:
            self.trained[0].grad.fill_(nan)
        return outcome

    monkeypatch.setattr(Trainer, "forward_backward", spoiling)
    done = small_run(dataset, tmp_path)
    assert len(done.notices) == 1
    for name, weight in load_file(done.checkpoints[-1] / "model.safetensors").items():
        assert weight.isfinite().all(), name


def test_each_checkpoint_is_saved_once(dataset: Path, tmp_path: Path) -> None:
    done = small_run(dataset, tmp_path, max_steps=7)
    assert [path.name for path in done.checkpoints] == ["step-3", "step-6", "step-7"]


def test_checkpoint_path_of_the_old_scripts_means_a_directory(
    dataset: Path, tmp_path: Path
) -> None:
    path = tmp_path / "checkpoints" / "checkpoint.pt"
    small_run(dataset, tmp_path / "runs", max_steps=1, checkpoint_path=str(path))
    assert (tmp_path / "checkpoints" / "checkpoint" / "step-1" / "model.safetensors").is_file()
    assert NoPEGPT.from_pretrained(tmp_path / "runs" / "pretrain").vocabulary_size == 257


def test_two_runs_never_share_their_checkpoints(dataset: Path, tmp_path: Path) -> None:
    path = tmp_path / "checkpoints"
    small_run(dataset, tmp_path / "a", max_steps=1, checkpoint_path=str(path))
    with pytest.raises(UsageError, match="there are checkpoints of another run here"):
        small_run(dataset, tmp_path / "b", max_steps=1, checkpoint_path=str(path))
    assert [checkpoint.name for checkpoint in path.glob("step-*")] == ["step-1"]


def empty_checkpoint(directory: Path, step: int) -> Path:
    manifest = {"kind": "checkpoint", "format_version": FORMAT_VERSION, "step": step}
    with publish(directory / f"step-{step}", manifest=manifest) as path:
        (path / "model.safetensors").write_bytes(b"weights")
    return directory / f"step-{step}"


def test_pruning_never_removes_the_checkpoint_just_written(tmp_path: Path) -> None:
    for step in (50, 100, 150, 200, 300):
        empty_checkpoint(tmp_path / "run", step)
    prune(tmp_path / "run", 150, 2)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["step-100", "step-150"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGUSR1", 143)])
def test_a_signal_ends_a_run_in_a_checkpoint(
    dataset: Path, tmp_path: Path, name: str, code: int
) -> None:
    arguments = [f"--dataset-path={dataset}", f"--run-dir-path={tmp_path}"]
    arguments += ["--max-steps=100000", "--eval-interval=7", "--embedding-dimensions=32"]
    arguments += ["--num-q-heads=4", "--num-kv-heads=2", "--num-hidden-layers=2", "--device=cpu"]
    arguments += ["--tokens-per-sample=16", "--gradient-accumulation-steps=1", "--seed=0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "nope_gpt.cli", "pretrain", *arguments],
        stderr=subprocess.PIPE,
        text=True,
    )
    log = tmp_path / "pretrain" / "metrics.jsonl"
    while not (log.is_file() and log.read_text().count("\n") > 20):
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.05)
    process.send_signal(getattr(signal, name))
    _, talk = process.communicate(timeout=60)
    assert process.returncode == code
    assert "by a signal, after saving a checkpoint" in talk
    assert "--resume goes on" in talk
    last = newest_checkpoint(tmp_path / "pretrain" / "checkpoints")
    assert int(last.name.removeprefix("step-")) == metrics(tmp_path)[-1]["step"]


@pytest.mark.parametrize("number", [0, signal.SIGINT])
def test_a_compiler_that_fails_in_the_middle_is_told_with_a_way_on(number: int) -> None:
    """Ctrl-C in a terminal ends a compiler too, and can leave a cut file in its cache."""
    stop = StopRequest()
    stop.signal = number
    with pytest.raises(Interrupted if number else NopeError) as caught, compiling(stop):
        raise InductorError(ImportError("main.so: file too short"), None)
    error = caught.value
    assert ("by a signal" if number else "main.so: file too short") in error.what
    assert "--resume" in error.hint
    assert error.exit_code == (130 if number else 1)
    with pytest.raises(ValueError, match="another"), compiling(stop):
        raise ValueError("another")
