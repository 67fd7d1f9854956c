"""Whatever ends training, the same command goes on as if nothing had (R1 to R8, R10 to R17)."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small import Recorder, byte_dataset, small_model, small_run

from nope_gpt.data.batches import Batch
from nope_gpt.errors import CapacityError, NopeError, UsageError
from nope_gpt.hub import storage
from nope_gpt.hub.locating import checkpoints_in, newest_checkpoint
from nope_gpt.training import checkpoints, guards, runs
from nope_gpt.training.checkpoints import Progress, Saver, Snapshot
from nope_gpt.training.guards import Verdict, judge
from nope_gpt.training.loop import Trainer
from nope_gpt.training.objectives import Outcome

Nope = Callable[..., subprocess.CompletedProcess[str]]

posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals and fork")

KILLED = 9


@pytest.fixture
def dataset(corpus: Path, tmp_path: Path) -> Path:
    return byte_dataset(corpus, tmp_path / "datasets")


def directory(root: Path) -> Path:
    return root / "pretrain" / "checkpoints"


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    weights = load_file(checkpoint / "model.safetensors")
    return weights | load_file(checkpoint / "optimizer.safetensors")


def rows(root: Path) -> list[dict[str, Any]]:
    lines = (root / "pretrain" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def exactly(row: dict[str, Any]) -> dict[str, Any]:
    """What of a row does not depend on the machine."""
    return {name: row.get(name) for name in ("step", "loss", "gradient_norm", "learning_rate")}


def assert_same_run(one: Path, other: Path) -> None:
    """Bitwise: the weights, the optimizer, and everything that was logged on the way."""
    ours, theirs = (tensors(newest_checkpoint(directory(root))) for root in (one, other))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    logged = [
        [exactly(row) for row in rows(root) if "loss" in row and "eval_loss" not in row]
        for root in (one, other)
    ]
    assert logged[0] == logged[1]


# R1, R2: kills


def snapshot(step: int) -> Snapshot:
    model = small_model(seed=step)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    state = {f"{name}/exp_avg": weight * step for name, weight in weights.items()}
    return Snapshot(Progress(step=step, tokens=step), weights, state)


def saver(path: Path, keep: int = 2) -> Saver:
    model = small_model()

    def write_model(place: Path, snapshot: Snapshot) -> None:
        storage.save(place, model.saved(snapshot.model))

    return Saver(path, write_model, keep=keep, keep_every=None, written=lambda _: None)


def watch_disk(visit: Callable[[], None]) -> None:
    """Call something before and after everything that changes the disk."""

    def around(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def wrapped(*arguments: Any, **more: Any) -> Any:
            visit()
            result = original(*arguments, **more)
            visit()
            return result

        setattr(owner, name, wrapped)

    for name in ("fsync", "replace", "rename", "unlink", "rmdir", "mkdir"):
        around(os, name)
    for name in ("write_tensors", "write_json"):
        around(checkpoints, name)
        around(storage, name)


def in_child(body: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            body()
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(2)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.slow
@posix
@pytest.mark.parametrize("before", [0, 3], ids=["the first save", "a save that prunes"])
def test_a_kill_at_any_step_of_a_save_leaves_a_whole_checkpoint(
    tmp_path: Path, before: int
) -> None:
    torch.set_num_threads(1)
    total = 0

    def save_killed_at(path: Path, moment: int) -> int:
        def body() -> None:
            seen = 0

            def visit() -> None:
                nonlocal seen
                seen += 1
                if seen == moment:
                    os._exit(KILLED)

            watch_disk(visit)
            saver(path).write(snapshot(10 * (before + 1)))
            (path / "visits").write_text(str(seen))

        return in_child(body)

    def prepared(path: Path) -> Path:
        for number in range(1, before + 1):
            saver(path, keep=4).write(snapshot(10 * number))
        path.mkdir(exist_ok=True)
        return path

    calm = prepared(tmp_path / "calm")
    assert save_killed_at(calm, 0) == 0
    total = int((calm / "visits").read_text())
    assert total > 20
    for moment in range(1, total + 1):
        path = prepared(tmp_path / str(moment))
        assert save_killed_at(path, moment) == KILLED
        found = checkpoints.newest(path)
        if found is None:
            assert before == 0
        else:
            step = checkpoints.read_progress(found).step
            assert step in (10 * before, 10 * (before + 1))
            for name, expected in snapshot(step).optimizer.items():
                assert torch.equal(tensors(found)[name], expected)
        saver(path).write(snapshot(10 * (before + 1)))
        names = {place.name for place in checkpoints_in(path)}
        assert names == ({"step-30", "step-40"} if before else {"step-10"})
        shutil.rmtree(path)


ARGUMENTS = (
    "--embedding-dimensions=32 --num-q-heads=4 --num-kv-heads=2 --num-hidden-layers=2 "
    "--feed-forward-ratio=2 --tokens-per-sample=16 --batch-size=4 --eval-interval=60 "
    "--gradient-accumulation-steps=1 --checkpoint-interval=20 --learning-rate=0.01 --device=cpu "
    "--precision=float32 --seed=0 --num-eval-samples=8 --dropout=0.1 --optimizer=muon"
).split()


def begun(dataset: Path, root: Path, *more: str) -> subprocess.Popen[str]:
    places = [f"--dataset-path={dataset}", f"--run-dir-path={root}"]
    return subprocess.Popen(
        [sys.executable, "-m", "nope_gpt.cli", "pretrain", *ARGUMENTS, *places, *more],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def steps_logged(root: Path) -> int:
    log = root / "pretrain" / "metrics.jsonl"
    return log.read_text().count("\n") if log.is_file() else 0


@pytest.mark.slow
@posix
def test_thirty_kills_at_random_moments_change_no_bit(dataset: Path, tmp_path: Path) -> None:
    """R1, of whole processes: most are killed while they train, some while they start."""
    rng = random.Random(0)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more = ["--max-steps=900"]
    calm = begun(dataset, whole, *more)
    kills = 0
    while kills < 30:
        process = begun(dataset, parts, "--resume", *more)
        logged, deadline = steps_logged(parts), time.monotonic() + rng.uniform(1.0, 4.0)
        while process.poll() is None and time.monotonic() < deadline:
            if steps_logged(parts) > logged + 2:  # It trains: not long from here.
                time.sleep(rng.uniform(0.0, 0.12))
                break
            time.sleep(0.005)
        if process.poll() is not None:
            break
        process.kill()
        kills += 1
        process.communicate()
    assert calm.wait(timeout=120) == 0, calm.stderr and calm.stderr.read()
    last = begun(dataset, parts, "--resume", *more)
    _, talk = last.communicate(timeout=120)
    assert last.returncode == 0, talk
    assert kills == 30
    assert_same_run(parts, whole)
    leftovers = [path.name for path in directory(parts).iterdir() if ".tmp" in path.name]
    assert leftovers == []


# R3: the disk


def test_a_full_disk_ends_the_run_and_the_older_checkpoints_are_whole(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = checkpoints.write_tensors

    def full(path: Path, *arguments: Any) -> None:
        if ".tmp" in str(path) and "step-6" in str(path):
            raise CapacityError("the disk is full", where=str(path))
        original(path, *arguments)

    monkeypatch.setattr(checkpoints, "write_tensors", full)
    with pytest.raises(CapacityError, match="the disk is full") as caught:
        small_run(dataset, tmp_path)
    assert caught.value.exit_code == 4
    assert [path.name for path in directory(tmp_path).iterdir()] == ["step-3"]
    monkeypatch.undo()
    small_run(dataset, tmp_path, resume=True)
    small_run(dataset, tmp_path / "calm")
    assert_same_run(tmp_path, tmp_path / "calm")


@posix
def test_a_quota_on_the_size_of_files_is_told_as_a_full_disk(tmp_path: Path) -> None:
    """R3, by a limit of the system: EFBIG."""
    import resource

    def body() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            saver(tmp_path / "checkpoints").write(snapshot(1))
        except CapacityError as error:
            assert error.exit_code == 4
            os._exit(44)

    torch.set_num_threads(1)
    assert in_child(body) == 44
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_disk_too_small_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    one = saver(tmp_path / "checkpoints")
    with pytest.raises(CapacityError, match=r"a checkpoint takes .* KB, and the disk has 1.0 KB"):
        one.save(snapshot(1))
    assert not (tmp_path / "checkpoints").exists()


# R4, R5: damage


def test_any_damage_to_the_newest_checkpoint_is_seen_and_the_one_before_taken(
    tmp_path: Path,
) -> None:
    rng = random.Random(0)
    one = saver(tmp_path, keep=3)
    for step in (1, 2):
        one.write(snapshot(step))
    files = sorted((tmp_path / "step-2").iterdir())
    for number in range(120):
        file = rng.choice(files)
        content = bytearray(file.read_bytes())
        damaged = bytearray(content)
        if number % 3:
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        else:
            del damaged[rng.randrange(len(damaged)) :]
        file.write_bytes(damaged)
        found = checkpoints.newest(tmp_path)
        if found != tmp_path / "step-1":
            # Only the manifest can differ without harm: in its own spacing.
            assert file.name == "manifest.json"
            assert json.loads(damaged)["files"] == json.loads(content)["files"]
        file.write_bytes(content)
    assert checkpoints.newest(tmp_path) == tmp_path / "step-2"


def test_folders_that_only_look_like_checkpoints_are_passed_over(tmp_path: Path) -> None:
    one = saver(tmp_path, keep=3)
    one.write(snapshot(1))
    (tmp_path / "step-9").mkdir()
    (tmp_path / "step-8.tmp-abcd").mkdir()
    shutil.copytree(tmp_path / "step-1", tmp_path / "step-7")
    (tmp_path / "step-7" / "model.safetensors").unlink()
    (tmp_path / "step-6").write_text("a file")
    assert checkpoints.newest(tmp_path) == tmp_path / "step-1"


def test_the_newest_checkpoint_is_that_of_the_most_steps_and_not_of_the_last_name(
    tmp_path: Path,
) -> None:
    for step in (9, 10):
        saver(tmp_path).write(snapshot(step))
    assert checkpoints.newest(tmp_path) == tmp_path / "step-10"


def test_pruning_keeps_every_so_many_and_never_counts_the_damaged(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints"
    one = saver(path, keep=9)
    for step in (1, 2, 3, 4, 5, 6):
        one.write(snapshot(step))
    (path / "step-5" / "optimizer.safetensors").write_bytes(b"")
    checkpoints.prune(path, 6, keep=2, keep_every=3)
    assert sorted(place.name for place in path.iterdir()) == ["step-3", "step-4", "step-6"]


# R6: the order on the disk


def test_every_file_is_flushed_before_the_rename_and_the_parent_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, str]] = []
    fsync, replace = os.fsync, Path.replace

    def flushing(descriptor: int) -> None:
        events.append(("flush", str(Path(f"/proc/self/fd/{descriptor}").readlink())))
        fsync(descriptor)

    def renaming(self: Path, target: Path) -> Path:
        events.append(("rename", self.name))
        return replace(self, target)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc to name what is flushed")
    monkeypatch.setattr(os, "fsync", flushing)
    monkeypatch.setattr(Path, "replace", renaming)
    saver(tmp_path).write(snapshot(1))
    renamed = next(
        index for index, (kind, name) in enumerate(events) if kind == "rename" and "step-1" in name
    )
    before = {Path(name).name for kind, name in events[:renamed] if kind == "flush"}
    after = [name for kind, name in events[renamed:] if kind == "flush"]
    assert {file.name for file in (tmp_path / "step-1").iterdir()} <= before
    assert str(tmp_path) in after


# R7: training goes on while a checkpoint is written


def test_a_checkpoint_is_of_its_step_however_long_its_writing_takes(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_run(dataset, tmp_path / "calm", checkpoint_interval=2)
    original, reports = Saver.write, []

    def slow(self: Saver, moment: Snapshot) -> Path:
        if moment.progress.step < 6:
            deadline = time.monotonic() + 20
            while len(reports) < moment.progress.step + 2 and time.monotonic() < deadline:
                time.sleep(0.01)
            assert len(reports) >= moment.progress.step + 2, "training went on"
        return original(self, moment)

    report = Trainer.report

    def counted(self: Trainer, *arguments: float) -> None:
        reports.append(arguments)
        report(self, *arguments)

    monkeypatch.setattr(Saver, "write", slow)
    monkeypatch.setattr(Trainer, "report", counted)
    small_run(dataset, tmp_path / "slow", checkpoint_interval=2)
    for step in (2, 4, 6):
        one, other = (
            tensors(directory(tmp_path / name) / f"step-{step}") for name in ("calm", "slow")
        )
        assert all(torch.equal(one[name], other[name]) for name in one), step


# R8, R10, R11: order, randomness and schedule


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "muon"])
def test_a_run_resumed_twice_over_the_end_of_an_epoch_is_the_uninterrupted_one(
    dataset: Path, tmp_path: Path, optimizer: str
) -> None:
    recipe: dict[str, Any] = {
        "optimizer": optimizer,
        "dropout": 0.1,
        "tokens_per_sample": 512,
        "max_steps": 9,
        "checkpoint_interval": 1,
        "keep_checkpoints": 9,
        "schedule": "wsd",
    }
    small_run(dataset, tmp_path / "whole", **recipe)
    small_run(dataset, tmp_path / "parts", **recipe)
    for left in (5, 2):
        for path in checkpoints_in(directory(tmp_path / "parts")):
            if checkpoints.step_of(path) > left:
                shutil.rmtree(path)
        small_run(dataset, tmp_path / "parts", resume=True, **recipe)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_another_micro_batch_goes_on_in_the_same_order(dataset: Path, tmp_path: Path) -> None:
    """R9: what a step trains on is the samples in it, however they are split."""
    constant: dict[str, Any] = {"schedule": "constant", "warmup_fraction": 0.0}
    whole = small_run(dataset, tmp_path / "whole", **constant)
    small_run(dataset, tmp_path / "parts", max_steps=3, **constant)
    joint = {"batch_size": 8, "gradient_accumulation_steps": 1}
    rest = small_run(dataset, tmp_path / "parts", resume=True, **constant, **joint)
    assert rest.losses == pytest.approx(whole.losses[3:], rel=1e-5)
    with pytest.raises(UsageError, match="the samples per step changed"):
        small_run(dataset, tmp_path / "parts", resume=True, batch_size=16, max_steps=9)


def test_a_run_begun_from_a_checkpoint_of_another_is_that_run_from_there(
    dataset: Path, tmp_path: Path
) -> None:
    """`--resume CHECKPOINT --run-name NEW`: nothing of the first run is touched."""
    root = tmp_path / "runs"
    whole = small_run(dataset, root, optimizer="muon", dropout=0.2)
    step_3 = root / "pretrain" / "checkpoints" / "step-3"
    before = sorted(path.stat().st_mtime_ns for path in (root / "pretrain").rglob("*"))
    again = small_run(
        dataset, root, resume=step_3, run_name="branch", optimizer="muon", dropout=0.2
    )
    assert again.losses == whole.losses[3:]
    assert before == sorted(path.stat().st_mtime_ns for path in (root / "pretrain").rglob("*"))
    files = [
        root / name / "checkpoints/step-6/model.safetensors" for name in ("pretrain", "branch")
    ]
    assert files[0].read_bytes() == files[1].read_bytes()
    with pytest.raises(UsageError, match="gone on to step-6 after step-3") as caught:
        small_run(dataset, root, resume=step_3, optimizer="muon", dropout=0.2)
    assert "--run-name pretrain-2" in str(caught.value)
    with pytest.raises(UsageError, match="the model changed"):
        small_run(dataset, root, resume=step_3, run_name="other", num_decoder_layers=3)
    (step_3 / "optimizer.safetensors").write_bytes(b"")
    with pytest.raises(NopeError, match=r"optimizer\.safetensors"):
        small_run(dataset, root, resume=step_3, run_name="third", optimizer="muon", dropout=0.2)


@pytest.mark.slow
def test_resuming_takes_the_settings_of_what_it_is_given(
    dataset: Path, tmp_path: Path, nope: Nope
) -> None:
    """A run's directory or a checkpoint's say all: nothing needs to be typed again."""
    root = tmp_path / "elsewhere"
    small_run(dataset, root, run_name="first")
    run = root / "first"
    more = nope("pretrain", "--resume", run, "--max-steps=9", "--json")
    assert more.returncode == 0, more.stderr
    assert "going on from step 6 of 9" in more.stderr
    step_9 = run / "checkpoints" / "step-9"
    branch = nope("pretrain", f"--resume={step_9}", "--run-name", "second", "--max-steps=12")
    assert branch.returncode == 0, branch.stderr
    assert (root / "second" / "checkpoints" / "step-12" / "model.safetensors").is_file()
    bare = nope("pretrain", "--run-dir-path", root, "--run-name=second", "--resume")
    assert "going on from step 12 of 12" in bare.stderr
    wrong = nope("pretrain", "--resume", "nowhere")
    assert wrong.returncode == 3
    assert "neither a run nor a checkpoint" in wrong.stderr
    assert "tune" not in wrong.stderr


# R12, R13: what a bad step does


def test_losses_are_judged_by_those_before_them() -> None:
    calm = [3.0 + 0.01 * (number % 3) for number in range(40)]
    for on_spike, verdict in (
        ("ignore", Verdict.UPDATE),
        ("warn", Verdict.WARN),
        ("skip", Verdict.SKIP),
        ("rewind", Verdict.REWIND),
    ):
        recent = list(calm)
        assert judge(3.05, 1.0, recent, on_spike) == Verdict.UPDATE
        assert judge(4.0, 1.0, recent, on_spike) == verdict
        assert judge(float("nan"), 1.0, recent, on_spike) == Verdict.NOT_FINITE
        assert judge(float("inf"), 1.0, recent, on_spike) == Verdict.NOT_FINITE
        assert judge(3.0, float("inf"), recent, on_spike) == Verdict.NOT_FINITE
        assert (4.0 in recent) == (on_spike in ("ignore", "warn"))
    assert judge(9.0, 1.0, calm[: guards.FEWEST - 1], "skip") == Verdict.UPDATE, "too early"
    assert judge(9.0, 1.0, calm[: guards.FEWEST], "skip") == Verdict.SKIP
    assert judge(1.0, 1.0, list(calm), "skip") == Verdict.UPDATE, "a fall is no spike"
    still = [3.0] * guards.WINDOW
    assert judge(3.09, 1.0, still, "skip") == Verdict.UPDATE, "so small a jump is none"
    assert still == [*[3.0] * (guards.WINDOW - 1), 3.09]


def spiked(monkeypatch: pytest.MonkeyPatch, at: int, times: int = 1) -> None:
    """Add to the loss of a step, the first so many times that it is trained."""
    original, seen = Trainer.forward_backward, []

    def spiking(self: Trainer, batch: Batch, count: float) -> Outcome:
        outcome = original(self, batch, count)
        if self.progress.step == at and len(seen) < times:
            seen.append(at)
            outcome = outcome._replace(loss=outcome.loss + 9.0 * count)
        return outcome

    monkeypatch.setattr(Trainer, "forward_backward", spiking)


class Notes(Recorder):
    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []

    def noticed(self, what: str) -> None:
        self.notes.append(what)


def spike_run(dataset: Path, root: Path, *, resume: bool = False, **changes: Any) -> Notes:
    from small import RECIPE

    from nope_gpt.config import PretrainConfig
    from nope_gpt.training.pretraining import pretrain

    notes = Notes()
    settings: dict[str, Any] = RECIPE | {"dataset_path": str(dataset), "run_dir_path": str(root)}
    settings |= {"max_steps": 30, "checkpoint_interval": 10, "learning_rate": 1e-3} | changes
    settings |= {"gradient_accumulation_steps": 1}
    torch.set_num_threads(1)
    pretrain(PretrainConfig(**settings), [notes], resume=resume)
    return notes


def test_a_spike_is_told_and_with_warn_changes_nothing(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spike_run(dataset, tmp_path / "calm")
    spiked(monkeypatch, at=24)
    run = spike_run(dataset, tmp_path / "warned", loss_spike="warn")
    assert len(run.notes) == 1
    assert run.notes[0].startswith("step 25: the loss is 1")
    one, other = (tensors(directory(tmp_path / name) / "step-30") for name in ("calm", "warned"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_spike_can_cost_its_update_alone(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spiked(monkeypatch, at=24)
    run = spike_run(dataset, tmp_path, loss_spike="skip", checkpoint_interval=1, keep_checkpoints=9)
    assert "nothing was updated" in run.notes[0]
    before, after = (tensors(directory(tmp_path) / f"step-{step}") for step in (24, 25))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [report.step for report in run.reports] == list(range(1, 31))


def test_a_spike_can_send_the_run_back_and_past_the_samples_since(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spiked(monkeypatch, at=24)
    run = spike_run(dataset, tmp_path, loss_spike="rewind")
    assert [report.step for report in run.reports] == [*range(1, 25), *range(21, 31)]
    logged = [row["step"] for row in rows(tmp_path) if "loss" in row]
    assert logged == list(range(1, 31)), "the log is that of the way that was gone on"
    progress = checkpoints.read_progress(newest_checkpoint(directory(tmp_path)))
    assert (progress.left_out, progress.rewinds) == (5, 1)


def test_a_run_that_was_sent_back_goes_on_as_if_the_samples_since_were_not_there(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of the step that spiked is left: not its gradients, not its loss."""
    spike_run(dataset, tmp_path / "other", max_steps=30)
    for path in checkpoints_in(directory(tmp_path / "other")):
        if checkpoints.step_of(path) > 20:
            shutil.rmtree(path)
    with monkeypatch.context() as patch:
        spiked(patch, at=24)
        back = spike_run(dataset, tmp_path / "back", loss_spike="rewind")
    original = checkpoints.read_progress

    def moved(path: Path) -> Progress:
        progress = original(path)
        progress.left_out, progress.rewinds = 5, 1
        return progress

    monkeypatch.setattr(checkpoints, "read_progress", moved)
    other = spike_run(dataset, tmp_path / "other", max_steps=30, resume=True)
    assert [report.loss for report in back.reports[24:]] == [r.loss for r in other.reports]
    assert_same_run(tmp_path / "back", tmp_path / "other")


