"""NoPE GPT: a decoder-only transformer without positional embeddings, and the tools around it."""

__version__ = "0.2.0"
