"""Small base models, conversations, pairs of answers and tunings for the tests."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from small import Recorder, byte_dataset, small_run

from nope_gpt.config import PrepareConfig, TuneConfig
from nope_gpt.data.prepare import prepare
from nope_gpt.training.runs import Resume
from nope_gpt.training.tuning import Tuning, tune

Row = dict[str, Any]


def base_run(corpus: Path, root: Path) -> Path:
    """A run of a base model that hardly learned anything."""
    small_run(byte_dataset(corpus, root / "text"), root / "bases", max_steps=2)
    return root / "bases" / "pretrain"


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def questions(count: int) -> list[Row]:
    """Conversations, some of them with a second turn."""
    rows = []
    for number in range(count):
        turns = [
            message("user", f"What is {number}?"),
            message("assistant", f"It is the number {number}."),
            message("user", "Again?"),
            message("assistant", str(number)),
        ]
        rows.append({"messages": turns[: 2 + 2 * (number % 3 == 0)]})
    return rows


def preferences(count: int) -> list[Row]:
    """Pairs: to be short is better."""
    rows = []
    for number in range(count):
        question = [message("user", f"What is {number}?")]
        rows.append(
            {
                "chosen": [*question, message("assistant", f"{number}.")],
                "rejected": [*question, message("assistant", f"Well, it is the number {number}!")],
            }
        )
    return rows


def written(rows: Iterable[Row], path: Path) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def dataset_of(rows: Iterable[Row], base: Path, root: Path, name: str = "chats") -> Path:
    """A data set in the base's tokenizer, a tenth of it held out."""
    source = written(rows, root / f"{name}.jsonl")
    settings = PrepareConfig(
        dataset_path=str(root / "chats"), token_encoding=str(base), holdout_fraction=0.1
    )
    return prepare([str(source)], settings)[0].path


def tune_settings(base: Path, dataset: Path, root: Path, **changes: Any) -> TuneConfig:
    torch.set_num_threads(1)
    values = {
        "model": str(base),
        "dataset_path": str(dataset),
        "run_dir_path": str(root),
        "batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "num_epochs": 2,
        "device": "cpu",
        "precision": "float32",
        "seed": 0,
    }
    return TuneConfig(**values | changes)


def tuned(
    base: Path, dataset: Path, root: Path, *, resume: Resume = False, **changes: Any
) -> tuple[Path, Recorder]:
    """Tune the small base; returns the run and what its steps told."""
    recorder = Recorder()
    return tune(tune_settings(base, dataset, root, **changes), [recorder], resume=resume), recorder


def tuning(base: Path, dataset: Path, **changes: Any) -> Tuning:
    """What a tuning would train, and on what."""
    return Tuning.of(tune_settings(base, dataset, base.parent, **changes), torch.device("cpu"))
