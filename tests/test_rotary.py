"""Positions that are there for a while: a scaffold that leaves no trace."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from reference import forward
from safetensors.torch import load_file
from small import (
    SHAPE,
    assert_resumed_is_uninterrupted,
    byte_dataset,
    small_model,
    small_run,
)

from nope_gpt.config import PretrainConfig
from nope_gpt.data.batches import TextBatches
from nope_gpt.data.shards import Dataset
from nope_gpt.errors import NopeError, UsageError
from nope_gpt.hub import storage
from nope_gpt.model import NoPEGPT
from nope_gpt.network.rotary import turned

HEADS = {name: SHAPE[name] for name in ("num_q_heads", "num_kv_heads")}


@pytest.fixture
def dataset(corpus: Path, tmp_path: Path) -> Path:
    return byte_dataset(corpus, tmp_path / "datasets")


def checkpoint(root: Path, step: int) -> Path:
    return root / "pretrain" / "checkpoints" / f"step-{step}"


def test_pairs_are_turned_as_complex_numbers_are() -> None:
    x = torch.randn(2, 3, 7, 10, generator=torch.Generator().manual_seed(0))
    pairs = torch.complex(x[..., :5].double(), x[..., 5:].double())
    place, pair = torch.arange(7.0)[:, None], torch.arange(5.0)
    angles = (place * 10_000.0 ** (-pair / 5)).double()
    expected = pairs * torch.polar(torch.ones_like(angles), angles)
    by_hand = torch.cat([expected.real, expected.imag], dim=-1).float()
    torch.testing.assert_close(turned(x), by_hand, atol=1e-5, rtol=1e-5)


def test_scores_of_what_is_turned_depend_on_the_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0))
    many = [turned(x.expand(1, 1, 20, 8))[0, 0] for x in (q, k)]
    scores = many[0] @ many[1].T
    for distance in range(20):
        along = scores.diagonal(-distance)
        torch.testing.assert_close(along, along[:1].expand_as(along), atol=1e-4, rtol=1e-4)
    assert scores.std() > 0.1, "or nothing was turned"


def test_with_positions_the_order_of_the_past_matters_and_without_it_does_not() -> None:
    """In one layer, where the causal mask has told nothing yet."""
    model = small_model(num_decoder_layers=1)
    tokens = torch.tensor([[1, 2, 3, 4, 5], [3, 1, 4, 2, 5]])
    with torch.no_grad():
        one, other = model(tokens)[:, -1]
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)
        model.decoder.set_rotary(True)
        one, other = model(tokens)[:, -1]
    assert (one - other).abs().max() > 1e-3


def test_what_is_left_has_the_published_keys_and_computes_as_one_without_positions(
    dataset: Path, tmp_path: Path
) -> None:
    small_run(dataset, tmp_path / "with", rotary_until=0.5)
    small_run(dataset, tmp_path / "without")
    with_it, without = (checkpoint(tmp_path / name, 6) for name in ("with", "without"))
    configs = [json.loads((path / "config.json").read_text()) for path in (with_it, without)]
    assert configs[0] == configs[1]
    tensors = load_file(with_it / "model.safetensors")
    assert tensors.keys() == load_file(without / "model.safetensors").keys()
    model = NoPEGPT.from_pretrained(with_it)
    tokens = torch.randint(0, 256, (24,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = model(tokens[None])[0]
    torch.testing.assert_close(found, forward(tensors, tokens, **HEADS), atol=1e-5, rtol=1e-5)


def test_losses_are_those_of_turned_queries_up_to_the_step_and_then_no_longer(
    dataset: Path, tmp_path: Path
) -> None:
    """The same weights and samples, computed by hand with and without positions."""
    told = small_run(
        dataset, tmp_path / "run", rotary_until=0.5, checkpoint_interval=1, keep_every=1
    )
    assert told.notices == ["step 4: positions are dropped from here on"]
    batches = TextBatches(
        Dataset.open(dataset), tokens_per_sample=16, batch_size=4, micro_batches_per_step=2, seed=0
    )
    for step in (1, 2, 3, 4, 5):
        model = NoPEGPT.from_saved(storage.load(checkpoint(tmp_path / "run", step), rotary=True))
        parts = batches.micro_batches(step, 0, 1)
        sums = {}
        with torch.no_grad():
            for rotary in (True, False):
                model.decoder.set_rotary(rotary)
                sums[rotary] = sum(float(model(part.tokens, part.targets)) for part in parts)
        assert told.losses[step] == pytest.approx(sums[step < 3] / 128, rel=1e-6)
        assert abs(sums[True] - sums[False]) > 1e-3


@pytest.mark.parametrize("step", [2, 3, 4])
def test_a_run_resumed_before_at_or_after_the_drop_is_bitwise_the_uninterrupted_one(
    dataset: Path, tmp_path: Path, step: int
) -> None:
    assert_resumed_is_uninterrupted(dataset, tmp_path, step, rotary_until=0.5)


def test_what_is_dropped_stays_dropped_when_a_run_is_made_longer(
    dataset: Path, tmp_path: Path
) -> None:
    small_run(dataset, tmp_path, rotary_until=0.5)
    told = small_run(dataset, tmp_path, rotary_until=0.9, max_steps=12, resume=True)
    assert told.notices == []
    assert json.loads((checkpoint(tmp_path, 12) / "state.json").read_text())["rotary"] is False
    NoPEGPT.from_pretrained(checkpoint(tmp_path, 12))


@pytest.mark.slow
def test_a_model_that_still_has_its_positions_is_refused_and_told_what_to_do(
    dataset: Path, tmp_path: Path, nope
) -> None:
    small_run(dataset, tmp_path, rotary_until=0.5)
    place = checkpoint(tmp_path, 3)
    with pytest.raises(NopeError, match="still turns queries and keys by their position") as told:
        storage.load(place)
    assert told.value.hint == "go on with its run: nope pretrain --resume"
    for command in (["generate", "the"], ["export", "--output", "out"], ["eval", "--text", "-"]):
        done = nope(*command, "--model", str(place))
        assert done.returncode == 1
        assert "still turns queries and keys" in done.stderr
    assert not Path("out").exists()


def test_the_jump_of_the_loss_at_the_drop_is_no_spike(dataset: Path, tmp_path: Path) -> None:
    settings = {"max_steps": 40, "rotary_until": 0.5, "loss_spike": "rewind"}
    told = small_run(dataset, tmp_path, **settings)
    assert told.notices == ["step 21: positions are dropped from here on"]
    assert len(told.losses) == 40


def test_a_share_that_leaves_nothing_to_learn_without_is_refused() -> None:
    with pytest.raises(UsageError, match="--rotary-until is 1.0, and must be below 1"):
        PretrainConfig(rotary_until=1.0)
    with pytest.raises(UsageError, match="--rotary-until turns pairs of dimensions, and a head"):
        PretrainConfig(rotary_until=0.5, embedding_dimensions=12, num_q_heads=4, num_kv_heads=2)
