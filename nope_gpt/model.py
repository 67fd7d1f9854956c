"""NoPE GPT: a decoder-only transformer without positional embeddings.

Each block adds grouped-query attention and a two-layer SiLU MLP to the residual
stream, each behind an RMSNorm. The order of the tokens is known from the causal mask
alone. The head is the transposed token embedding.

Shapes: B batch, T tokens, C embedding dimensions, V vocabulary, H query heads,
G key/value heads, D head dimensions, N visible tokens.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nope_gpt import generation, hub
from nope_gpt.attention import Documents, causal_attention
from nope_gpt.caching import KVCache, LayerCache
from nope_gpt.config import ModelConfig, SamplingConfig
from nope_gpt.cross_entropy import summed_cross_entropy
from nope_gpt.errors import UsageError
from nope_gpt.hub import SavedModel
from nope_gpt.locating import locate

NORM_EPSILON = torch.finfo(torch.float32).eps
"""What torch.nn.RMSNorm takes by default in float32; explicit, so that bfloat16 agrees."""


class NoPEGPT(nn.Module):
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
        self.trained_context_length: int | None = None
        self.token_embeddings = nn.Embedding(vocabulary_size, embedding_dimensions)
        self.decoder = Decoder(self.config)
        self.norm = nn.RMSNorm(embedding_dimensions, eps=NORM_EPSILON)
        self.initialize()

    @classmethod
    def from_config(cls, config: ModelConfig) -> Self:
        return cls(**config.as_dict())

    def initialize(self) -> None:
        """Draw the weights so that the first loss is near ln V at any width.

        Every matrix keeps the scale of its input, except that those which write to the
        residual stream share one unit of variance among the 2L of them (GPT-2, section
        2.3), and that the embedding, being the head too, is half as large: at 1/sqrt(C)
        the logits would have unit variance, which alone costs 0.5 nats.
        """
        residual = 1.0 / math.sqrt(2 * self.config.num_decoder_layers)
        embedding_std = 0.5 / math.sqrt(self.embedding_dimensions)
        nn.init.normal_(self.token_embeddings.weight, std=embedding_std)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                gain = residual if name.endswith(("out_proj", "down")) else 1.0
                nn.init.normal_(module.weight, std=gain / math.sqrt(module.in_features))

    def initialize_as_seed(self) -> None:
        """Draw the weights as torch does by default, which the published models began with."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.reset_parameters()

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, documents: Tensor | None = None
    ) -> Tensor:
        """Compute logits, or the loss against targets.

        Args:
            tokens: Token ids [B, T].
            targets: The token after each one [B, T], `IGNORED` where nothing is trained.
            documents: A number for each token [B, T]; no token sees one of another number.

        Returns:
            Logits [B, T, V]; with targets, the sum of the cross entropies in nats [], for
            which the logits are never held all at once.
        """
        apart = None if documents is None else Documents.of(documents)
        hidden = self.decoder(self.token_embeddings(tokens), documents=apart)
        if targets is None:
            return self.logits(hidden)
        return summed_cross_entropy(
            self.norm(hidden).flatten(0, 1), self.token_embeddings.weight, targets.flatten()
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """Score every token of the vocabulary: [..., C] to [..., V]."""
        return F.linear(self.norm(hidden), self.token_embeddings.weight)

    @torch.inference_mode()
    def predict(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Read new tokens after those in the cache.

        Args:
            tokens: [B, T], T at least 1.
            cache: What was read before; remembers the new tokens too.

        Returns:
            The logits of the token that follows, [B, V].
        """
        for piece in cache.pieces(tokens):
            hidden = self.decoder(self.token_embeddings(piece), cache)
        return self.logits(hidden[:, -1])

    def new_cache(self, capacity: int, batch_size: int = 1) -> KVCache:
        """An empty cache for this model, in its dtype and on its device."""
        weight = self.token_embeddings.weight
        return KVCache(
            self.config,
            batch_size=batch_size,
            capacity=capacity,
            dtype=weight.dtype,
            device=weight.device,
        )

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
            generator: Source of randomness; None for torch's global one.

        Yields:
            A token [] and the probability [] that it was drawn with, after all filters.

        Raises:
            UsageError: The prompt is empty or holds unknown tokens, or a number is out
                of its range.
        """
        sampling = SamplingConfig(
            max_tokens=max_tokens,
            context_length=context_length,
            temperature=float(temperature),
            top_k=top_k,
            top_p=float(top_p),
            repeat_penalty=float(repeat_penalty),
            repeat_window=repeat_window,
        )
        prompt = self.checked_prompt(prompt)[-context_length:]
        cache = self.new_cache(min(context_length, prompt.numel() + max_tokens))

        def predict(tokens: Tensor) -> Tensor:
            return self.predict(tokens.unsqueeze(0), cache)[0]

        return generation.generate(predict, prompt, sampling, generator)

    def checked_prompt(self, prompt: Tensor) -> Tensor:
        if prompt.dim() != 1 or prompt.numel() == 0:
            raise UsageError(
                f"the prompt has shape {tuple(prompt.shape)}, and must be at least one token [T]"
            )
        if int(prompt.min()) < 0 or int(prompt.max()) >= self.vocabulary_size:
            raise UsageError(
                f"the prompt holds token {int(prompt.max())}, and the vocabulary ends at "
                f"{self.vocabulary_size - 1}",
                hint="use the tokenizer of this model",
            )
        return prompt.to(self.device)

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

    @torch.no_grad()
    def resize_token_embeddings(self, new_vocabulary_size: int) -> None:
        """Change the number of tokens, keeping the rows of those that remain.

        New rows are drawn around the mean of the old ones with their spread, so that new
        tokens are neither likelier nor rarer than others before they are trained. The
        weight keeps its dtype, device and whether it is trained.
        """
        old = self.token_embeddings.weight
        self.config = self.config.changed(vocabulary_size=new_vocabulary_size)
        new = old.new_empty(new_vocabulary_size, self.embedding_dimensions)
        kept = min(new_vocabulary_size, old.size(0))
        new[:kept] = old[:kept]
        if new_vocabulary_size > kept:
            noise = torch.randn_like(new[kept:])
            new[kept:] = old.mean(dim=0) + old.std(dim=0) * noise
        embeddings = nn.Embedding(new_vocabulary_size, self.embedding_dimensions, device="meta")
        embeddings.weight = nn.Parameter(new, requires_grad=old.requires_grad)
        self.token_embeddings = embeddings

    @classmethod
    def from_pretrained(cls, model: str | Path, **options: Any) -> Self:
        """Load a model, ready to generate.

        Args:
            model: A run, checkpoint or export directory, or a Hub id.
            options: For the Hub: `revision`, `token`, `cache_dir`, `local_files_only`.

        Raises:
            NopeError: There is no such model, or its files are not a NoPE GPT.
        """
        return cls.from_saved(hub.load(locate(model, **options)))

    @classmethod
    def from_saved(cls, saved: SavedModel) -> Self:
        with torch.device("meta"):
            model = cls.from_config(saved.config)
        model.load_state_dict(saved.state, assign=True)
        model.trained_context_length = saved.trained_context_length
        return model.eval()

    def saved(self, state: dict[str, Tensor] | None = None) -> SavedModel:
        """This model as it goes to disk, with other weights if some are given."""
        return SavedModel(self.config, state or self.state_dict(), self.trained_context_length)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json and model.safetensors in the published layout."""
        path = Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        hub.save(path, self.saved())

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the model to the Hub; returns the address of the commit.

        Args:
            repo_id: OWNER/NAME.
            options: `token`, `private`, `commit_message`, `revision`.

        Raises:
            NetworkError: The Hub cannot be reached, or refuses.
        """
        with tempfile.TemporaryDirectory() as directory:
            self.save_pretrained(directory)
            return hub.upload(Path(directory), repo_id, **options)


class Decoder(nn.Module):
    """The body of the network: blocks on one residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        blocks = [DecoderBlock(config) for _ in range(config.num_decoder_layers)]
        self.layers: Iterable[DecoderBlock] = nn.ModuleList(blocks)  # type: ignore[assignment]
        self.recomputed: list[bool] = [False] * len(blocks)

    def enable_activation_checkpointing(self, fraction: float = 1.0) -> None:
        """Keep only the input of some blocks and recompute the rest in the backward pass.

        Args:
            fraction: Of the blocks, spread evenly.
        """
        count = len(self.recomputed)
        self.recomputed = [int((i + 1) * fraction) > int(i * fraction) for i in range(count)]

    def compile_blocks(self) -> None:
        """Fuse what each block does between its matrix products; all share one compilation."""
        for layer in self.layers:
            layer.compile()

    def uncompile_blocks(self) -> None:
        """Undo `compile_blocks`."""
        for layer in self.layers:
            layer._compiled_call_impl = None

    def forward(
        self, hidden: Tensor, cache: KVCache | None = None, documents: Documents | None = None
    ) -> Tensor:
        """[B, T, C] to [B, T, C]."""
        if cache:
            mask = cache.mask(hidden.size(1))
            for layer, memory in zip(self.layers, cache.layers, strict=True):
                hidden = layer(hidden, memory=memory, mask=mask)
            return hidden
        for layer, recompute in zip(self.layers, self.recomputed, strict=True):
            if recompute and self.training:
                hidden = checkpoint(layer, hidden, documents, use_reentrant=False)
            else:
                hidden = layer(hidden, documents)
        return hidden


class DecoderBlock(nn.Module):
    """Attention and an MLP, each normalized at its input and added to the stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.embedding_dimensions, eps=NORM_EPSILON)
        self.attention = SelfAttention(config)
        self.feed_forward_norm = nn.RMSNorm(config.embedding_dimensions, eps=NORM_EPSILON)
        self.feed_forward = FeedForward(config)

    def forward(
        self,
        x: Tensor,
        documents: Documents | None = None,
        *,
        memory: LayerCache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        x = x + self.attention(self.attention_norm(x), documents, memory, mask)
        return x + self.feed_forward(self.feed_forward_norm(x))  # type: ignore[no-any-return]


class SelfAttention(nn.Module):
    """Grouped-query causal attention without positions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size, kv_size = config.embedding_dimensions, config.kv_dimensions
        self.head_dimensions = config.head_dimensions
        self.grouped = config.num_q_heads != config.num_kv_heads
        self.dropout = config.dropout
        self.q_proj = nn.Linear(size, size, bias=False)
        self.k_proj = nn.Linear(size, kv_size, bias=False)
        self.v_proj = nn.Linear(size, kv_size, bias=False)
        self.out_proj = nn.Linear(size, size, bias=False)

    def forward(
        self,
        x: Tensor,
        documents: Documents | None,
        memory: LayerCache | None,
        mask: Tensor | None,
    ) -> Tensor:
        q, k, v = (self.heads(part) for part in self.projections(x))  # [B, H or G, T, D]
        if memory is None:
            out = causal_attention(q, k, v, documents, self.dropout if self.training else 0.0)
        else:
            k, v = memory.append(k, v)  # [B, G, N, D]
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=self.grouped)
            out = out.transpose(1, 2).flatten(2)
        return self.out_proj(out)  # type: ignore[no-any-return]

    def projections(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values by one product, unless the layers are more than a weight."""
        layers = (self.q_proj, self.k_proj, self.v_proj)
        if any(type(layer) is not nn.Linear for layer in layers):
            return tuple(layer(x) for layer in layers)
        weight = torch.cat([layer.weight for layer in layers])
        return torch.split(F.linear(x, weight), [layer.out_features for layer in layers], dim=-1)

    def heads(self, x: Tensor) -> Tensor:
        """Split [B, T, H*D] into heads, [B, H, T, D]."""
        return x.view(*x.shape[:2], -1, self.head_dimensions).transpose(1, 2)


class FeedForward(nn.Module):
    """Two layers with SiLU between them.

    Dropout silences whole tokens, not single neurons: so were the published models trained.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.embedding_dimensions, config.hidden_dimensions, bias=False)
        self.dropout = nn.Dropout1d(config.dropout)
        self.down = nn.Linear(config.hidden_dimensions, config.embedding_dimensions, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.dropout(F.silu(self.up(x))))  # type: ignore[no-any-return]
