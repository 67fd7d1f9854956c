"""Parameters and floating-point operations of a network, exactly.

In formulas, P is the parameters, V the vocabulary, L the layers, d the embedding dimensions,
kv the key (or value) dimensions, r the hidden ratio and T the tokens in a sample.
"""

from __future__ import annotations

import dataclasses

from nope_gpt.config import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """Named amounts that add up to a total."""

    def as_dict(self) -> dict[str, int]:
        return dict(vars(self))

    @property
    def total(self) -> int:
        return sum(vars(self).values())


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParameterCount(Parts):
    """Parameters by part; the embedding is also the head, and counts once."""

    embedding: int
    attention: int
    mlp: int
    norms: int

    @property
    def matrices(self) -> int:
        """Those of the blocks' matrices."""
        return self.attention + self.mlp


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForwardFlops(Parts):
    """Operations of a forward pass by part; the scores are what grows with the length."""

    projections: int
    scores: int
    mlp: int
    head: int


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Count the parameters exactly: P = V d + L (2 d² + 2 d kv + 2 r d² + 2 d) + d."""
    d, layers = config.embedding_dimensions, config.num_decoder_layers
    return ParameterCount(
        embedding=config.vocabulary_size * d,
        attention=layers * 2 * d * (d + config.kv_dimensions),
        mlp=layers * 2 * d * config.hidden_dimensions,
        norms=(2 * layers + 1) * d,
    )


def forward_flops(config: ModelConfig, tokens: int) -> ForwardFlops:
    """Floating-point operations of the forward pass over one sequence, exactly.

    A multiplication and an addition are two, and the half of the scores that the causal mask
    hides is counted, as torch's flop counter does with the math backend of attention.
    """
    count = count_parameters(config)
    return ForwardFlops(
        projections=2 * tokens * count.attention,
        scores=4 * tokens * tokens * config.embedding_dimensions * config.num_decoder_layers,
        mlp=2 * tokens * count.mlp,
        head=2 * tokens * count.embedding,
    )


def training_flops_per_token(config: ModelConfig, tokens: int, causal: bool) -> int:
    """Floating-point operations to train on one token of a sample of `tokens` tokens.

    Causal counts the scores that the mask leaves, 6 P + 6 L d T. Otherwise all are counted,
    6 P + 12 L d T, the convention of PaLM (Chowdhery et al. 2022, appendix B). Neither counts
    what checkpointing recomputes.
    """
    scores = config.num_decoder_layers * config.embedding_dimensions * tokens
    return 6 * count_parameters(config).total + (6 if causal else 12) * scores


def compute_optimal_tokens(config: ModelConfig, tokens_per_parameter: float) -> int:
    """Tokens for the lowest loss that the compute can buy, by a ratio to the parameters."""
    return round(count_parameters(config).total * tokens_per_parameter)
