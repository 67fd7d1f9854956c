"""The shape of the network."""

from __future__ import annotations

import dataclasses

from nope_gpt.config.knobs import Knobs, knob
from nope_gpt.config.panels import MODEL
from nope_gpt.errors import UsageError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelShape(Knobs):
    """The shape of the network without its vocabulary.

    Raises:
        UsageError: The heads do not divide the embedding, or each other.
    """

    embedding_dimensions: int = knob(
        1024, "Dimensionality of the token embeddings.", panel=MODEL, minimum=1, maximum=1 << 17
    )
    num_q_heads: int = knob(
        16, "Query heads in every attention layer.", panel=MODEL, minimum=1, maximum=1 << 12
    )
    num_kv_heads: int = knob(
        4, "Key and value heads in every attention layer.", panel=MODEL, minimum=1, maximum=1 << 12
    )
    num_decoder_layers: int = knob(
        16,
        "Attention and MLP blocks in the body of the network.",
        panel=MODEL,
        flag="num-hidden-layers",
        minimum=1,
        maximum=1 << 12,
    )
    hidden_ratio: int = knob(
        4,
        "Ratio of hidden neurons to embedding dimensions in the MLP layers, usually 1, 2 or 4.",
        panel=MODEL,
        flag="feed-forward-ratio",
        minimum=1,
        maximum=64,
    )
    dropout: float = knob(
        0.0,
        "Proportion of signals set to zero during training.",
        panel=MODEL,
        minimum=0.0,
        below=1.0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.embedding_dimensions % self.num_q_heads:
            raise UsageError(
                f"--embedding-dimensions is {self.embedding_dimensions}, and must be a multiple "
                f"of --num-q-heads, which is {self.num_q_heads}"
            )
        if self.num_q_heads % self.num_kv_heads:
            raise UsageError(
                f"--num-q-heads is {self.num_q_heads}, and must be a multiple of "
                f"--num-kv-heads, which is {self.num_kv_heads}"
            )

    @property
    def head_dimensions(self) -> int:
        return self.embedding_dimensions // self.num_q_heads

    @property
    def kv_dimensions(self) -> int:
        return self.head_dimensions * self.num_kv_heads

    @property
    def hidden_dimensions(self) -> int:
        return self.embedding_dimensions * self.hidden_ratio


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(ModelShape):
    """The whole network: exactly the keys of a published config.json."""

    vocabulary_size: int = knob(
        50257, "Rows of the token embedding.", panel=MODEL, minimum=1, maximum=1 << 24
    )
