"""Integers cost hardly any of what was learned."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import byte_dataset, small_model, small_run

from nope_gpt.data.batches import TextBatches
from nope_gpt.data.shards import Dataset
from nope_gpt.hub.locating import locate
from nope_gpt.model import NoPEGPT
from nope_gpt.network.quantization import quantized


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 8), st.integers(1, 40), st.integers(0, 99), st.floats(1e-6, 1e6))
def test_every_weight_is_within_half_a_step_of_its_row(
    rows: int, size: int, seed: int, spread: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = spread * torch.randn(rows, size, generator=generator)
    integers, scale = quantized(weight)
    error = (integers.double() * scale[:, None].double() - weight.double()).abs()
    assert (error <= scale[:, None].double() * 0.5001).all()
    assert integers.abs().max() == 127


def test_a_row_of_zeros_stays_one() -> None:
    integers, scale = quantized(torch.zeros(2, 3))
    assert not integers.any()
    assert torch.isfinite(scale).all()


def test_perplexity_in_integers_is_within_a_hundredth_of_that_in_bfloat16(
    corpus: Path, tmp_path: Path
) -> None:
    """On a model that has learned its text: both far below a guess."""
    dataset = byte_dataset(corpus, tmp_path / "data")
    small_run(
        dataset, tmp_path, max_steps=150, tokens_per_sample=64, eval_interval=150, optimizer="muon"
    )
    batches = TextBatches(
        Dataset.open(dataset), tokens_per_sample=64, batch_size=4, micro_batches_per_step=1, seed=0
    )
    perplexities = []
    for change in (lambda m: m.to(torch.bfloat16), lambda m: m.quantize(torch.bfloat16)):
        model = change(NoPEGPT.from_pretrained(locate(tmp_path / "pretrain")))
        total = count = 0.0
        for batch in batches.micro_batches(0, 0, 1) + list(batches.holdout(64, 0, 1)):
            logits = model(batch.tokens).float()
            kept = batch.targets >= 0
            total += torch.nn.functional.cross_entropy(
                logits[kept], batch.targets[kept], reduction="sum"
            ).item()
            count += int(kept.sum())
        perplexities.append(math.exp(total / count))
    assert perplexities[0] < 10
    assert perplexities[1] == pytest.approx(perplexities[0], rel=0.01)


def test_integers_are_half_the_bytes_and_are_not_trained() -> None:
    model = small_model()
    before = sum(p.nbytes for p in model.parameters() if p.dim() == 2)
    model.quantize()
    integers = sum(b.nbytes for b in model.buffers() if b.dim() == 2)
    assert integers * 4 == before
    assert model.num_trainable_params == 0
    assert len(list(model.generate(torch.tensor([1, 2]), max_tokens=3))) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_all_but_the_integers_is_computed_in_the_dtype_that_is_asked_for(
    dtype: torch.dtype,
) -> None:
    model = small_model().quantize(dtype)
    tokens = torch.arange(20)[None]
    seen = {0: model.token_embeddings(tokens)}
    logits = model.logits(model.decoder(seen[0], seen=seen))
    assert {x.dtype for x in (*seen.values(), logits, model.new_cache(8).memory)} == {dtype}
