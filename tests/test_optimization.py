"""Optimizers and schedules do what their papers and torch's own do."""

from __future__ import annotations

import pytest
import torch
from small import small_model

from nope_gpt.config import MATRICES_TOGETHER, PretrainConfig
from nope_gpt.training.adafactor import Adafactor
from nope_gpt.training.muon import Muon
from nope_gpt.training.optimization import make_optimizers
from nope_gpt.training.schedules import rate_fraction


@pytest.mark.parametrize(
    ("size", "gradient_scale", "rate"),
    [(0.1, 1e-6, 0.01), (0.1, 1.0, 0.01), (0.1, 1e3, 0.01), (1e-4, 1.0, 0.01), (0.1, 1.0, 0.5)],
)
def test_adafactor_moves_as_torchs_own(size: float, gradient_scale: float, rate: float) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(16, 32), (40, 8), (24,), (1, 5)]
    ours = [torch.nn.Parameter(torch.randn(s, generator=generator) * size) for s in shapes]
    theirs = [torch.nn.Parameter(weight.detach().clone()) for weight in ours]
    one = Adafactor(ours, lr=rate, weight_decay=0.1)
    other = torch.optim.Adafactor(theirs, lr=rate, weight_decay=0.1)
    for _ in range(30):
        for weight, twin in zip(ours, theirs, strict=True):
            weight.grad = torch.randn(weight.shape, generator=generator) * gradient_scale
            twin.grad = weight.grad.clone()
        one.step()
        other.step()
    for weight, twin in zip(ours, theirs, strict=True):
        torch.testing.assert_close(weight, twin, rtol=1e-5, atol=1e-6)
        assert one.state[weight].keys() == other.state[twin].keys()


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_matrices_decay_and_the_embedding_and_the_norms_do_not(name: str) -> None:
    model = small_model()
    before = {key: weight.detach().clone() for key, weight in model.named_parameters()}
    config = PretrainConfig(optimizer=name, learning_rate=1e-2, weight_decay=0.5)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    for optimizer in make_optimizers(model, config, torch.float32):
        optimizer.step()
    for key, weight in model.named_parameters():
        is_kept = "token_embeddings" in key or "norm" in key
        expected = before[key] if is_kept else before[key] * (1 - 1e-2 * 0.5)
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-6, atol=0)


def test_beside_muon_adamw_takes_three_tenths_of_its_rate() -> None:
    model = small_model()
    config = PretrainConfig(optimizer="muon", learning_rate=1e-2, weight_decay=0.0)
    before = model.token_embeddings.weight.detach().clone()
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    for optimizer in make_optimizers(model, config, torch.float32):
        optimizer.step()
    moved = before - model.token_embeddings.weight.detach()
    torch.testing.assert_close(moved, torch.full_like(moved, 3e-3), rtol=1e-3, atol=0)


def test_wsd_holds_its_peak_until_the_decay_begins() -> None:
    config = PretrainConfig(schedule="wsd", warmup_fraction=0.1, decay_fraction=0.3)
    rates = [rate_fraction(step, 100, config) for step in range(100)]
    assert rates[9:71] == [1.0] * 62
    assert rates[71] == pytest.approx(29 / 30)
    assert rates[99] == pytest.approx(1 / 30)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd"])
def test_the_learning_rate_rises_then_follows_its_schedule(schedule: str) -> None:
    config = PretrainConfig(schedule=schedule, warmup_fraction=0.1)
    rates = [rate_fraction(step, 100, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    ends = {"constant": 1.0, "linear": 1.0 / 90, "cosine": 0.1, "wsd": 1.0 / 20}
    assert rates[-1] == pytest.approx(ends[schedule], rel=0.01)
    assert max(rates) == 1.0


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 24)])
def test_muon_moves_a_matrix_by_an_orthogonal_one(shape: tuple[int, int]) -> None:
    weight = torch.nn.Parameter(torch.zeros(shape))
    weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(weight.grad, full_matrices=False)
    Muon([weight], lr=1.0).step()
    scale = max(1.0, shape[0] / shape[1]) ** 0.5
    values = torch.linalg.svdvals(-weight.detach()) / scale
    assert 0.65 < values.min() <= values.max() < 1.25
    assert ((u.T @ -weight.detach() @ v.T).diagonal() > 0.6 * scale).all()


def test_matrices_that_muon_moves_together_move_as_each_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 24), (24, 8), (8, 24), (8, 8), (8, 24), (24, 8)]
    gradients = [
        10.0**i * torch.randn(shape, generator=generator) for i, shape in enumerate(shapes)
    ]
    moved = []
    for most in (1, 2):
        monkeypatch.setitem(MATRICES_TOGETHER, "cpu", most)
        weights = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient.clone()
        Muon(weights, lr=1.0).step()
        moved.append(weights)
    for alone, together in zip(*moved, strict=True):
        torch.testing.assert_close(together, alone)
        assert together.abs().max() > 0.1


def test_muon_in_float32_agrees_with_torchs_own() -> None:
    start = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    one = Muon([ours], lr=0.02, weight_decay=0.1)
    other = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.95)
    for step in range(5):
        gradient = torch.randn(16, 32, generator=torch.Generator().manual_seed(step))
        for weight, optimizer in ((ours, one), (theirs, other)):
            weight.grad = gradient.clone()
            optimizer.step()
    assert (ours - theirs).abs().max() < 0.02 * 5 * 0.05  # bfloat16 against float32
    assert (ours - start).abs().max() > 0.01