def test_a_run_is_not_sent_back_for_ever(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spiked(monkeypatch, at=24, times=99)
    with pytest.raises(NopeError, match="jumped again after 3 times of rewinding"):
        spike_run(dataset, tmp_path, loss_spike="rewind")


def test_a_damaged_log_is_named_and_not_overwritten(dataset: Path, tmp_path: Path) -> None:
    small_run(dataset, tmp_path)
    log = tmp_path / "pretrain" / "metrics.jsonl"
    log.write_text(log.read_text().replace('{"step": 2,', '{"step": two,'))
    before = log.read_bytes()
    with pytest.raises(NopeError, match="line 2 of this log is damaged"):
        small_run(dataset, tmp_path, resume=True, max_steps=7)
    assert log.read_bytes() == before


# R16: signals


@posix
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["TERM", "INT"])
def test_a_signal_while_evaluating_ends_in_a_checkpoint(
    dataset: Path, tmp_path: Path, number: signal.Signals
) -> None:
    process = begun(
        dataset,
        tmp_path,
        *("--max-steps=100000", "--eval-interval=5", "--num-eval-samples=100000"),
    )
    while steps_logged(tmp_path) < 5:
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.005)
    process.send_signal(number)
    _, talk = process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else 143), talk
    assert "after saving a checkpoint" in talk
    last = newest_checkpoint(directory(tmp_path))
    assert checkpoints.step_of(last) == [row for row in rows(tmp_path) if "loss" in row][-1]["step"]


@posix
def test_a_second_signal_ends_at_once() -> None:
    from nope_gpt.signals import StopRequest

    def body() -> None:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.signal == signal.SIGTERM
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)

    assert in_child(body) == -signal.SIGTERM


# R17: two trainers


def test_a_second_trainer_on_a_run_is_refused_and_told_of_the_first(
    dataset: Path, tmp_path: Path
) -> None:
    small_run(dataset, tmp_path)
    said = rf"process {os.getpid()} on .* trains this run now"
    with runs.locked(tmp_path / "pretrain"), pytest.raises(UsageError, match=said):
        small_run(dataset, tmp_path, resume=True)
    assert small_run(dataset, tmp_path, resume=True, max_steps=7).losses
