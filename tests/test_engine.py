"""What surrounds the loop: plans, compilation, hardware, the log, samples and batches."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import RECIPE, byte_dataset, small_model, small_run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nope_gpt import device
from nope_gpt.config import PRESETS, ModelConfig, PrepareConfig, PretrainConfig
from nope_gpt.data.batches import TextBatches
from nope_gpt.data.prepare import prepare
from nope_gpt.data.shards import Dataset, TokenStream
from nope_gpt.device import Ranks
from nope_gpt.errors import CapacityError, UsageError
from nope_gpt.sizing.arithmetic import count_parameters, training_flops_per_token
from nope_gpt.sizing.hardware import dense_bfloat16_peak
from nope_gpt.training import compilation
from nope_gpt.training.compilation import WORTHWHILE_FLOPS, compile_network
from nope_gpt.training.loop import Trainer
from nope_gpt.training.prefetching import Prefetcher
from nope_gpt.training.pretraining import Pretraining, dry_run, pretrain
from nope_gpt.training.reporting import Listener, RunLog, StepReport

Nope = Callable[..., subprocess.CompletedProcess[str]]

CPU = torch.device("cpu")


@pytest.fixture
def dataset(corpus: Path, tmp_path: Path) -> Path:
    return byte_dataset(corpus, tmp_path / "datasets")


def config_of(dataset: Path, **changes: Any) -> PretrainConfig:
    return PretrainConfig(**RECIPE | {"dataset_path": str(dataset)} | changes)


# The plan


def test_a_dry_run_tells_the_run_and_makes_nothing(dataset: Path, tmp_path: Path) -> None:
    config = config_of(dataset, run_dir_path=str(tmp_path / "runs"))
    plan = dry_run(config)
    model = Pretraining.of(config, torch.device("cpu")).fresh_model()
    assert plan.parameters == sum(weight.numel() for weight in model.parameters())
    assert (plan.tokens_per_step, plan.tokens) == (128, 768)
    flops = training_flops_per_token(model.config, 16, causal=False)
    assert plan.flops == 768 * flops
    assert plan.memory["peak"] == sum(plan.memory.values()) - plan.memory["peak"]
    assert plan.seconds is not None
    assert dry_run(config, ranks=2).seconds == pytest.approx(plan.seconds / 2, rel=0.5)
    assert not (tmp_path / "runs").exists()
    assert json.loads(json.dumps(plan.as_dict()))["tokens"] == 768


def test_a_step_that_does_not_fit_is_explained_by_the_plan(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def greedy(*_: Any) -> torch.Tensor:
        return torch.empty(1 << 60)

    monkeypatch.setattr(Trainer, "forward_backward", greedy)
    with pytest.raises(CapacityError, match=r"by plan it takes .* \(activations") as caught:
        small_run(dataset, tmp_path)
    assert caught.value.exit_code == 4
    again = "the same command with --resume"
    assert caught.value.hint == f"{again} --batch-size 2 --gradient-accumulation-steps 4"
    other = "another run, --run-name pretrain-2, with --optimizer adafactor"
    for changes, lever in (
        ({"batch_size": 1}, f"{again} --activation-checkpointing"),
        ({"batch_size": 1, "activation_checkpointing": True}, f"{again} --loss-chunk 256"),
        ({"batch_size": 1, "activation_checkpointing": True, "loss_chunk": 256}, other),
    ):
        with pytest.raises(CapacityError) as caught:
            small_run(dataset, tmp_path / str(len(changes)), **changes)
        assert caught.value.hint == lever


@pytest.mark.slow
def test_a_model_that_does_not_fit_is_explained_by_the_plan(dataset: Path, nope: Nope) -> None:
    """By a limit of the system, before the first step."""
    limited = 'ulimit -v 6000000; exec "$0" "$@"'
    shape = ["--embedding-dimensions=8192", "--num-q-heads=8", "--num-kv-heads=8"]
    words = ["pretrain", "--dataset-path", dataset, "--device=cpu", "--tokens-per-sample=16"]
    done = nope(*words, *shape, shell=limited)
    assert done.returncode == 4, done.stderr
    assert "the memory is too small for this step: by plan it takes" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_plan_is_of_each_rank_and_refuses_what_a_run_would(dataset: Path) -> None:
    settings = {"dataset_path": str(dataset), "device": "cpu", "tokens_per_sample": 16}
    one, two, four = (
        dry_run(PretrainConfig(**settings, gradient_accumulation_steps=8), ranks=ranks).memory
        for ranks in (1, 2, 4)
    )
    assert one["optimizer"] == 2 * two["optimizer"] == 4 * four["optimizer"] > 0
    # Each has its shard, all of the weights while it computes, and buffers for some blocks.
    assert 1.5 * one["weights"] < two["weights"] < 1.8 * one["weights"]
    assert one["gradients"] == two["gradients"]
    with pytest.raises(UsageError, match="3 ranks cannot share evenly"):
        dry_run(PretrainConfig(**settings, gradient_accumulation_steps=8), ranks=3)
    tokens = PretrainConfig(**settings, batch_size=4, tokens_per_step=256)
    with pytest.raises(UsageError, match="--tokens-per-step is 256, or 4 batches") as caught:
        dry_run(tokens, ranks=3)
    assert caught.value.hint == "--tokens-per-step 192 or 384"


def test_tokens_for_each_step_set_the_accumulation_or_are_refused_with_the_arithmetic() -> None:
    shape = {"batch_size": 4, "tokens_per_sample": 256}
    assert PretrainConfig(tokens_per_step=8192, **shape).gradient_accumulation_steps == 8
    with pytest.raises(UsageError, match=r"--tokens-per-step is 5,000, .* 1,024 in each") as caught:
        PretrainConfig(tokens_per_step=5000, **shape)
    assert caught.value.hint == "--tokens-per-step 4096 or 5120"


@pytest.mark.parametrize(
    ("preset", "size"),
    [("tiny", 7e6), ("small", 28.7e6), ("125m", 125e6), ("400m", 408e6), ("1b", 1e9)],
)
def test_presets_have_the_size_of_their_name(preset: str, size: float) -> None:
    config = PretrainConfig(**PRESETS[PretrainConfig][preset])
    shape = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(ModelConfig)
        if hasattr(config, field.name)
    }
    assert count_parameters(ModelConfig(**shape)).total == pytest.approx(size, rel=0.03)


@pytest.mark.parametrize("changes", [{"ddp_sharding_level": 3}, {"hybrid_sharding": True}])
def test_sharding_without_ranks_is_refused_and_no_sharding_is_not(
    dataset: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    with pytest.raises(UsageError, match="needs more than one rank") as caught:
        small_run(dataset, tmp_path, **changes)
    assert caught.value.hint == "nope pretrain --gpus 2, or leave the flag out"
    small_run(dataset, tmp_path, max_steps=1, ddp_sharding_level=0)


# Compilation


def compiled(mode: str, flops: float) -> tuple[str, bool]:
    model = small_model().train()
    config = PretrainConfig(compile=mode)
    said = compile_network(model, config, precision=torch.float32, shape=(2, 8), flops=flops)
    return said, any(layer._compiled_call_impl for layer in model.decoder.layers)


def test_a_short_run_is_not_compiled_and_off_is_off() -> None:
    assert compiled("auto", WORTHWHILE_FLOPS / 2) == ("eager, the run being short", False)
    assert compiled("off", WORTHWHILE_FLOPS * 2) == ("eager", False)


def test_without_a_compiler_training_is_eager_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    said, is_compiled = compiled("auto", WORTHWHILE_FLOPS * 2)
    assert (said, is_compiled) == ("eager: there is no C++ compiler (apt install g++)", False)
    with pytest.raises(UsageError, match=r"--compile is on, and there is no C\+\+ compiler"):
        compiled("on", 0.0)
    assert compilation.obstacle(torch.device("mps")) == "torch.compile is not used on Apple GPUs"


def test_a_compiler_that_fails_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("out of luck\nand more")

    monkeypatch.setattr(compilation, "try_compiled", broken)
    said, is_compiled = compiled("auto", WORTHWHILE_FLOPS * 2)
    assert said == "eager: the compiler failed (RuntimeError: out of luck)"
    assert not is_compiled


# Hardware


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_the_peak_of_a_gpu_is_of_its_data_sheet_or_not_known(name: str, peak: float | None) -> None:
    assert dense_bfloat16_peak(name) == peak


def test_bfloat16_is_taken_where_the_hardware_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for names, dtype in (
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True, "avx512_bf16": False}, torch.bfloat16),
        ({"avx2": True, "avx512_bf16": False}, torch.float32),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda names=names: names)
        device.has_bfloat16.cache_clear()
        assert device.resolve_precision("auto", CPU) == dtype
    device.has_bfloat16.cache_clear()
    assert device.resolve_precision("float32", CPU) == torch.float32


# The log


def test_the_log_has_the_published_curves_the_settings_and_samples(
    dataset: Path, tmp_path: Path
) -> None:
    small_run(dataset, tmp_path, sample_interval=3)
    events = EventAccumulator(str(tmp_path / "pretrain")).Reload()
    names = {"Cross Entropy", "Gradient Norm", "Perplexity", "Learning Rate", "Tokens per Second"}
    names |= {"Hold-out Cross Entropy"}
    assert names | {"Model FLOPs Utilization", "Memory"} == set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("Cross Entropy")] == [1, 2, 3, 4, 5, 6]
    texts = {tag.removesuffix("/text_summary") for tag in events.Tags()["tensors"]}
    assert texts == {"Settings", "Sample"}
    samples = events.Tensors("Sample/text_summary")
    assert [sample.step for sample in samples] == [3, 6]
    rows = [json.loads(x) for x in (tmp_path / "pretrain/metrics.jsonl").read_text().splitlines()]
    row = next(row for row in rows if "loss" in row)
    assert 0 < row["utilization"] < 1
    assert row["memory"] > 0
    assert PretrainConfig(sample_interval=0).sample_interval == 0


def test_steps_done_again_are_shown_once(dataset: Path, tmp_path: Path) -> None:
    """TensorBoard is told to forget what a resumed run does anew."""
    small_run(dataset, tmp_path, max_steps=5, checkpoint_interval=2)
    shutil.rmtree(tmp_path / "pretrain" / "checkpoints" / "step-5")
    small_run(dataset, tmp_path, max_steps=6, checkpoint_interval=2, resume=True)
    events = EventAccumulator(str(tmp_path / "pretrain"))
    events.Reload()
    assert [event.step for event in events.Scalars("Cross Entropy")] == [1, 2, 3, 4, 5, 6]


def test_the_log_is_json_even_of_what_is_no_number(tmp_path: Path) -> None:
    log = RunLog(tmp_path, {})
    log.open(0)
    nan, inf = float("nan"), float("inf")
    log.stepped(StepReport(1, "Cross Entropy", nan, {}, inf, 1e-3, 5.0, 5, 1.0))
    log.ended()

    def refuse(name: str) -> None:
        raise AssertionError(name)

    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert (row["loss"], row["gradient_norm"]) == (None, None)


def test_a_data_set_without_a_hold_out_says_so(corpus: Path, tmp_path: Path) -> None:
    settings = PrepareConfig(
        dataset_path=str(tmp_path / "data"), token_encoding="bytes", holdout_fraction=0.0
    )
    path = prepare([str(corpus)], settings)[0].path
    told: list[str] = []

    class Hearing(Listener):
        def noticed(self, what: str) -> None:
            told.append(what)

    config = config_of(path, run_dir_path=str(tmp_path / "runs"))
    pretrain(config, [Hearing()])
    assert told == ["the data set has no hold-out, so there is nothing to evaluate on"] * 2


def test_samples_read_ahead_are_those_of_the_step_that_is_asked_for(dataset: Path) -> None:
    batches = TextBatches(
        Dataset.open(dataset), tokens_per_sample=8, batch_size=2, micro_batches_per_step=2, seed=0
    )
    ahead = Prefetcher(batches, Ranks(0, 0, 1), CPU)
    for step in (0, 1, 2, 7, 3, 3):
        read, expected = ahead.micro_batches(step), batches.micro_batches(step, 0, 1)
        assert [batch.tokens.tolist() for batch in read] == [
            batch.tokens.tolist() for batch in expected
        ]
    held_out = [batch.tokens.tolist() for batch in ahead.holdout(9)]
    assert held_out == [batch.tokens.tolist() for batch in batches.holdout(9, 0, 1)]


# Documents


def test_tokens_know_their_document_over_the_borders_of_shards(dataset: Path) -> None:
    stream = TokenStream(Dataset.open(dataset))
    numbers = stream.documents(0, len(stream))
    tokens = stream.read(0, len(stream))
    end = Dataset.open(dataset).tokenizer["vocabulary_size"] - 1
    after_end = np.concatenate([[False], tokens[:-1] == end])
    assert (np.diff(numbers, prepend=0) == after_end).all()
    start = int(np.flatnonzero(after_end)[0]) - 3
    assert stream.documents(start, 6).tolist() == [0, 0, 0, 1, 1, 1]


def test_kept_apart_documents_go_with_their_batch_and_change_the_loss(
    dataset: Path, tmp_path: Path
) -> None:
    batches = TextBatches(
        Dataset.open(dataset),
        tokens_per_sample=64,
        batch_size=4,
        micro_batches_per_step=2,
        seed=0,
        separate_documents=True,
    )
    batch = batches.micro_batches(0, 0, 1)[0]
    assert batch.documents is not None
    assert batch.documents.shape == batch.tokens.shape
    assert (batch.documents[:, 0] == 0).all()
    apart = small_run(dataset, tmp_path / "apart", document_masking=True, tokens_per_sample=64)
    joined = small_run(dataset, tmp_path / "joined", tokens_per_sample=64)
    assert apart.losses != joined.losses
    assert apart.losses == pytest.approx(joined.losses, rel=0.1)
