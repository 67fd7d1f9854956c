"""Watching a training run: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from pathlib import Path

from rich.progress import Progress, TaskID

from nope_gpt.amounts import format_bytes, format_seconds
from nope_gpt.cli.terminal import Pace, progress_bar, say, talk
from nope_gpt.training.reporting import EvaluationReport, Listener, Plan, StepReport


class TrainingWatcher(Listener):
    """Shows a run's plan, loss, speed, time left, evaluations and checkpoints."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.console = talk()
        self.pace = Pace()
        self.bar: Progress | None = None
        self.task = TaskID(0)
        self.num_steps = 0

    def planned(self, plan: Plan) -> None:
        """Show the plan and start the bar."""
        for name, fact in plan.facts.items():
            say(f"  {name:<8} {fact}", style="dim")
        if plan.first_step:
            say(f"  going on from step {plan.first_step} of {plan.num_steps}")
        self.num_steps = plan.num_steps
        if self.console.is_terminal:
            self.bar = progress_bar(self.console)
            self.task = self.bar.add_task(
                self.title, total=plan.num_steps, completed=plan.first_step, figures=""
            )
            self.bar.start()

    def stepped(self, report: StepReport) -> None:
        """Show the figures of a step."""
        figures = figures_of(report)
        if self.bar:
            self.bar.update(self.task, completed=report.step, figures=figures)
        elif report.step == self.num_steps or self.pace.is_due():
            left = (self.num_steps - report.step) * report.seconds / report.step
            say(f"step {report.step}/{self.num_steps} · {figures} · {format_seconds(left)} left")

    def evaluated(self, report: EvaluationReport) -> None:
        """Show the loss of the hold-out."""
        self.line(
            f"step {report.step}: hold-out loss {report.loss:.3f}, "
            f"{', '.join(figures_in_words(report.told))} ({report.tokens:,} tokens)"
        )

    def saved(self, checkpoint: Path) -> None:
        """Show where a checkpoint went."""
        self.line(f"saved {checkpoint}", style="dim")

    def noticed(self, what: str) -> None:
        """Show what went other than planned."""
        self.line(what, style="yellow")

    def sampled(self, step: int, text: str) -> None:
        """Show what the model made of texts: answers always, a text on a terminal."""
        if self.bar or self.title == "tune":
            self.line(f"step {step}: {text}", style="italic")

    def rewound(self, step: int) -> None:
        """Show where the run goes on."""
        self.line(f"going on from step {step}, without the samples since", style="yellow")
        if self.bar:
            self.bar.update(self.task, completed=step)

    def line(self, text: str, style: str | None = None) -> None:
        console = self.bar.console if self.bar else self.console
        console.print(text, style=style, markup=False)

    def ended(self) -> None:
        """Take the bar away."""
        if self.bar:
            self.bar.stop()


def figures_in_words(figures: dict[str, float]) -> list[str]:
    """Figures as people read them: large ones with one digit, small ones with three."""
    return [
        f"{name.lower()} {value:,.1f}" if name == "Perplexity" else f"{name.lower()} {value:.3f}"
        for name, value in figures.items()
    ]


def figures_of(report: StepReport) -> str:
    """The figures of a step in a line: loss, perplexity, speed, utilization and memory."""
    figures = [
        f"loss {report.loss:.3f}",
        *figures_in_words(report.told),
        f"{report.tokens_per_second:,.0f} tok/s",
        "MFU n/a" if report.utilization is None else f"MFU {report.utilization:.0%}",
    ]
    if report.memory is not None:
        figures.append(format_bytes(report.memory))
    return " · ".join(figures)
