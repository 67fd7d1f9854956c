"""Tuning trains the answers alone, leaves its base alone, and goes on exactly."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hub_datasets
import pytest
import torch
from loopback_hub import LoopbackHub
from safetensors.torch import load_file
from small import byte_dataset, small_run
from small_chats import (
    dataset_of,
    message,
    preferences,
    questions,
    tuned,
    tuning,
    written,
)

from nope_gpt.adaptation import adapters, lora
from nope_gpt.config import PrepareConfig
from nope_gpt.data.prepare import prepare
from nope_gpt.data.shards import Dataset
from nope_gpt.errors import NopeError, UsageError
from nope_gpt.hub.locating import newest_checkpoint
from nope_gpt.model import NoPEGPT
from nope_gpt.tokenization import ChatTokenizer
from nope_gpt.training.objectives import CrossEntropy

Nope = Callable[..., subprocess.CompletedProcess[str]]

TOKENS = torch.arange(30).unsqueeze(0)


@pytest.fixture
def chats(base: Path, tmp_path: Path) -> Path:
    return dataset_of(questions(30), base, tmp_path)


def files_of(checkpoint: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of a checkpoint, file by file."""
    return {file.name: load_file(file) for file in checkpoint.glob("*.safetensors")}


def differing(one: Path, other: Path) -> list[str]:
    """Which files of the newest checkpoints of two runs differ in a bit."""
    ours, theirs = (files_of(newest_checkpoint(path / "checkpoints")) for path in (one, other))
    assert ours.keys() == theirs.keys()
    return [
        name
        for name in ours
        if ours[name].keys() != theirs[name].keys()
        or not all(torch.equal(ours[name][key], theirs[name][key]) for key in ours[name])
    ]


def test_tuning_never_touches_its_base(base: Path, chats: Path, tmp_path: Path) -> None:
    before = {file: file.read_bytes() for file in base.rglob("*") if file.is_file()}
    run, _ = tuned(base, chats, tmp_path / "runs")
    assert run == tmp_path / "runs" / "tune"
    assert before == {file: file.read_bytes() for file in base.rglob("*") if file.is_file()}


def test_a_tuned_checkpoint_is_the_model_with_its_adapters_folded_in(
    base: Path, chats: Path, tmp_path: Path
) -> None:
    run, _ = tuned(base, chats, tmp_path / "runs")
    checkpoint = newest_checkpoint(run / "checkpoints")
    model = NoPEGPT.from_pretrained(base)
    model.resize_token_embeddings(261)
    lora.attach(model, rank=8, alpha=1.0)
    lora.train_last_rows(model, 4)
    model.load_state_dict(adapters.load(checkpoint).tensors, strict=False)
    merged = NoPEGPT.from_pretrained(run)
    assert merged.vocabulary_size == 261
    difference = (merged(TOKENS) - model(TOKENS)).abs().max()
    assert difference < 1e-5 * merged(TOKENS).abs().max()


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "muon"])
@pytest.mark.parametrize("embeddings", ["new", "all", "none"])
def test_only_what_is_to_be_trained_moves_by_a_bit(
    base: Path, chats: Path, tmp_path: Path, embeddings: str, optimizer: str
) -> None:
    """Weight decay, and what Adafactor knows of rows and columns, reach nothing else."""
    changes = {"embeddings": embeddings, "optimizer": optimizer, "weight_decay": 0.1}
    run, _ = tuned(base, chats, tmp_path / "runs", num_epochs=1, **changes)
    before = tuning(base, chats).saved.state
    for name, weight in NoPEGPT.from_pretrained(run).state_dict().items():
        if name.endswith("norm.weight"):
            assert torch.equal(weight, before[name])
        elif name != "token_embeddings.weight":
            assert not torch.equal(weight, before[name])
            continue
        moved = (weight != before[name]).any(dim=-1)
        expected = {
            "new": [*[False] * 257, *[True] * 4],
            "all": [True] * 261,
            "none": [False] * 261,
        }
        if name == "token_embeddings.weight":
            assert moved.tolist() == expected[embeddings]


