"""Every setting of every command, once: name, type, default, range and help.

The names are the flags of the command line. Where the published weights use
another word (`num_decoder_layers`, `hidden_ratio`), the field has theirs, because
a field is also a key of config.json, and the knob names its flag.
"""

from nope_gpt.config.evaluation import EvaluateConfig
from nope_gpt.config.exporting import UNKNOWN_CONTEXT, ExportConfig
from nope_gpt.config.generating import ChatConfig, GenerateConfig, SamplingConfig, WritingConfig
from nope_gpt.config.model_choice import ModelChoice
from nope_gpt.config.panels import MODEL
from nope_gpt.config.preparing import ENCODINGS, PrepareConfig
from nope_gpt.config.presets import IMPLIED, PRESETS, SHAPE_400M, SHAPE_TINY
from nope_gpt.config.pretraining import RECALLED_FROM, SHORTEST_PIECE, PretrainConfig
from nope_gpt.config.quickstart import QuickstartConfig
from nope_gpt.config.shape import ModelConfig, ModelShape
from nope_gpt.config.sizing import SizeConfig, Workload
from nope_gpt.config.training import (
    CACHED_BYTES,
    LOSS_CHUNK,
    LOSS_ROWS,
    MATRICES_TOGETHER,
    TrainingConfig,
)
from nope_gpt.config.tuning import CONTROL_TOKENS, EXTENSION_INTERVAL, TuneConfig

__all__ = [
    "CACHED_BYTES",
    "CONTROL_TOKENS",
    "ENCODINGS",
    "EXTENSION_INTERVAL",
    "IMPLIED",
    "LOSS_CHUNK",
    "LOSS_ROWS",
    "MATRICES_TOGETHER",
    "MODEL",
    "PRESETS",
    "RECALLED_FROM",
    "SHAPE_400M",
    "SHAPE_TINY",
    "SHORTEST_PIECE",
    "UNKNOWN_CONTEXT",
    "ChatConfig",
    "EvaluateConfig",
    "ExportConfig",
    "GenerateConfig",
    "ModelChoice",
    "ModelConfig",
    "ModelShape",
    "PrepareConfig",
    "PretrainConfig",
    "QuickstartConfig",
    "SamplingConfig",
    "SizeConfig",
    "TrainingConfig",
    "TuneConfig",
    "Workload",
    "WritingConfig",
]
