"""How a model came to be: the stages of its training, the first one first.

A checkpoint has the settings of its run, and of the data and the base that went into it; an export
carries all of it in one file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nope_gpt.artifacts import DAMAGE
from nope_gpt.errors import NopeError
from nope_gpt.locating import HISTORY, RUN

METRICS = "metrics.jsonl"
STATE = "state.json"

POINTS = 200
"""Of a curve, at most; between them losses are averaged."""

Stage = dict[str, Any]
"""Of a training: `command`, `step`, `tokens`, `seconds`, `config`, `data` and `losses`."""


def stages_of(directory: Path) -> list[Stage]:
    """The stages that made the model in a directory, as far as they are known there.

    Raises:
        NopeError: What is there is damaged.
    """
    try:
        if (directory / HISTORY).is_file():
            stages = json.loads((directory / HISTORY).read_text(encoding="utf-8"))["stages"]
            return [dict(stage) for stage in stages]
        if not (directory / STATE).is_file():
            return []
        record = json.loads((directory / RUN).read_text(encoding="utf-8"))
        state = json.loads((directory / STATE).read_text(encoding="utf-8"))
        stage = {name: state[name] for name in ("step", "tokens", "seconds")}
        stage |= {name: record[name] for name in ("command", "version", "config")}
        losses = curves(directory.absolute().parent.parent / METRICS, stage["step"])
        return [*record.get("before", []), stage | {"data": record.get("data"), "losses": losses}]
    except DAMAGE as error:
        reason = f"{type(error).__name__}: {error}"
        raise NopeError(f"the history cannot be read ({reason})", where=str(directory)) from None


def curves(path: Path, last_step: int) -> dict[str, list[list[float]]]:
    """The losses of a run up to a step: pairs of a step and a loss, of training and of hold-out."""
    found: dict[str, list[list[float]]] = {"loss": [], "eval_loss": []}
    if not path.is_file():
        return found
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        for name, points in found.items():
            if record.get(name) is not None and record["step"] <= last_step:
                points.append([record["step"], record[name]])
    return {name: thinned(points) for name, points in found.items()}


def thinned(points: list[list[float]]) -> list[list[float]]:
    """A curve of at most `POINTS` points: the last step and the mean loss of each group."""
    size = -(-len(points) // POINTS) or 1
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [[group[-1][0], sum(loss for _, loss in group) / len(group)] for group in groups]
