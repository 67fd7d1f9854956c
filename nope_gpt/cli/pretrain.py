"""`nope pretrain`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nope_gpt.cli.options import JSON, configured, option
from nope_gpt.cli.terminal import result
from nope_gpt.config import PretrainConfig

RESUME = option(
    "resume",
    bool,
    "Go on with the run from its newest valid checkpoint, or begin it if there is none. "
    "Settings are the stored ones and the flags given now.",
    default=False,
)


def with_stored(
    settle: Callable[..., Any], layers: list[tuple[str, dict[str, Any]]], resume: bool
) -> Any:
    """Resolve a config; on a resume the run's stored settings come first."""
    config = settle(layers)
    if not resume:
        return config
    from nope_gpt.training.runs import run_path, stored_settings

    path = run_path(config)
    stored = stored_settings(path).get("config", {})
    return settle([(f"{path}/run.json", stored), *layers])


@configured(PretrainConfig, RESUME, JSON)
def command(
    settle: Callable[..., Any], layers: list[tuple[str, dict[str, Any]]], resume: bool, json: bool
) -> None:
    """Train a base model on a prepared data set of text.

    Runs alone, or as several ranks under torchrun. Ctrl-C or SIGTERM saves a checkpoint
    first.

    Examples:

    - `nope pretrain --preset tiny`

    - `nope pretrain --preset 400m --batch-size 4 --gradient-accumulation-steps 64`

    - `torchrun --standalone --nproc-per-node=8 -m nope_gpt.cli pretrain`
    """
    config = with_stored(settle, layers, resume)
    from nope_gpt.cli.watching import Watcher
    from nope_gpt.training.pretraining import pretrain

    path = pretrain(config, [Watcher("pretrain")], resume=resume)
    result(str(path), {"run": str(path)}, json)
