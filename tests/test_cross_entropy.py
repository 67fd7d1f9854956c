"""The loss without its logits is the loss with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from nope_gpt.config import LOSS_CHUNK
from nope_gpt.network import cross_entropy
from nope_gpt.network.cross_entropy import IGNORED, cross_entropies, summed_cross_entropy


def drawn(seed: int, rows: int, width: int, vocabulary: int, ignored: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator) * 0.3
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    targets[torch.rand(rows, generator=generator) < ignored] = IGNORED
    return [hidden.requires_grad_(), weight.requires_grad_(), targets]


def ours(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int = LOSS_CHUNK) -> Tensor:
    """With the vocabulary whole."""
    return summed_cross_entropy(hidden, [weight], targets, chunk)


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = hidden.double() @ weight.double().T
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")


def compare(tensors: list[Tensor], tolerance: float, chunk: int = LOSS_CHUNK) -> None:
    loss = ours(*tensors, chunk)
    truth = plain(*tensors)
    torch.testing.assert_close(loss.double(), truth, rtol=tolerance, atol=tolerance)
    got = torch.autograd.grad(loss * 0.7, tensors[:2])
    right = torch.autograd.grad(truth * 0.7, tensors[:2])
    for one, other in zip(got, right, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=10 * tolerance)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 99),
    st.integers(1, 40),
    st.sampled_from([1, 3, 16]),
    st.sampled_from([2, 5, 61]),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.integers(1, 12),
    st.sampled_from([1, 100, 10_000]),
)
def test_chunks_of_any_size_give_the_loss_and_the_gradients_of_all_logits(
    seed: int, rows: int, width: int, vocabulary: int, ignored: float, chunk: int, cached: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy, "CACHED_BYTES", {"cpu": cached})
        compare(drawn(seed, rows, width, vocabulary, ignored), 1e-5, chunk)


def test_the_real_chunks_give_the_loss_and_the_gradients_of_all_logits() -> None:
    compare(drawn(0, LOSS_CHUNK + 1, 8, 3000, 0.1), 1e-5)


@pytest.mark.parametrize("trained", ["hidden", "weight", "neither"])
def test_only_what_is_trained_gets_a_gradient(trained: str) -> None:
    hidden, weight, targets = drawn(0, 9, 4, 7, 0.0)
    hidden.requires_grad_(trained == "hidden")
    weight.requires_grad_(trained == "weight")
    loss = ours(hidden, weight, targets)
    torch.testing.assert_close(loss, plain(hidden, weight, targets).float())
    assert loss.requires_grad == (trained != "neither")
    if loss.requires_grad:
        loss.backward()
    assert (hidden.grad is None) == (trained != "hidden")
    assert (weight.grad is None) == (trained != "weight")


def test_without_gradients_the_loss_is_the_same() -> None:
    tensors = drawn(0, 50, 8, 61, 0.2)
    with torch.no_grad():
        loss = ours(*tensors)
    assert not loss.requires_grad
    assert torch.equal(loss, ours(*tensors).detach())


def test_in_bfloat16_the_mean_loss_is_right_to_a_thousandth() -> None:
    """R33. Torch 2.13's own loss without logits is half a nat off here."""
    tensors = drawn(0, 3000, 64, 5000, 0.1)
    count = int((tensors[2] != IGNORED).sum())
    with torch.autocast("cpu", torch.bfloat16):
        loss = ours(*tensors)
    assert loss.dtype == torch.float32
    rounded = [tensor.detach().bfloat16().double().requires_grad_() for tensor in tensors[:2]]
    truth = plain(*rounded, tensors[2])
    assert abs(loss.item() - truth.item()) / count < 1e-3
    got = torch.autograd.grad(loss, tensors[:2])
    right = torch.autograd.grad(truth, rounded)
    for one, other in zip(got, right, strict=True):
        assert (one.double() - other).norm() < 0.01 * other.norm()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 99), st.integers(1, 40), st.sampled_from([1, 4, 60]), st.integers(1, 12))
def test_each_tokens_loss_counts_in_the_gradients_as_it_is_weighted(
    seed: int, rows: int, split: int, chunk: int
) -> None:
    """With the vocabulary in two parts, of which the first is not trained."""
    hidden, weight, targets = drawn(seed, rows, 8, 61, 0.3)
    frozen, trained = weight.detach()[:split], weight.detach()[split:].requires_grad_()
    scales = torch.randn(rows, generator=torch.Generator().manual_seed(seed))
    losses = cross_entropies(hidden, [frozen, trained], targets, chunk)
    got = torch.autograd.grad((losses * scales).sum(), [hidden, trained])
    logits = hidden.double() @ torch.cat([frozen, trained]).double().T
    truth = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")
    torch.testing.assert_close(losses.double(), truth, rtol=1e-5, atol=1e-5)
    right = torch.autograd.grad((truth * scales).sum(), [hidden, trained])
    for one, other in zip(got, right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    whole = summed_cross_entropy(hidden, [frozen, trained], targets)
    torch.testing.assert_close(whole, losses.sum(), rtol=1e-5, atol=1e-4)


def test_huge_logits_give_finite_losses_and_gradients() -> None:
    hidden, weight, targets = drawn(0, 20, 8, 30, 0.0)
    huge = (hidden.detach() * 1e4).requires_grad_()
    compare([huge, weight, targets], 1e-5)


class Largest(TorchDispatchMode):
    """Remembers the most numbers that a tensor ever had."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.numbers = max(self.numbers, result.numel())
        return result


def test_no_tensor_ever_holds_the_logits_of_more_than_a_chunk() -> None:
    tensors = drawn(0, 640, 4, 500, 0.0)
    with Largest() as largest:
        ours(*tensors, chunk=64).backward()
    assert largest.numbers == 64 * 500


def test_the_softmax_of_half_precision_logits_is_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(n, 16, generator=generator).bfloat16() for n in (30, 50))
    targets = torch.randint(50, (30,), generator=generator)
    expected = F.cross_entropy((hidden @ head.T).float(), targets, reduction="none")
    torch.testing.assert_close(cross_entropies(hidden, [head], targets), expected)
