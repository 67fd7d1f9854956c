"""Tuning trains the answers alone, leaves its base alone, and merges exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small import byte_dataset, small_model, small_run

from nope_gpt import lora
from nope_gpt.config import PrepareConfig, TuneConfig
from nope_gpt.data.prepare import prepare
from nope_gpt.errors import UsageError
from nope_gpt.locating import newest_checkpoint
from nope_gpt.lora import LoRALinear
from nope_gpt.model import NoPEGPT
from nope_gpt.training.tuning import tune

TOKENS = torch.arange(30).unsqueeze(0)


def randomized(model: NoPEGPT, rank: int = 3, alpha: float = 0.7) -> NoPEGPT:
    """Adapters as after some training: B is no longer zero."""
    lora.attach(model, rank=rank, alpha=alpha)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LoRALinear):
                module.lora_b.normal_()
    return model


def test_fresh_adapters_change_nothing() -> None:
    model = small_model()
    before = model(TOKENS)
    lora.attach(model, rank=4, alpha=1.0)
    assert torch.equal(model(TOKENS), before)


def test_merged_weights_compute_what_the_adapters_compute() -> None:
    model = randomized(small_model())
    merged = NoPEGPT.from_saved(model.saved(lora.merged_state(model)))
    difference = (merged(TOKENS) - model(TOKENS)).abs().max()
    assert difference < 1e-5 * model(TOKENS).abs().max()
    assert (merged(TOKENS) - small_model()(TOKENS)).abs().max() > 0.1


def test_an_adapter_adds_alpha_times_b_times_a() -> None:
    model = small_model()
    weight = model.decoder.layers[0].attention.q_proj.weight.clone()
    randomized(model, rank=2, alpha=0.5)
    adapted = model.decoder.layers[0].attention.q_proj
    expected = weight + 0.5 * adapted.lora_b @ adapted.lora_a
    state = lora.merged_state(model)
    torch.testing.assert_close(state["decoder.layers.0.attention.q_proj.weight"], expected)


def test_the_six_matrices_of_every_layer_are_adapted_and_nothing_else_is_trained() -> None:
    model = small_model()
    lora.attach(model, rank=2, alpha=1.0)
    adapted = [name for name, module in model.named_modules() if isinstance(module, LoRALinear)]
    assert len(adapted) == 6 * 2
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained == {f"{name}.lora_{part}" for name in adapted for part in "ab"}


def test_adapters_are_attached_once() -> None:
    model = small_model()
    lora.attach(model, rank=2, alpha=1.0)
    with pytest.raises(UsageError, match="has adapters already"):
        lora.attach(model, rank=2, alpha=1.0)


def test_a_rank_above_the_matrix_is_refused() -> None:
    with pytest.raises(UsageError, match="--rank is 17, and the smallest matrix has rank 16"):
        lora.attach(small_model(), rank=17, alpha=1.0)


@pytest.fixture
def base(corpus: Path, tmp_path: Path) -> Path:
    """A run of a small base model."""
    small_run(byte_dataset(corpus, tmp_path / "text"), tmp_path / "runs", max_steps=2)
    return tmp_path / "runs" / "pretrain"


@pytest.fixture
def chats(base: Path, tmp_path: Path) -> Path:
    """A data set of small conversations in the base's tokenizer."""
    file = tmp_path / "chats.jsonl"
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {number}?"},
                {"role": "assistant", "content": f"It is the number {number}."},
            ]
        }
        for number in range(30)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = PrepareConfig(
        dataset_path=str(tmp_path / "chat"), token_encoding=str(base), holdout_fraction=0.1
    )
    return prepare([str(file)], settings)[0].path


def settings(base: Path, chats: Path, root: Path, **changes: Any) -> TuneConfig:
    torch.set_num_threads(1)
    values = {
        "model": str(base),
        "dataset_path": str(chats),
        "run_dir_path": str(root),
        "batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "num_epochs": 2,
        "device": "cpu",
        "seed": 0,
    }
    return TuneConfig(**values | changes)


