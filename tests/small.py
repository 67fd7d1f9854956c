"""Small networks, data sets and runs for the tests."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from nope_gpt.config import PrepareConfig, PretrainConfig
from nope_gpt.data.prepare import prepare
from nope_gpt.model import NoPEGPT
from nope_gpt.training.pretraining import pretrain
from nope_gpt.training.reporting import Listener, StepReport
from nope_gpt.training.runs import Resume

SHAPE: dict[str, Any] = {
    "embedding_dimensions": 32,
    "num_q_heads": 4,
    "num_kv_heads": 2,
    "num_decoder_layers": 2,
    "hidden_ratio": 2,
}

RECIPE: dict[str, Any] = {
    **SHAPE,
    "tokens_per_sample": 16,
    "batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_steps": 6,
    "eval_interval": 3,
    "checkpoint_interval": 3,
    "learning_rate": 1e-2,
    "device": "cpu",
    "precision": "float32",
    "seed": 0,
    # Nothing beside the loss of the next token, which is what most tests compute by hand.
    "initialization": "scaled",
    "length_growth": 0.0,
    "recall": 0.0,
    "anchor": False,
}

HELPED: dict[str, Any] = {"initialization": "zero", "recall": 0.5, "anchor": True}
"""What `nope pretrain` does by default where samples are too short to grow."""


def small_model(seed: int = 0, **changes: Any) -> NoPEGPT:
    """A network of two layers with random weights, in eval mode."""
    torch.manual_seed(seed)
    return NoPEGPT(**{"vocabulary_size": 61, **SHAPE, **changes}).eval()


def byte_dataset(corpus: Path, root: Path) -> Path:
    """The corpus as bytes; returns the data set's directory."""
    settings = PrepareConfig(dataset_path=str(root), token_encoding="bytes", holdout_fraction=0.1)
    return prepare([str(corpus)], settings)[0].path


class Recorder(Listener):
    """Remembers every step."""

    def __init__(self) -> None:
        self.reports: list[StepReport] = []
        self.notices: list[str] = []
        self.samples: list[str] = []
        self.checkpoints: list[Path] = []

    def stepped(self, report: StepReport) -> None:
        self.reports.append(report)

    def noticed(self, what: str) -> None:
        self.notices.append(what)

    def saved(self, path: Path) -> None:
        self.checkpoints.append(path)

    def sampled(self, step: int, text: str) -> None:
        assert step >= 0
        self.samples.append(text)

    @property
    def losses(self) -> list[float]:
        return [report.loss for report in self.reports]


def small_run(dataset: Path, root: Path, *, resume: Resume = False, **changes: Any) -> Recorder:
    """Pretrain the small network; returns what its steps told."""
    torch.set_num_threads(1)
    recorder = Recorder()
    settings = RECIPE | {"dataset_path": str(dataset), "run_dir_path": str(root)} | changes
    pretrain(PretrainConfig(**settings), [recorder], resume=resume)
    return recorder


def assert_resumed_is_uninterrupted(dataset: Path, root: Path, step: int, **settings: Any) -> None:
    """A run of six steps, and the same without its checkpoints after a step, resumed: bitwise."""
    settings |= {"checkpoint_interval": 1, "keep_checkpoints": 9}
    small_run(dataset, root / "whole", **settings)
    shutil.copytree(root / "whole", root / "part")
    places = [root / name / "pretrain" / "checkpoints" for name in ("whole", "part")]
    for later in range(step + 1, 7):
        shutil.rmtree(places[1] / f"step-{later}")
    small_run(dataset, root / "part", resume=True, **settings)
    one, other = (load_file(place / "step-6" / "model.safetensors") for place in places)
    assert all(torch.equal(one[name], other[name]) for name in one)
