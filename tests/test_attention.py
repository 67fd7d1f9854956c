"""Attention by blocks is plain attention, and documents never see each other."""

from __future__ import annotations

import itertools
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import small_model
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from nope_gpt.network.attention import (
    Documents,
    blockwise_attention,
    blockwise_attention_backward,
    causal_attention,
    mask_of_pieces,
    offsets_of,
    packed_attention,
    shared_attention,
    unshared_attention,
)
from nope_gpt.network.caching import PIECE, in_pieces


def plain(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None = None) -> Tensor:
    """Softmax over an explicit mask, in float64, heads repeated."""
    q, k, v = q.double(), k.double(), v.double()
    repeats, length = q.size(1) // k.size(1), q.size(2)
    k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    scores = q @ k.transpose(-1, -2) / q.size(-1) ** 0.5
    num_before = k.size(2) - length
    allowed = torch.ones(length, k.size(2), dtype=torch.bool).tril(num_before)[None, None]
    if documents is not None:
        allowed = allowed & (documents[:, None, :, None] == documents[:, None, None, :])
    probabilities = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    return (probabilities @ v).transpose(1, 2).flatten(2)


def drawn(
    seed: int, batch: int, groups: int, repeats: int, length: int, size: int, dtype: torch.dtype
) -> list[Tensor]:
    """q, k and v as views of one projection, as the model makes them."""
    generator = torch.Generator().manual_seed(seed)
    heads = (groups * repeats, groups, groups)
    joint = torch.randn(batch, length, sum(heads) * size, generator=generator).to(dtype)
    parts = joint.split([count * size for count in heads], dim=-1)
    return [part.view(batch, length, -1, size).transpose(1, 2) for part in parts]


def error(ours: Tensor, truth: Tensor) -> float:
    return float((ours.double() - truth).norm() / truth.norm().clamp_min(1e-12))


def with_gradients(attend, tensors: list[Tensor], *more: object) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    out = attend(*leaves, *more)
    weight = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, weight)]


def compare_pieces(
    visible: int, dtype: torch.dtype, tolerance: float, device: torch.device | str = "cpu"
) -> None:
    """A token's attention in pieces, and by one kernel, beside that in float64; of the two rows,
    one sees a third of what the other sees.
    """
    size = in_pieces(visible)
    q, k, v = (x.contiguous() for x in drawn(visible, 2, 2, 3, size, 32, dtype))
    q = 4 * q[:, :, -1:]
    seen = torch.tensor([visible, max(visible // 3, 1)])
    unseen = torch.arange(size) >= seen[:, None]
    truth = torch.cat(
        [
            plain(q[row, None], k[row, None, :, :count], v[row, None, :, :count])
            for row, count in enumerate(seen.tolist())
        ]
    )
    mask = mask_of_pieces(unseen.view(2, -1, PIECE), 2, dtype)
    for attend in (shared_attention, unshared_attention):
        found = attend(*(x.to(device) for x in (q, k, v, mask)))
        for ours, theirs in zip(found.cpu(), truth, strict=True):
            assert error(ours, theirs) < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("visible", [1, 2, 63, 64, 65, 200, 640])
def test_attention_of_which_each_part_does_a_piece_is_that_of_one(
    dtype: torch.dtype, tolerance: float, visible: int
) -> None:
    compare_pieces(visible, dtype, tolerance)


shapes = st.tuples(
    st.integers(0, 99),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([1, 2, 63, 64, 65, 130]),
    st.sampled_from([4, 8, 10, 16]),
)


@settings(max_examples=40, deadline=None)
@given(shapes, st.booleans())
def test_blocks_compute_plain_attention_and_its_gradients(
    shape: tuple[int, ...], has_documents: bool
) -> None:
    tensors = drawn(*shape, torch.float32)
    documents = None
    if has_documents:
        generator = torch.Generator().manual_seed(shape[0])
        new = torch.rand(shape[1], shape[4], generator=generator) < 0.1
        documents = new.long().cumsum(1)
    ours = with_gradients(blockwise_attention, tensors, documents)
    truth = with_gradients(plain, [tensor.double() for tensor in tensors], documents)
    for one, other in zip(ours, truth, strict=True):
        assert error(one, other) < 1e-5 or (one.double() - other).abs().max() < 1e-5


def test_in_bfloat16_blocks_are_about_as_exact_as_torchs_own() -> None:
    tensors = drawn(0, 2, 2, 3, 130, 64, torch.bfloat16)

    def torchs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).flatten(2)

    truth = with_gradients(plain, [tensor.double() for tensor in tensors])
    ours = with_gradients(causal_attention, tensors)
    theirs = with_gradients(torchs, tensors)
    for one, other, right in zip(ours, theirs, truth, strict=True):
        assert error(one, right) < max(3 * error(other, right), 5e-3)
    assert not torch.equal(ours[0], theirs[0]), "bfloat16 on a CPU goes by blocks"


def test_gradients_of_keys_stay_exact_however_many_blocks_of_queries_see_them() -> None:
    tensors = drawn(0, 1, 1, 2, 1500, 32, torch.bfloat16)
    truth = with_gradients(plain, [tensor.double() for tensor in tensors])
    _, _, keys, values = map(error, with_gradients(causal_attention, tensors), truth)
    assert max(keys, values) < 5e-3


def test_nothing_of_a_document_reaches_another() -> None:
    """A leak would show as a change of a bit, or as a gradient."""
    q, k, v = drawn(0, 1, 2, 2, 150, 8, torch.float32)
    documents = torch.zeros(1, 150, dtype=torch.long)
    documents[:, 40:100], documents[:, 100:] = 1, 2
    before = blockwise_attention(q, k, v, documents)
    changed = [tensor.clone() for tensor in (q, k, v)]
    for tensor in changed:
        tensor[:, :, 40:100] += 1.0
    after = blockwise_attention(*changed, documents)
    assert torch.equal(before[:, :40], after[:, :40])
    assert torch.equal(before[:, 100:], after[:, 100:])
    assert not torch.equal(before[:, 40:100], after[:, 40:100])
    leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    blockwise_attention(*leaves, documents)[:, 100:].sum().backward()
    for leaf in leaves:
        assert leaf.grad is not None
        assert not leaf.grad[:, :, :100].any()
        assert leaf.grad[:, :, 100:].any()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 99), st.integers(1, 3), st.integers(1, 80))
