"""What a run tells while it goes: to listeners, `metrics.jsonl` and TensorBoard."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from nope_gpt.files.writing import write_file, writing
from nope_gpt.hub.history import METRICS, logged

CROSS_ENTROPY = "Cross Entropy"
"""The name of the usual loss, as the published dashboards have it."""

PERPLEXITY = "Perplexity"
"""The name of its exponential, which only the hold-out has."""


@dataclass(frozen=True)
class Plan:
    """What is about to happen.

    Attributes:
        first_step: Steps that were done before.
        num_steps: Steps in all.
        facts: What a reader would want to know, by name.
    """

    first_step: int
    num_steps: int
    facts: dict[str, str]


@dataclass(frozen=True)
class StepReport:
    """One update of the weights.

    Attributes:
        step: Counted from 1.
        objective: Name of the loss.
        loss: Its mean, in nats.
        figures: What else the objective tells, by name.
        gradient_norm: Global, before clipping.
        learning_rate: Of this step.
        tokens_per_second: Trained tokens of all ranks.
        tokens: Trained tokens since the run began.
        seconds: Of training since the run began.
        utilization: Of what the hardware can do at best, or None if that is not known.
        memory: Bytes that the first rank uses, or None if that is not known.
    """

    step: int
    objective: str
    loss: float
    figures: dict[str, float]
    gradient_norm: float
    learning_rate: float
    tokens_per_second: float
    tokens: int
    seconds: float
    utilization: float | None = None
    memory: int | None = None

    @property
    def told(self) -> dict[str, float]:
        return told_of(self.objective, self.loss, self.figures)


@dataclass(frozen=True)
class EvaluationReport:
    """One look at the hold-out.

    Attributes:
        step: After which.
        objective: Name of the loss.
        loss: Its mean, in nats.
        tokens: Trained ones that it is over.
        figures: What else the objective tells, by name.
    """

    step: int
    objective: str
    loss: float
    tokens: int
    figures: dict[str, float]

    @property
    def told(self) -> dict[str, float]:
        return told_of(self.objective, self.loss, self.figures)


def told_of(objective: str, loss: float, figures: dict[str, float]) -> dict[str, float]:
    """What to show beside a loss: its perplexity, if it is a cross entropy, and more."""
    if objective == CROSS_ENTROPY:
        return {PERPLEXITY: math.exp(min(loss, 700.0)), **figures}
    return figures


def key_of(name: str) -> str:
    """A figure's name in `metrics.jsonl`."""
    return name.lower().replace(" ", "_")


def hold_out_key(name: str) -> str:
    """The same of a figure of the hold-out; no step has a perplexity."""
    return key_of(name) if name == PERPLEXITY else f"eval_{key_of(name)}"


class Listener:
    """Hears what a run tells; each method may be left out."""

    def planned(self, plan: Plan) -> None:
        """The run is about to start."""

    def stepped(self, report: StepReport) -> None:
        """A step is done."""

    def evaluated(self, report: EvaluationReport) -> None:
        """The hold-out was evaluated."""

    def saved(self, checkpoint: Path) -> None:
        """A checkpoint was written."""

    def noticed(self, what: str) -> None:
        """Something went other than planned, and the run goes on."""

    def sampled(self, step: int, text: str) -> None:
        """The model continued a text."""

    def rewound(self, step: int) -> None:
        """The run went back to after a step."""

    def ended(self) -> None:
        """The run is over, for whatever reason."""


class RunLog(Listener):
    """Writes `metrics.jsonl` and TensorBoard events into a run's directory.

    Args:
        directory: Of the run.
        settings: The resolved config, shown beside the curves.
    """

    def __init__(self, directory: Path, settings: dict[str, Any]) -> None:
        self.directory = directory
        self.settings = settings

    def planned(self, plan: Plan) -> None:
        """Open both, to go on after the steps that were done before."""
        self.open(plan.first_step)
        listing = json.dumps(self.settings, indent=2)
        self.writer.add_text("Settings", f"```json\n{listing}\n```", plan.first_step)

    def open(self, step: int) -> None:
        """Drop what was logged after a step, because those steps are about to be done again."""
        from torch.utils.tensorboard import SummaryWriter

        self.path = self.directory / METRICS
        kept = [line.text for line in logged(self.path) if line.step <= step]
        write_file(self.path, "".join(kept).encode())
        self.file: IO[bytes] = self.path.open("ab")
        self.writer = SummaryWriter(str(self.directory), purge_step=step + 1)

    def rewound(self, step: int) -> None:
        """Drop the steps that the run went back behind."""
        self.ended()
        self.open(step)

    def sampled(self, step: int, text: str) -> None:
        """Show the text beside the curves."""
        self.writer.add_text("Sample", text, step)

    def stepped(self, report: StepReport) -> None:
        """Log a step."""
        self.write(
            {
                "step": report.step,
                "loss": report.loss,
                "gradient_norm": report.gradient_norm,
                "learning_rate": report.learning_rate,
                "tokens_per_second": round(report.tokens_per_second, 1),
                "tokens": report.tokens,
                "seconds": round(report.seconds, 3),
                "utilization": report.utilization,
                "memory": report.memory,
                **{key_of(name): value for name, value in report.figures.items()},
            }
        )
        scalars = {
            report.objective: report.loss,
            **report.figures,
            "Gradient Norm": report.gradient_norm,
            "Learning Rate": report.learning_rate,
            "Tokens per Second": report.tokens_per_second,
            "Model FLOPs Utilization": report.utilization,
            "Memory": report.memory,
        }
        for name, value in scalars.items():
            if value is not None:
                self.writer.add_scalar(name, value, report.step)

    def evaluated(self, report: EvaluationReport) -> None:
        """Log an evaluation."""
        told = report.told
        figures = {hold_out_key(name): value for name, value in told.items()}
        self.write({"step": report.step, "eval_loss": report.loss, **figures})
        self.writer.add_scalar(f"Hold-out {report.objective}", report.loss, report.step)
        for name, value in told.items():
            scalar = name if name == PERPLEXITY else f"Hold-out {name}"
            self.writer.add_scalar(scalar, value, report.step)

    def write(self, row: dict[str, float | None]) -> None:
        """Write a line; JSON has no word for what is no finite number but null."""
        finite = {
            name: value if value is not None and math.isfinite(value) else None
            for name, value in row.items()
        }
        with writing(self.path):
            self.file.write(json.dumps(finite, allow_nan=False).encode() + b"\n")
            self.file.flush()

    def ended(self) -> None:
        """Close both."""
        self.file.close()
        self.writer.close()