def test_full_tuning_moves_every_weight_and_keeps_no_adapter(
    base: Path, chats: Path, tmp_path: Path
) -> None:
    run, recorder = tuned(base, chats, tmp_path / "runs", full=True, learning_rate=None)
    before = tuning(base, chats).saved.state
    weights = NoPEGPT.from_pretrained(run).state_dict()
    assert not any(torch.equal(weight, before[name]) for name, weight in weights.items())
    assert recorder.reports[-1].learning_rate < 1e-4, "a tenth of what adapters are trained with"
    assert json.loads((run / "run.json").read_text())["config"]["learning_rate"] == 1e-4
    assert not (newest_checkpoint(run / "checkpoints") / adapters.TENSORS).exists()


@pytest.mark.parametrize(
    "changes", [{}, {"packing": False}, {"full": True}, {"dropout": 0.3}, {"embeddings": "all"}]
)
def test_a_resumed_tuning_is_bitwise_the_uninterrupted_one(
    base: Path, chats: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    whole, _ = tuned(base, chats, tmp_path / "whole", **changes)
    parts, _ = tuned(base, chats, tmp_path / "parts", **changes)
    for file in newest_checkpoint(parts / "checkpoints").iterdir():
        file.unlink()
    tuned(base, chats, tmp_path / "parts", resume=True, **changes)
    assert differing(whole, parts) == []


@pytest.mark.slow
def test_kills_at_random_moments_change_no_bit(base: Path, chats: Path, tmp_path: Path) -> None:
    """R1, of whole processes that tune."""
    steps = ["--num-epochs=200", "--checkpoint-interval=5", "--gradient-accumulation-steps=2"]
    places = [f"--model={base}", f"--dataset-path={chats}", "--batch-size=4", "--seed=0"]
    command = [sys.executable, "-m", "nope_gpt.cli", "tune", *places, *steps]
    command += ["--device=cpu", "--precision=float32", "--resume"]

    def start(root: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*command, f"--run-dir-path={root}"],
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    assert start("whole").wait(timeout=120) == 0
    draw = random.Random(0)
    kills = 0
    while kills < 5:
        process = start("parts")
        time.sleep(draw.uniform(3.0, 6.0))
        kills += process.poll() is None
        process.kill()
        if process.wait() == 0:
            break
    assert kills >= 3
    assert start("parts").wait(timeout=120) == 0
    assert differing(tmp_path / "whole" / "tune", tmp_path / "parts" / "tune") == []


@pytest.mark.slow
def test_packed_conversations_are_trained_on_as_padded_ones_are(
    base: Path, chats: Path, tmp_path: Path
) -> None:
    """Whichever way they lie, and whatever the size of a micro-batch."""
    ways: list[dict[str, Any]] = [
        {},
        {"packing": False},
        {"batch_size": 8, "gradient_accumulation_steps": 1},
        {"batch_size": 1, "gradient_accumulation_steps": 8, "max_tokens_per_sample": 150},
    ]
    losses = [
        tuned(base, chats, tmp_path / str(number), **way)[1].losses
        for number, way in enumerate(ways)
    ]
    assert len(losses[0]) == 8
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-5)


def test_a_packed_conversation_has_the_loss_and_the_gradients_that_it_has_alone(
    base: Path, chats: Path
) -> None:
    task = tuning(base, chats)
    model, objective = task.model(torch.float32), CrossEntropy()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    for module in model.modules():
        if isinstance(module, lora.LoRALinear):
            torch.nn.init.normal_(module.lora_b, std=0.1)
    samples = task.batches.train[:7]
    (together,) = task.batches.batches(samples, 0, 1)
    assert together.tokens.size(0) == 1
    loss = objective.outcome(model, together).loss
    alone = torch.zeros(())
    for sample in samples:
        (batch,) = task.batches.batches([sample], 0, 1)
        alone = alone + objective.outcome(model, batch._replace(documents=None)).loss
    torch.testing.assert_close(loss, alone, rtol=1e-5, atol=0)
    pairs = zip(
        torch.autograd.grad(loss, weights), torch.autograd.grad(alone, weights), strict=True
    )
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * other.abs().max().item())