def test_offsets_cut_a_micro_batch_into_its_documents(seed: int, batch: int, length: int) -> None:
    """What the kernel of a GPU is told: each part alone is what the mask leaves of it."""
    q, k, v = drawn(seed, batch, 2, 2, length, 8, torch.float32)
    new = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < 0.2
    numbers = new.long().cumsum(1)
    offsets = offsets_of(numbers).tolist()
    assert offsets[0] == 0 and offsets[-1] == batch * length
    q, k, v = (x.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None] for x in (q, k, v))
    parts = [
        plain(q[:, :, one:other], k[:, :, one:other], v[:, :, one:other])
        for one, other in itertools.pairwise(offsets)
    ]
    together = plain(*drawn(seed, batch, 2, 2, length, 8, torch.float32), numbers)
    torch.testing.assert_close(torch.cat(parts, 1).view(together.shape), together)


def test_the_kernel_of_a_gpu_is_asked_for_what_it_takes() -> None:
    """Its shapes and arguments alone can be checked without one."""
    with FakeTensorMode():
        q = torch.empty(2, 6, 32, 64, device="cuda", dtype=torch.bfloat16)
        k = torch.empty(2, 2, 32, 64, device="cuda", dtype=torch.bfloat16)
        offsets = torch.empty(5, device="cuda", dtype=torch.int32)
        documents = Documents(torch.empty(2, 32, device="cuda", dtype=torch.int32), offsets)
        packed = packed_attention(q, k, k, offsets)
        chosen = causal_attention(q, k, k, documents)
    assert packed.shape == chosen.shape == (2, 32, 6 * 64)
    assert packed.dtype == torch.bfloat16


def kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts_of_queries: Tensor,
    starts_of_keys: Tensor,
    *longest: int,
    window_size: tuple[int, int],
) -> Tensor:
    """What torch documents of its kernel for a GPU, which is not there on a CPU."""
    assert window_size == (-1, 0), "a token is to see all before it, and none after it"
    assert torch.equal(starts_of_queries, starts_of_keys)
    bounds = starts_of_queries.tolist()
    assert longest == (max(longest),) * 2
    assert max(longest) >= max(end - start for start, end in itertools.pairwise(bounds))
    out = [
        plain(*(x[start:end].transpose(0, 1)[None] for x in (q, k, v)))[0]
        for start, end in itertools.pairwise(bounds)
    ]
    return torch.cat(out).view(q.shape).to(q.dtype)


