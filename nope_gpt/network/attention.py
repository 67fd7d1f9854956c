"""Causal attention for training: grouped heads, no positions, optionally within documents.

Where torch has a kernel at full speed, that is taken. On a CPU torch multiplies bfloat16
no faster than float32 in its attention; there, and to keep documents apart where no kernel
does, the queries go in blocks, each a pair of batched matrix products at full speed. No
block looks at keys that are hidden from all of it, so documents one after the other cost what
they would cost alone, and the backward pass computes
the probabilities again, so that memory grows with T and not with its square.

Shapes: B batch, T tokens, H query heads, G key/value heads, R = H/G, D head dimensions,
Q queries in a block, K keys up to its end, N documents, S pieces of P keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

BLOCK = 64
"""Q. With fewer the products are too small to be fast, with more the mask hides more of them."""

HIDDEN = -3e4
"""A score that leaves nothing in any dtype, beside others that are not as low by themselves; of a
piece with infinite ones alone, the sum would be no number.
"""


class Documents(NamedTuple):
    """Which tokens of a micro-batch belong together.

    Attributes:
        numbers: One for each token [B, T], the same within a document.
        offsets: For the kernel of a GPU, where each document begins among all B * T tokens,
            and where the last one ends [N + 1]; elsewhere None.
    """

    numbers: Tensor
    offsets: Tensor | None

    @classmethod
    def of(cls, numbers: Tensor) -> Self:
        """Find the offsets once for all layers, where they are of use."""
        if not numbers.is_cuda:
            return cls(numbers, None)
        offsets = offsets_of(numbers)
        torch._dynamo.maybe_mark_dynamic(offsets, 0)  # One compilation for any N.
        return cls(numbers, offsets)


def offsets_of(numbers: Tensor) -> Tensor:
    """Where each document of [B, T] numbers begins in the flattened tokens, and the end."""
    begins = torch.ones_like(numbers, dtype=torch.bool)
    begins[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    starts = begins.flatten().nonzero()[:, 0]
    return torch.cat([starts, starts.new_tensor([numbers.numel()])]).to(torch.int32)


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None, dropout: float = 0.0
) -> Tensor:
    """Attend to the tokens so far, and with `documents` to those of the same document alone.

    Args:
        q: Queries [B, H, T, D].
        k: Keys [B, G, K, D]; with more than T of them, the queries are of the last ones.
        v: Values [B, G, K, D].
        documents: Which tokens belong together.
        dropout: Proportion of the probabilities that is silenced.

    Returns:
        The heads' outputs side by side [B, T, H * D].
    """
    numbers, offsets = documents or (None, None)
    if dropout == 0.0 and offsets is not None and q.dtype != torch.float32:
        return packed_attention(q, k, v, offsets)
    num_before = k.size(2) - q.size(2)
    torch_is_slow = q.device.type == "cpu" and (q.dtype == torch.bfloat16 or num_before)
    if dropout == 0.0 and (torch_is_slow or numbers is not None):
        return blockwise_attention(q, k, v, numbers)  # type: ignore[no-any-return]
    mask = None
    if num_before:
        mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device).tril(num_before)
    elif numbers is not None:
        mask = (numbers[:, None, :, None] == numbers[:, None, None, :]).tril()
    if q.is_cuda and q.dtype == torch.float32:  # Torch has no kernel for groups, and keeps scores.
        k, v = repeated(k, q), repeated(v, q)
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        enable_gqa=q.size(1) != k.size(1),
    )
    return out.transpose(1, 2).flatten(2)


def kernels_without_plans(device: torch.device) -> AbstractContextManager[object]:
    """Leave out cuDNN's kernels: it plans for milliseconds when the number of keys is a new one,
    as it is at every token that goes into a cache.
    """
    if device.type != "cuda":
        return nullcontext()
    others = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(others)


def shared_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """One token's attention, of which many parts of a GPU do a piece each, and what they find is
    joined by what each piece weighs (as in "Flash-Decoding", Dao et al., 2023); all at once where
    there is no kernel that would do a piece.

    Torch's kernels give a row and group to one part, which goes through all keys alone: a token
    with 8,192 keys took 10.4 ms by them on an H100, of 408M parameters, and 2.0 ms by this.

    Args:
        q: Queries [B, H, 1, D].
        k, v: Keys and values [B, G, K, D], K = S * P.
        mask: That of `mask_of_pieces`.

    Returns:
        The heads' outputs side by side [B, 1, H * D].
    """
    (rows, groups, _, size), repeats = k.shape, q.size(1) // k.size(1)
    pieces = mask.size(1) // groups
    if not can_share(q, mask):
        return unshared_attention(q, k, v, mask)
    q = q.view(rows, groups, 1, repeats, size).expand(-1, -1, pieces, -1, -1)
    q, k, v = (x.reshape(rows, groups * pieces, -1, size) for x in (q, k, v))
    mask = mask.expand(-1, -1, repeats, -1)
    if q.is_cuda:
        out, sums, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            q, k, v, mask, compute_log_sumexp=True
        )
    else:
        out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, attn_mask=mask
        )
    # A GPU's kernel makes room for 32 queries.
    weights = sums[..., :repeats].unflatten(1, (groups, pieces)).softmax(dim=2)
    out = (out.unflatten(1, (groups, pieces)) * weights[..., None]).sum(dim=2)
    return out.type_as(q).reshape(rows, 1, -1)  # type: ignore[no-any-return]


def can_share(q: Tensor, mask: Tensor) -> bool:
    """Whether there is a kernel for pieces: one that tells what each weighs. A GPU's multiplies
    rows of 16 bytes, and has a limit to the pieces.
    """
    if not q.is_cuda:
        return True
    is_known = q.dtype in (torch.float32, torch.float16)
    if q.dtype == torch.bfloat16:
        is_known = torch.cuda.get_device_capability(q.device) >= (8, 0)  # From Ampere on.
    return is_known and q.size(3) * q.element_size() % 16 == 0 and mask.size(1) < 1 << 16


def unshared_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """What `shared_attention` computes, by whatever kernel there is for all keys at once."""
    (rows, groups, _, size) = k.shape
    # Kernels that take a mask know no groups: a group's heads are so many queries of one.
    grouped = q.view(rows, groups, -1, size)
    out = F.scaled_dot_product_attention(grouped, k, v, mask.view(rows, groups, 1, -1))
    return out.reshape(rows, 1, -1)


def mask_of_pieces(unseen: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """What `shared_attention` adds to the scores of each group's keys, [B, S, P] that are not seen
    to [B, G * S, 1, P].
    """
    mask = torch.zeros(unseen.shape, dtype=dtype, device=unseen.device)
    return mask.masked_fill_(unseen, HIDDEN).repeat(1, groups, 1)[:, :, None]


def repeated(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values [B, G, K, D] for each of the query heads of their groups, [B, H, K, D]."""
    return x.repeat_interleave(q.size(1) // x.size(1), dim=1)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor) -> Tensor:
    """Documents one after the other through torch's kernel for a GPU, in half precision.

    Keys and values are repeated for each query head of their group, because the kernel's
    own grouping is asked for differently from version to version.
    """
    from torch.nn.attention.varlen import varlen_attn

    length = q.size(2)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, repeated(k, q), repeated(v, q)))
    out: Any = varlen_attn(q, k, v, offsets, offsets, length, length, window_size=(-1, 0))
    return out.view(-1, length, q.size(1) * q.size(2))  # type: ignore[no-any-return]