@pytest.mark.slow
@pytest.mark.parametrize(("level", "objective"), [(0, "sft"), (3, "sft"), (2, "dpo")])
def test_two_ranks_tune_as_one_does(
    base: Path, chats: Path, tmp_path: Path, level: int, objective: str
) -> None:
    data = chats if objective == "sft" else dataset_of(preferences(30), base, tmp_path, "pairs")
    _, alone = tuned(base, data, tmp_path / "one")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *("-m", "nope_gpt.cli", "tune", f"--model={base}", f"--dataset-path={data}"),
            *("--batch-size=4", "--gradient-accumulation-steps=2", "--learning-rate=0.01"),
            *("--device=cpu", "--precision=float32", "--seed=0", f"--ddp-sharding-level={level}"),
        ],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = map(json.loads, (tmp_path / "runs" / "tune" / "metrics.jsonl").read_text().splitlines())
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses == pytest.approx(alone.losses, rel=1e-4)
    one, two = (
        NoPEGPT.from_pretrained(path / "tune") for path in (tmp_path / "one", tmp_path / "runs")
    )
    for name, weight in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], weight, rtol=0, atol=1e-3)


@pytest.mark.slow
def test_tuning_learns_the_answers_and_shows_them_before_and_after(
    base: Path, chats: Path, tmp_path: Path
) -> None:
    changes = {"num_epochs": 40, "eval_interval": 20, "checkpoint_interval": 40, "full": True}
    run, recorder = tuned(base, chats, tmp_path / "runs", **changes)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    held_out = [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert len(held_out) == 3
    assert held_out[2] < held_out[1] < held_out[0]
    assert held_out[2] < 1.5
    first, last = recorder.samples[0], recorder.samples[-1]
    assert len(recorder.samples) == 3
    for text in (first, last):
        assert text.count("<|im_start|>user\nWhat is ") == 2
    assert "It is the number" not in first
    assert "It is the number" in last


def test_a_base_with_another_tokenizer_is_refused_by_name(
    chats: Path, corpus: Path, tmp_path: Path
) -> None:
    text = PrepareConfig(dataset_path=str(tmp_path / "bpe"), token_encoding="bpe:270")
    other = prepare([str(corpus)], text)[0].path
    small_run(other, tmp_path / "others", max_steps=1)
    with pytest.raises(UsageError, match="the model's tokenizer is bpe-270, and the data set's"):
        tuned(tmp_path / "others" / "pretrain", chats, tmp_path / "runs")


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"dataset_subset": "chats@10"}, "the subsets changed"),
        ({"embeddings": "all"}, "the embeddings changed"),
        ({"full": True}, "the adapter changed"),
        ({"rank": 4}, "the adapter changed since the run began: rank: it was 8, and is now 4"),
    ],
)
def test_what_a_run_trains_cannot_change_on_resume(
    base: Path, chats: Path, tmp_path: Path, changes: dict[str, Any], what: str
) -> None:
    tuned(base, chats, tmp_path / "runs", num_epochs=1)
    with pytest.raises(UsageError, match=what):
        tuned(base, chats, tmp_path / "runs", resume=True, **changes)


def test_another_base_is_refused_on_resume(
    base: Path, chats: Path, corpus: Path, tmp_path: Path
) -> None:
    tuned(base, chats, tmp_path / "runs", num_epochs=1)
    small_run(byte_dataset(corpus, tmp_path / "t"), tmp_path / "others", max_steps=1, seed=5)
    with pytest.raises(UsageError, match="the base model changed"):
        tuned(tmp_path / "others" / "pretrain", chats, tmp_path / "runs", resume=True)


