"""NoPE GPT: a decoder-only transformer without positional embeddings.

An embedding, the blocks of `network/blocks.py` on one residual stream, a norm, and a head that is
the transposed embedding. The order of the tokens is known from the causal mask alone.

Shapes: B batch, T tokens, C embedding dimensions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from nope_gpt.config import LOSS_CHUNK, RECALLED_FROM, ModelConfig, SamplingConfig
from nope_gpt.device import refuse_small_memory
from nope_gpt.errors import UsageError
from nope_gpt.generation.continuation import continuation, pairs
from nope_gpt.hub.storage import Pretrained
from nope_gpt.network import initialization
from nope_gpt.network.attention import Documents, kernels_without_plans
from nope_gpt.network.blocks import NORM_EPSILON, Decoder
from nope_gpt.network.caching import KVCache, Reader, Reading, in_pieces
from nope_gpt.network.cross_entropy import (
    ToGradient,
    cross_entropies,
    summed_cross_entropy,
    to_gradient,
)
from nope_gpt.network.embedding import TiedEmbedding
from nope_gpt.network.native import NativeReader
from nope_gpt.network.quantization import Int8Embedding, round_linears
from nope_gpt.network.recall import Recall, before_each
from nope_gpt.network.replaying import ReplayingReader
from nope_gpt.sizing.arithmetic import count_parameters
from nope_gpt.sizing.memory import inference_memory


class NoPEGPT(Pretrained):
    """The network.

    Args:
        vocabulary_size: Rows of the token embedding, V.
        embedding_dimensions: C.
        num_q_heads: Query heads in every attention layer, H.
        num_kv_heads: Key and value heads in every attention layer, G.
        num_decoder_layers: Blocks.
        hidden_ratio: Hidden neurons of the MLP for each embedding dimension.
        dropout: Proportion of signals set to zero in training.

    Raises:
        UsageError: The heads do not divide the embedding, or each other.
    """

    def __init__(
        self,
        vocabulary_size: int,
        embedding_dimensions: int,
        num_q_heads: int,
        num_kv_heads: int,
        num_decoder_layers: int,
        hidden_ratio: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.config = ModelConfig(
            vocabulary_size=vocabulary_size,
            embedding_dimensions=embedding_dimensions,
            num_q_heads=num_q_heads,
            num_kv_heads=num_kv_heads,
            num_decoder_layers=num_decoder_layers,
            hidden_ratio=hidden_ratio,
            dropout=dropout,
        )
        self.trained_context_length = None
        self.first_token = None
        self.sharpenings = {}
        self.loss_chunk = LOSS_CHUNK
        self.to_gradient: ToGradient = to_gradient
        self.token_embeddings: TiedEmbedding | Int8Embedding
        self.token_embeddings = TiedEmbedding(vocabulary_size, embedding_dimensions)
        self.decoder = Decoder(self.config)
        self.norm = nn.RMSNorm(embedding_dimensions, eps=NORM_EPSILON)
        self.recall: Recall | None = None
        initialization.scaled(self)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        documents: Tensor | None = None,
        *,
        each: bool = False,
        recalls: bool = False,
    ) -> Tensor:
        """Compute logits, or the loss against targets.

        Args:
            tokens: Token ids [B, T].
            targets: The token after each one [B, T], `IGNORED` where nothing is trained.
            documents: A number for each token [B, T]; no token sees one of another number, and
                those of a number follow each other.
            each: With targets, whether the cross entropy of each token is wanted.
            recalls: With targets, whether the loss of `recall` is wanted too.

        Returns:
            Logits [B, T, V]; with targets, the sum of the cross entropies in nats [], or each
            of them [B, T], for which the logits are never held all at once; with `recalls` both
            sums [2].
        """
        apart = None if documents is None else Documents.of(documents)
        hidden = self.token_embeddings(tokens)
        early = min(RECALLED_FROM, self.config.num_decoder_layers - 1)
        seen = {early: hidden} if recalls else {}
        hidden = self.decoder(hidden, documents=apart, seen=seen)
        if targets is None:
            return self.logits(hidden)
        parts, right = self.token_embeddings.parts, targets.flatten()
        chunk, gradient = self.loss_chunk, self.to_gradient
        # Nothing here holds on to the norm's output, which autocast may copy: `*how` would.
        if each:
            normed = self.norm(hidden).flatten(0, 1)
            return cross_entropies(normed, parts, right, chunk, gradient).view_as(targets)
        loss = summed_cross_entropy(self.norm(hidden).flatten(0, 1), parts, right, chunk, gradient)
        if not recalls:
            return loss
        assert self.recall
        before = before_each(tokens, documents)
        told = self.recall(seen[early]).flatten(0, 1)
        fixed = tuple(part.detach() for part in parts)
        again = summed_cross_entropy(told, fixed, before.flatten(), chunk, gradient)
        return torch.stack([loss, again])

    def logits(self, hidden: Tensor) -> Tensor:
        """Score every token of the vocabulary: [..., C] to [..., V]."""
        return self.token_embeddings.logits(self.norm(hidden))

    @torch.inference_mode()
    def predict(
        self,
        tokens: Tensor,
        cache: KVCache,
        rows: Sequence[int] | None = None,
        *,
        every: bool = False,
    ) -> Tensor:
        """Read new tokens after those in the cache.

        Args:
            tokens: [B, T], T at least 1, best on the CPU: what they are has to be known there.
            cache: What was read before; remembers the new tokens too.
            rows: Of the cache, B of them; None for all.
            every: Whether the logits after every token are wanted, or after the last one.

        Returns:
            The logits of the token that follows, [B, V], or with `every` [B, T, V].
        """
        rows = range(cache.num_rows) if rows is None else rows
        num_new = tokens.size(1)
        if cache.reader and cache.reader.can_read(cache, rows, num_new):
            logits = cache.reader.read(cache, rows, tokens, every=every)
            cache.remember(rows, tokens)
            return logits.view(*tokens.shape, -1) if every else logits
        if num_new > 1 and not cache.is_even(rows):
            pairs = zip(tokens, rows, strict=True)
            parts = [self.predict(own[None], cache, [row], every=every) for own, row in pairs]
            return torch.cat(parts)
        found = []
        for piece in cache.pieces(tokens, rows[0]):
            reading = Reading(cache, rows, piece.size(1))
            with kernels_without_plans(self.device):
                embedded = self.token_embeddings(piece.to(self.device))
                hidden = self.decoder(embedded, reading=reading)
            cache.remember(rows, piece)
            found.append(self.logits(hidden) if every else hidden[:, -1])
        return torch.cat(found, dim=1) if every else self.logits(found[-1])

    def new_cache(
        self, capacity: int, batch_size: int = 1, *, pinned: int = 0, compile: str = "off"
    ) -> KVCache:
        """An empty cache for this model, in its dtype and on its device.

        Args:
            capacity: Tokens that each row can look back on.
            batch_size: Rows.
            pinned: First tokens of a row that it never forgets, beside the one that all begins
                with where the model was trained so.
            compile: Whether few tokens are read by compiled code on a CPU, or by what was recorded
                on a GPU: auto if it is there, on when it is, off never.

        Raises:
            CapacityError: The memory is too small for a cache of this capacity.
            NopeError: compile is on, and there is no compiled code.
        """
        weight = self.norm.weight
        if self.first_token is not None:
            pinned = min(pinned + 1, capacity - 1)
        size = inference_memory(self.config, in_pieces(capacity), weight.element_size()).cache
        what = f"a cache of {batch_size} x {capacity:,} tokens"
        refuse_small_memory(self.device, size * batch_size, what)
        return KVCache(
            self.config,
            batch_size=batch_size,
            capacity=capacity,
            pinned=pinned,
            dtype=weight.dtype,
            device=weight.device,
            growth=self.decoder.growth,
            reader=self.reader(compile),
        )

    def reader(self, compile: str) -> Reader | None:
        """How few tokens are read other than by the modules, if that can be; see `new_cache`."""
        if compile == "off":
            return None
        if self.device.type == "cuda":
            return ReplayingReader(self)
        return NativeReader.of(self, wait=compile == "on")

    def generate(
        self,
        prompt: Tensor,
        max_tokens: int = 2000,
        context_length: int = 4096,
        temperature: float = 1.0,
        top_k: int = 500,
        top_p: float = 0.9,
        repeat_penalty: float = 0.1,
        repeat_window: int = 50,
        generator: torch.Generator | None = None,
        *,
        min_p: float = 0.0,
        pin_tokens: int = 0,
        draft_tokens: int = 0,
        compile: str = "auto",
        cache: KVCache | None = None,
    ) -> Generator[tuple[Tensor, Tensor], None, int]:
        """Continue a prompt token by token; the caller decides which token ends it.

        Args:
            prompt: Token ids [T]; only the last `context_length` of them are read.
            max_tokens: Tokens to generate.
            context_length: Tokens that the model looks back on, at most.
            temperature: Spread of the distribution; 0 takes the likeliest token.
            top_k: Draw from the k likeliest tokens, 0 for all.
            top_p: Draw from the likeliest tokens whose probabilities sum to p.
            repeat_penalty: Share of its logit that a token loses for each recent use.
            repeat_window: Generated tokens that count as recent.
            generator: Source of randomness; None for torch's global one of the CPU.
            min_p: Draw from tokens of at least this share of the likeliest one's probability.
            pin_tokens: First tokens that are never forgotten, however long the text becomes.
            draft_tokens: Tokens to guess ahead, where the text repeats itself.
            compile: Decode by compiled code on a CPU, by what was recorded on a GPU: auto once
                it is there, on, or off.
            cache: Of an earlier call, for what this prompt has in common with that text.

        Yields:
            A token [] and the probability [] that it was drawn with, after all filters; both on
            the CPU.

        Raises:
            UsageError: The prompt is empty or holds unknown tokens, or a number is out
                of its range.
            CapacityError: The memory is too small for the context.
            NopeError: The weights are not numbers, or cannot be decoded as asked.
        """
        sampling = SamplingConfig(
            max_tokens=max_tokens,
            context_length=context_length,
            temperature=float(temperature),
            top_k=top_k,
            top_p=float(top_p),
            repeat_penalty=float(repeat_penalty),
            repeat_window=repeat_window,
            min_p=float(min_p),
            pin_tokens=pin_tokens,
            draft_tokens=draft_tokens,
            compile=compile,
        )
        if prompt.dim() != 1:
            raise UsageError(
                f"the prompt has shape {tuple(prompt.shape)}, and must be at least one token [T]"
            )
        choices = continuation(self, prompt.tolist(), sampling, generator, cache)
        return pairs(choices)

    def quantize(self, dtype: torch.dtype | None = None) -> Self:
        """Round the matrices to 8-bit integers, in place; it can no longer be trained.

        Args:
            dtype: Of the activations and the cache; None for that of the weights now.
        """
        self.requires_grad_(False)
        dtype = dtype or self.norm.weight.dtype
        round_linears(self.decoder)
        if isinstance(self.token_embeddings, TiedEmbedding):
            self.token_embeddings = Int8Embedding(self.token_embeddings, dtype)
        for module in self.modules():
            if isinstance(module, nn.RMSNorm):
                module.to(dtype)
        return self

    @property
    def device(self) -> torch.device:
        return self.token_embeddings.weight.device

    @property
    def vocabulary_size(self) -> int:
        return self.token_embeddings.num_embeddings

    @property
    def embedding_dimensions(self) -> int:
        return self.token_embeddings.embedding_dim

    @property
    def num_weights(self) -> int:
        """Numbers that the model is made of, whatever they are kept in."""
        return count_parameters(self.config).total

    @property
    def num_trainable_params(self) -> int:
        return sum(weight.numel() for weight in self.parameters() if weight.requires_grad)

    def set_dropout(self, dropout: float) -> None:
        """Change the proportion of signals that training sets to zero."""
        self.config = self.config.changed(dropout=dropout)
        for layer in self.decoder.layers:
            layer.attention.dropout = dropout
            layer.feed_forward.dropout.p = dropout

    def freeze_model_parameters(self) -> None:
        """Train nothing."""
        self.requires_grad_(False)

    def unfreeze_token_embeddings(self) -> None:
        """Train the token embedding, and so the head, that it is tied to."""
        self.token_embeddings.requires_grad_(True)

    def resize_token_embeddings(self, new_vocabulary_size: int) -> None:
        """Change the number of tokens; see `TiedEmbedding.resized`."""
        assert isinstance(self.token_embeddings, TiedEmbedding)
        self.config = self.config.changed(vocabulary_size=new_vocabulary_size)
        self.token_embeddings = self.token_embeddings.resized(new_vocabulary_size)