# An operator of its own, because torch.compile would look inside a function, find the
# products of the backward pass in the forward pass already, and keep them: T * T numbers.
@torch.library.custom_op("nope_gpt::blockwise_attention", mutates_args=())
def blockwise_attention(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
    """Attention by blocks of queries, with the documents' numbers [B, T]; otherwise as
    `causal_attention`.
    """
    scale, q = k.size(-1) ** -0.5, by_group(q, k.size(1))
    k, v = (k * scale).flatten(0, 1), v.flatten(0, 1)
    out = torch.empty_like(q.permute(0, 3, 1, 2, 4), memory_format=torch.contiguous_format)
    num_before = k.size(1) - q.size(3)
    for now, first in blocks(q.size(3), documents):
        seen = slice(first, num_before + now.stop)
        p = probabilities(rows(q, now), k[:, seen], now, first, documents)
        block = (p @ v[:, seen]).view(q[..., now, :].shape)
        out[:, now] = block.permute(0, 3, 1, 2, 4)
    return out.flatten(2)


@blockwise_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:  # noqa: ARG001
    return q.new_empty(q.size(0), q.size(2), q.size(1) * q.size(3))


@torch.library.custom_op("nope_gpt::blockwise_attention_backward", mutates_args=())
def blockwise_attention_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v from that of the result, [B, T, H * D]."""
    shape, groups, scale = k.shape, k.size(1), k.size(-1) ** -0.5
    gradient = gradient.view(*gradient.shape[:2], q.size(1), q.size(3)).transpose(1, 2)
    gradient, q = by_group(gradient, groups), by_group(q, groups)
    k, v = (k * scale).flatten(0, 1), v.flatten(0, 1)
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    # Views of one sample would hand their layout on, where the compiler was told of another.
    dk, dv = (k.new_zeros(k.shape, dtype=torch.float32) for _ in "kv")
    num_before = k.size(1) - q.size(3)
    for now, first in blocks(q.size(3), documents):
        queries, gradients = rows(q, now), rows(gradient, now)
        seen = slice(first, num_before + now.stop)
        p = probabilities(queries, k[:, seen], now, first, documents)
        dv[:, seen] += p.mT @ gradients
        dp = gradients @ v[:, seen].mT
        ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
        dq[..., now, :] = (ds @ k[:, seen]).view(q[..., now, :].shape)
        dk[:, seen] += ds.mT @ queries
    return dq.flatten(1, 2), (dk * scale).type_as(k).view(shape), dv.type_as(v).view(shape)


@blockwise_attention_backward.register_fake
def _(
    gradient: Tensor,  # noqa: ARG001
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Tensor | None,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(x.new_empty(x.shape) for x in (q, k, v))  # type: ignore[return-value]


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, documents = ctx.saved_tensors
    return *blockwise_attention_backward(gradient, q, k, v, documents), None


blockwise_attention.register_autograd(_backward, setup_context=_keep_for_backward)


def by_group(x: Tensor, groups: int) -> Tensor:
    """Put the heads that share a key together: [B, H, T, D] to [B, G, R, T, D]."""
    return x.view(len(x), groups, -1, *x.shape[2:])


def blocks(length: int, documents: Tensor | None) -> Iterator[tuple[slice, int]]:
    """The blocks of the queries as slices of T, each with the first key that any of it sees."""
    starts = range(0, length, BLOCK)
    first = [0] * len(starts)
    if documents is not None:
        places = torch.arange(length, device=documents.device).expand_as(documents)
        begins = documents[:, 1:] != documents[:, :-1]
        own = F.pad(begins, (1, 0)).mul(places).cummax(dim=1).values  # Where its document begins.
        first = own[:, ::BLOCK].amin(dim=0).tolist()
    for start, key in zip(starts, first, strict=True):
        yield slice(start, min(start + BLOCK, length)), key


def rows(x: Tensor, now: slice) -> Tensor:
    """A block of the heads of a group as one matrix: [B, G, R, T, D] to [B * G, R * Q, D]."""
    return x[..., now, :].flatten(2, 3).flatten(0, 1)


def probabilities(q: Tensor, k: Tensor, now: slice, first: int, documents: Tensor | None) -> Tensor:
    """What each query of a block attends to among the keys from the first one that any of it
    sees: [B * G, R * Q, D] and [B * G, K, D] to [B * G, R * Q, K].
    """
    size = now.stop - now.start
    scores = (q @ k.mT).view(len(q), -1, size, k.size(1))  # [B * G, R, Q, K]
    future = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
    scores[..., -size:].masked_fill_(future, -torch.inf)
    if documents is not None:
        foreign = documents[:, now, None] != documents[:, None, first : now.stop]  # [B, Q, K]
        groups = len(scores) // len(documents)
        foreign = foreign.repeat_interleave(groups, dim=0)[:, None]
        scores.masked_fill_(foreign, -torch.inf)
    return torch.softmax(scores, dim=-1).flatten(1, 2)