def test_a_chat_model_can_be_tuned_again(base: Path, chats: Path, tmp_path: Path) -> None:
    first, _ = tuned(base, chats, tmp_path / "runs", num_epochs=1)
    again, _ = tuned(first, chats, tmp_path / "runs", num_epochs=1, run_name="again")
    assert NoPEGPT.from_pretrained(again).vocabulary_size == 261


def test_data_without_an_answer_within_the_limit_are_refused_with_their_places(
    base: Path, tmp_path: Path
) -> None:
    rows = [{"messages": [message("user", "x" * 90), message("assistant", "y")]}] * 3
    data = dataset_of(rows, base, tmp_path)
    with pytest.raises(NopeError, match="no conversation can be trained on: 3 have no answer"):
        tuned(base, data, tmp_path / "runs", max_tokens_per_sample=50)


def test_a_share_of_a_subset_is_drawn_by_the_seed(base: Path, chats: Path) -> None:
    def chosen(**changes: Any) -> list[int]:
        batches = tuning(base, chats, **changes).batches
        return [hash(sample[0].tokens.tobytes()) for sample in batches.train]

    everything = chosen()
    half = chosen(dataset_subset="all:0.5")
    assert len(half) == round(len(everything) / 2)
    assert set(half) < set(everything)
    assert chosen(dataset_subset="chats:0.5") == half
    assert chosen(dataset_subset="chats:0.5", seed=1) != half
    assert len(chosen(dataset_subset="chats:0.5@3")) == 3
    with pytest.raises(UsageError, match="is no share of it"):
        chosen(dataset_subset="chats:2")


@pytest.mark.slow
def test_a_file_is_prepared_first_with_the_tokenizer_of_the_model(
    base: Path, tmp_path: Path, nope: Nope
) -> None:
    source = written(questions(20), tmp_path / "mine.jsonl")
    command = ["tune", "--model", base, "--dataset", source, "--max-steps=1", "--device=cpu"]
    done = nope(*command)
    assert done.returncode == 0, done.stderr
    assert f"preparing {source} with the tokenizer of {base}" in done.stderr
    assert "20 conversations" in done.stderr or "held out)" in done.stderr
    assert (tmp_path / "datasets" / "mine-bytes" / "manifest.json").is_file()
    assert ChatTokenizer.load(newest_checkpoint(tmp_path / "runs" / "tune" / "checkpoints"))
    again = nope(*command, "--run-name=again", "--gpus=2", "--gradient-accumulation-steps=2")
    assert again.returncode == 0, again.stderr
    (tmp_path / "prose.txt").write_text("Nobody answers here. " * 20)
    refused = nope("tune", "--model", base, "--dataset", "prose.txt")
    assert refused.returncode == 2
    assert "this holds text, and no conversations" in refused.stderr


@pytest.mark.slow
def test_parts_of_a_data_set_of_the_hub_are_prepared_first(
    base: Path, tmp_path: Path, nope: Nope
) -> None:
    """Their shares are taken once, and said with the size of the download."""
    with LoopbackHub(tmp_path / "hub") as hub:
        hub_datasets.smoltalk(hub.root, conversations=40)
        subset = "--dataset-subset=smol-summarize:0.5,longalign@7"
        flags = ["--max-steps=1", "--device=cpu", "--max-tokens-per-sample=10000"]
        environment = hub.environment(tmp_path / "hf")
        command = ["tune", "--model", base, "--dataset=smoltalk", subset, *flags]
        done = nope(*command, env=environment)
    assert done.returncode == 0, done.stderr
    assert "download" in done.stderr
    (made,) = (tmp_path / "datasets").iterdir()
    documents = sum(shard.num_documents for shard in Dataset.open(made).shards)
    assert 20 <= documents <= 27, "half of 40 and 7, of which some cannot be trained on"
    counted = re.search(r"\((\d+) conversations, .* (\d+) left out; (\d+) held out", done.stderr)
    assert counted
    assert sum(map(int, counted.groups())) == documents
