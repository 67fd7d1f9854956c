"""The headings under which `--help` shows the knobs."""

from __future__ import annotations

MODEL = "Model"
DATA = "Data"
HUB = "The Hub"
CONVERSATIONS = "Conversations"
OPTIMIZATION = "Optimization"
EVALUATION = "Evaluation and checkpoints"
SAMPLING = "Sampling"
LORA = "LoRA"
RUN = "Run"
RANKS = "Several ranks"
PLANNING = "Planning"
