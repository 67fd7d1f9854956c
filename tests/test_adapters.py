"""Adapters travel alone: in PEFT's layout, onto the weights they are for and no others."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small import byte_dataset, small_run
from small_chats import dataset_of, questions, tuned, tuning

from nope_gpt.adaptation import adapters
from nope_gpt.errors import MissingError, NopeError, UsageError
from nope_gpt.hub import storage
from nope_gpt.hub.locating import locate, newest_checkpoint

Nope = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def chats(base: Path, tmp_path: Path) -> Path:
    return dataset_of(questions(12), base, tmp_path)


def alone(run: Path, to: Path) -> Path:
    """An adapter copied out of a run's newest checkpoint."""
    to.mkdir()
    for name in (adapters.SETTINGS, adapters.TENSORS):
        shutil.copy(newest_checkpoint(run / "checkpoints") / name, to)
    return to


@pytest.mark.parametrize("embeddings", ["new", "all", "none"])
def test_an_adapter_on_its_base_is_the_tuned_model_bit_for_bit(
    base: Path, chats: Path, tmp_path: Path, embeddings: str
) -> None:
    changes = {"embeddings": embeddings, "alpha": 0.7, "num_epochs": 1}
    run, _ = tuned(base, chats, tmp_path / "runs", **changes)
    place = alone(run, tmp_path / "adapter")
    saved = tuning(base, chats).saved if embeddings == "none" else storage.load(locate(base))
    made = adapters.folded(saved, locate(base), [place])
    expected = storage.load(locate(run))
    assert made.config == expected.config
    for name, weight in expected.state.items():
        assert torch.equal(made.state[name], weight)


def test_adapters_stack_in_the_order_they_were_made(
    base: Path, chats: Path, tmp_path: Path, nope: Nope
) -> None:
    first, _ = tuned(base, chats, tmp_path / "runs", num_epochs=1)
    second, _ = tuned(first, chats, tmp_path / "runs", num_epochs=1, run_name="second")
    made = adapters.folded(
        storage.load(locate(base)), locate(base), [locate(first), alone(second, tmp_path / "two")]
    )
    for name, weight in storage.load(locate(second)).state.items():
        torch.testing.assert_close(made.state[name], weight, rtol=0, atol=1e-6)
    with pytest.raises(UsageError, match="this adapter was trained on other weights") as no:
        adapters.folded(storage.load(locate(base)), locate(base), [locate(second)])
    assert "the older ones first" in str(no.value.hint)
    say = ["generate", "What", "--max-tokens=8", "--temperature=0", "--dtype=float32"]
    whole = nope(*say, "--model", second)
    parts = nope(*say, "--model", base, "--adapter", first, "--adapter", tmp_path / "two")
    assert whole.returncode == parts.returncode == 0, parts.stderr
    assert whole.stdout == parts.stdout


def test_an_adapter_of_another_base_is_refused_by_name(
    base: Path, chats: Path, corpus: Path, tmp_path: Path, nope: Nope
) -> None:
    run, _ = tuned(base, chats, tmp_path / "runs", num_epochs=1)
    small_run(byte_dataset(corpus, tmp_path / "t"), tmp_path / "others", max_steps=1, seed=5)
    other = tmp_path / "others" / "pretrain"
    refused = nope("generate", "x", "--model", other, "--adapter", run)
    assert refused.returncode == 2
    assert f"this adapter was trained on other weights, {base}" in refused.stderr


def test_what_is_no_adapter_is_told_from_a_damaged_one(
    base: Path, chats: Path, tmp_path: Path
) -> None:
    with pytest.raises(MissingError, match="there is no adapter") as none:
        adapters.load(locate(base))
    assert "without --full" in str(none.value.hint)
    run, _ = tuned(base, chats, tmp_path / "runs", num_epochs=1)
    place = alone(run, tmp_path / "adapter")
    whole = (place / adapters.TENSORS).read_bytes()
    (place / adapters.TENSORS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(NopeError, match="this adapter cannot be read"):
        adapters.load(place)
    (place / adapters.TENSORS).write_bytes(whole)
    (place / adapters.SETTINGS).write_text('{"peft_type": "LORA"}')
    with pytest.raises(NopeError, match="this adapter cannot be read"):
        adapters.load(place)


def test_its_files_are_in_the_layout_of_peft(base: Path, chats: Path, tmp_path: Path) -> None:
    run, _ = tuned(base, chats, tmp_path / "runs", rank=4, alpha=0.5, dropout=0.1)
    place = newest_checkpoint(run / "checkpoints")
    settings = json.loads((place / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA"
    assert (settings["r"], settings["lora_alpha"], settings["lora_dropout"]) == (4, 2.0, 0.1)
    assert settings["target_modules"] == [
        *("down_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
    ]
    assert settings["trainable_token_indices"] == {"embed_tokens": [257, 258, 259, 260]}
    tensors = load_file(place / "adapter_model.safetensors")
    prefix = "base_model.model.model."
    assert tensors[f"{prefix}layers.1.self_attn.o_proj.lora_A.weight"].shape == (4, 32)
    assert tensors[f"{prefix}layers.0.mlp.up_proj.lora_B.weight"].shape == (64, 4)
    rows = f"{prefix}embed_tokens.token_adapter.trainable_tokens_delta"
    assert tensors[rows].shape == (4, 32)
    assert len(tensors) == 2 * 6 * 2 + 1