def test_the_kernel_of_a_gpu_is_given_each_head_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    q, k, v = drawn(0, 2, 2, 3, 9, 8, torch.float32)
    numbers = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 1, 1, 1]])
    found = packed_attention(q, k, v, offsets_of(numbers))
    torch.testing.assert_close(found.double(), plain(q, k, v, numbers), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dropout", [0.0, 1e-9])
def test_the_last_queries_see_all_keys_before_them(dropout: float) -> None:
    """By blocks, and by a mask."""
    q, k, v = drawn(0, 2, 2, 3, 20, 8, torch.float32)
    found = causal_attention(q[:, :, -6:], k, v, dropout=dropout)
    torch.testing.assert_close(found.double(), plain(q, k, v)[:, -6:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dropout", [0.0, 1e-9])
def test_a_packed_sample_gives_the_losses_of_its_documents_alone(dropout: float) -> None:
    """There are no positions, so where a document lies cannot matter, by either way of masking."""
    model = small_model().train()
    model.set_dropout(dropout)
    sizes = [5, 70, 1, 14]
    tokens = torch.randint(0, 61, (1, sum(sizes)), generator=torch.Generator().manual_seed(0))
    targets = tokens.roll(-1)
    documents = torch.repeat_interleave(torch.arange(4), torch.tensor(sizes))[None]
    packed = model(tokens, targets, documents)
    packed.backward()
    gradients = [weight.grad.clone() for weight in model.parameters()]
    model.zero_grad()
    alone = sum(
        model(one, target)
        for one, target in zip(tokens.split(sizes, 1), targets.split(sizes, 1), strict=True)
    )
    alone.backward()
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=0)
    for gradient, weight in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, weight.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 2])
def test_the_operators_keep_torchs_rules(batch: int) -> None:
    """With one sample too, whose views are laid out in another way."""
    for documents in (None, torch.zeros(batch, 70, dtype=torch.long)):
        q, k, v = (x.detach().requires_grad_() for x in drawn(0, batch, 2, 2, 70, 8, torch.float32))
        torch.library.opcheck(blockwise_attention, (q, k, v, documents))
        gradient = torch.randn(batch, 70, 32)
        inputs = (gradient, q.detach(), k.detach(), v.detach(), documents)
        torch.library.opcheck(blockwise_attention_backward, inputs)


has_compiler = any(map(shutil.which, ("g++", "clang++", "c++")))


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler, reason="there is no C++ compiler")
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_compiled_blocks_compute_what_eager_ones_do(precision: torch.dtype) -> None:
    """R33: the loss within 1e-3 in bfloat16 and 1e-5 in float32, and the gradients."""
    results = []
    for compiled in (False, True):
        model = small_model(embedding_dimensions=64).train()
        if compiled:
            model.decoder.compile_blocks()
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, 61, (4, 70), generator=generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            loss = model(tokens, tokens.roll(-1, 1)) / tokens.numel()
        loss.backward()
        results.append((loss.item(), [weight.grad for weight in model.parameters()]))
    (eager, one), (compiled_loss, other) = results
    assert abs(eager - compiled_loss) < (1e-3 if precision == torch.bfloat16 else 1e-5)
    for a, b in zip(one, other, strict=True):
        tolerance = 3e-2 if precision == torch.bfloat16 else 1e-4
        assert (a - b).norm() <= tolerance * a.norm()


@pytest.mark.skipif(not has_compiler, reason="there is no C++ compiler")
def test_a_compiled_block_keeps_nothing_that_grows_with_the_square_of_the_length() -> None:
    model = small_model(embedding_dimensions=64, num_q_heads=2, num_kv_heads=1).train()
    model.decoder.compile_blocks()
    kept = []
    for length in (256, 512, 1024):
        sizes: list[int] = []

        def keep(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        tokens = torch.zeros(1, length, dtype=torch.long)
        with hooks, torch.autocast("cpu", torch.bfloat16):
            model(tokens, tokens)
        kept.append(sum(sizes))
    assert kept[2] - kept[1] == 2 * (kept[1] - kept[0]) > 0
