"""Settings that belong together, by the name that `--preset` gives them."""

from __future__ import annotations

from typing import Any

from nope_gpt.config.knobs import Knobs
from nope_gpt.config.pretraining import PretrainConfig
from nope_gpt.config.tuning import EXTENSION, TuneConfig

SHAPE_TINY: dict[str, Any] = {
    "embedding_dimensions": 128,
    "num_q_heads": 4,
    "num_kv_heads": 2,
    "num_decoder_layers": 4,
}

SHAPE_SMALL: dict[str, Any] = {
    "embedding_dimensions": 384,
    "num_q_heads": 6,
    "num_kv_heads": 2,
    "num_decoder_layers": 6,
}

SHAPE_125M: dict[str, Any] = {
    "embedding_dimensions": 768,
    "num_q_heads": 12,
    "num_kv_heads": 4,
    "num_decoder_layers": 14,
}

SHAPE_1B: dict[str, Any] = {
    "embedding_dimensions": 2048,
    "num_q_heads": 32,
    "num_kv_heads": 8,
    "num_decoder_layers": 20,
}

SHAPE_400M: dict[str, Any] = {
    "embedding_dimensions": 1280,
    "num_q_heads": 20,
    "num_kv_heads": 5,
    "num_decoder_layers": 20,
}

SEED_RECIPE: dict[str, Any] = {
    "optimizer": "adafactor",
    "learning_rate": 1e-2,
    "schedule": "constant",
    "warmup_fraction": 0.0,
    "weight_decay": 0.0,
}

SEED_BEGINNING: dict[str, Any] = {
    "initialization": "seed",
    "length_growth": 0.0,
    "recall": 0.0,
    "anchor": False,
}

PRESETS: dict[type[Knobs], dict[str, dict[str, Any]]] = {
    PretrainConfig: {
        "tiny": {
            **SHAPE_TINY,
            "tokens_per_sample": 256,
            "batch_size": 8,
            "gradient_accumulation_steps": 1,
            "max_steps": 800,
        },
        "small": {
            **SHAPE_SMALL,
            "tokens_per_sample": 512,
            "batch_size": 16,
            "gradient_accumulation_steps": 2,
            "max_steps": 5000,
        },
        "125m": {
            **SHAPE_125M,
            "tokens_per_sample": 2048,
            "batch_size": 8,
            "gradient_accumulation_steps": 32,
        },
        "400m": SHAPE_400M,
        "1b": {**SHAPE_1B, "activation_checkpointing": True},
        "seed": SEED_RECIPE | SEED_BEGINNING,
    },
    TuneConfig: {
        "tiny": {
            "max_tokens_per_sample": 256,
            "batch_size": 8,
            "gradient_accumulation_steps": 1,
            "learning_rate": 2e-3,
            "num_epochs": 1,
        },
        "seed": {**SEED_RECIPE, "embeddings": "all", "packing": False},
    },
}

IMPLIED: dict[type[Knobs], dict[str, dict[str, Any]]] = {TuneConfig: {"extend": EXTENSION}}
"""Settings that another setting implies, unless they are given too."""