def test_tuning_never_touches_its_base(base: Path, chats: Path, tmp_path: Path) -> None:
    before = {file: file.read_bytes() for file in base.rglob("*") if file.is_file()}
    run = tune(settings(base, chats, tmp_path / "runs"), [])
    assert run == tmp_path / "runs" / "tune"
    assert before == {file: file.read_bytes() for file in base.rglob("*") if file.is_file()}


def test_a_tuned_checkpoint_is_the_model_with_its_adapters_folded_in(
    base: Path, chats: Path, tmp_path: Path
) -> None:
    run = tune(settings(base, chats, tmp_path / "runs"), [])
    checkpoint = newest_checkpoint(run / "checkpoints")
    model = NoPEGPT.from_pretrained(base)
    model.resize_token_embeddings(261)
    lora.attach(model, rank=8, alpha=1.0)
    model.load_state_dict(load_file(checkpoint / "adapter.safetensors"), strict=False)
    merged = NoPEGPT.from_pretrained(run)
    assert merged.vocabulary_size == 261
    difference = (merged(TOKENS) - model(TOKENS)).abs().max()
    assert difference < 1e-5 * merged(TOKENS).abs().max()
    original = NoPEGPT.from_pretrained(base).state_dict()
    for name, tensor in merged.state_dict().items():
        if name.endswith("norm.weight"):
            assert torch.equal(tensor, original[name])
        elif "embeddings" not in name:
            assert not torch.equal(tensor, original[name])


def test_a_resumed_tuning_is_bitwise_the_uninterrupted_one(
    base: Path, chats: Path, tmp_path: Path
) -> None:
    tune(settings(base, chats, tmp_path / "whole"), [])
    tune(settings(base, chats, tmp_path / "parts"), [])
    last = newest_checkpoint(tmp_path / "parts" / "tune" / "checkpoints")
    for file in last.iterdir():
        file.unlink()
    tune(settings(base, chats, tmp_path / "parts"), [], resume=True)
    for name in ("model", "adapter", "optimizer"):
        one, other = (
            load_file(tmp_path / root / "tune" / "checkpoints" / last.name / f"{name}.safetensors")
            for root in ("whole", "parts")
        )
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_tuning_learns_the_answers(base: Path, chats: Path, tmp_path: Path) -> None:
    run = tune(settings(base, chats, tmp_path / "runs", num_epochs=12, eval_interval=6), [])
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    held_out = [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert len(held_out) == 2
    assert held_out[1] < held_out[0] < 5.6


def test_a_base_with_another_tokenizer_is_refused_by_name(
    chats: Path, corpus: Path, tmp_path: Path
) -> None:
    text = PrepareConfig(dataset_path=str(tmp_path / "bpe"), token_encoding="bpe:270")
    other = prepare([str(corpus)], text)[0].path
    small_run(other, tmp_path / "others", max_steps=1)
    with pytest.raises(UsageError, match="the model's tokenizer is bpe-270, and the data set's"):
        tune(settings(tmp_path / "others" / "pretrain", chats, tmp_path / "runs"), [])


def test_another_base_is_refused_on_resume(
    base: Path, chats: Path, corpus: Path, tmp_path: Path
) -> None:
    tune(settings(base, chats, tmp_path / "runs", num_epochs=1), [])
    small_run(byte_dataset(corpus, tmp_path / "t"), tmp_path / "others", max_steps=1, seed=5)
    with pytest.raises(UsageError, match="the base model changed"):
        tune(settings(tmp_path / "others" / "pretrain", chats, tmp_path / "runs"), [], resume=True)


def test_a_chat_model_can_be_tuned_again(base: Path, chats: Path, tmp_path: Path) -> None:
    first = tune(settings(base, chats, tmp_path / "runs", num_epochs=1), [])
    again = tune(settings(first, chats, tmp_path / "runs", num_epochs=1, run_name="again"), [])
    assert NoPEGPT.from_pretrained(again).vocabulary_size == 261
