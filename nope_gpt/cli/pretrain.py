"""`nope pretrain`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nope_gpt.amounts import format_bytes, format_count, format_seconds
from nope_gpt.cli.launching import GPUS, launch
from nope_gpt.cli.options import JSON, RESUME, configured, option
from nope_gpt.cli.terminal import result, result_of_ranks
from nope_gpt.config import PretrainConfig, SizeConfig

if TYPE_CHECKING:
    from nope_gpt.training.planning import DryRun


DRY_RUN = option(
    "dry_run",
    bool,
    "Show the plan, the memory and the time, and train nothing.",
    default=False,
)


@configured(PretrainConfig, RESUME, GPUS, DRY_RUN, JSON)
def command(
    config: PretrainConfig, resume: bool | Path, gpus: int | None, dry_run: bool, json: bool
) -> None:
    """Train a base model on a prepared data set of text.

    Runs alone, on several GPUs with --gpus, or on several machines under torchrun. Ctrl-C
    or SIGTERM saves a checkpoint first.

    Examples:

    - `nope pretrain --preset tiny`

    - `nope pretrain --preset 400m --batch-size 4 --gradient-accumulation-steps 64`

    - `nope pretrain --preset 400m --gpus 8`

    - `torchrun --standalone --nproc-per-node=8 -m nope_gpt.cli pretrain`
    """
    from nope_gpt.cli.watching import TrainingWatcher
    from nope_gpt.training.pretraining import dry_run as plan_of
    from nope_gpt.training.pretraining import pretrain

    if dry_run:
        plan = plan_of(config, ranks=gpus or 1)
        result(table(plan), plan.as_dict(), json)
        return
    if gpus is not None:
        launch(config, gpus)
        return
    path = pretrain(config, [TrainingWatcher("pretrain")], resume=resume)
    result_of_ranks(str(path), {"run": str(path)}, json)


def table(plan: DryRun) -> str:
    """What a run will take, a line for each fact."""
    parts = sorted(plan.memory.items(), key=lambda item: -item[1])
    listing = ", ".join(
        f"{name.replace('_', ' ')} {format_bytes(size)}"
        for name, size in parts
        if size and name != "peak"
    )
    time = (
        "n/a: the peak of this hardware is not known"
        if plan.seconds is None
        else f"{format_seconds(plan.seconds)} at {SizeConfig.utilization:.0%} of the peak"
    )
    facts = {
        "model": f"{plan.parameters:,} parameters",
        **plan.told,
        "run": f"{format_count(plan.tokens)} tokens, {plan.tokens_per_step:,} in each step, "
        f"{plan.flops:.2e} FLOPs",
        "memory": f"{format_bytes(plan.memory['peak'])} ({listing})",
        "time": time,
    }
    return "\n".join(f"{name:<8} {fact}" for name, fact in facts.items())
