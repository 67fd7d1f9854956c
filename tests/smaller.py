"""`nope` at a small size: what is typed here takes seconds, where the pages mean hours."""

from __future__ import annotations

import re
import sys

TRAINING = (
    "--batch-size 2 --gradient-accumulation-steps 1 --max-steps 2 --num-eval-samples 4 --device cpu"
)
SHAPE = "--embedding-dimensions 32 --num-q-heads 4 --num-kv-heads 2 --num-hidden-layers 3"

FLAGS = [
    ("quickstart", "--pretrain-steps 2 --tune-steps 2"),
    ("prepare fineweb", "--holdout-fraction 0.5"),
    ("pretrain (?!.*--resume)", f"{TRAINING} {SHAPE} --tokens-per-sample 256"),
    ("pretrain .*--resume", "--max-steps 3 --device cpu"),
    ("tune", TRAINING),
    ("pretrain .*--batch-size auto", "--no-auto-batch-size"),
    ("generate|chat", "--max-tokens 8"),
    (
        "eval (?!.*--calibrate)",
        "--lengths 1,2 --num-tokens 1024 --passkey-depths 1 --passkey-keys 1",
    ),
    ("eval .*--calibrate", "--num-tokens 8704"),
    ("size .*--(measure|verify)", f"{SHAPE} --tokens-per-sample 64 --device cpu"),
]
"""What is put behind a line that begins so; of a flag that is given twice the last one counts."""

WORDS = {
    "bpe:4096": "bpe:300",
    "runs/pretrain/checkpoints/step-500": "runs/pretrain/checkpoints/step-2",
}
"""What a small text has no variety for, and a run of few steps has not got."""


def smaller(words: list[str]) -> list[str]:
    """A command line with its sizes replaced."""
    line = " ".join(words)
    if "python-docs" not in words:
        words = [WORDS.get(word, word) for word in words]
    return words + [
        flag for pattern, flags in FLAGS if re.match(pattern, f"{line} ") for flag in flags.split()
    ]


if __name__ == "__main__":
    from nope_gpt.cli import main

    main(smaller(sys.argv[1:]))
