"""How a model came to be: the stages of its training, the first one first.

A checkpoint has the settings of its run, and of the data and the base that went into it; an export
carries all of it in one file.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from nope_gpt.errors import NopeError
from nope_gpt.files.json_files import DAMAGE, parse_json, read_json
from nope_gpt.hub.locating import HISTORY, read_run

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
            return [checked(stage) for stage in read_json(directory / HISTORY)["stages"]]
        if not (directory / STATE).is_file():
            return []
        record, state = read_run(directory), read_json(directory / STATE)
        stage = {name: state[name] for name in ("step", "tokens", "seconds")}
        stage |= {name: record[name] for name in ("command", "version", "config")}
        log = logged(log_of(directory, record))
        losses = curves((line.row for line in log), stage["step"])
        before = [checked(stage) for stage in record.get("before", [])]
        return [*before, checked(stage | {"data": record.get("data"), "losses": losses})]
    except DAMAGE as error:
        reason = f"{type(error).__name__}: {error}"
        raise NopeError(f"the history cannot be read ({reason})", where=str(directory)) from None


def checked(stage: Any) -> Stage:
    """A stage that has what a model card tells.

    Raises:
        LookupError, TypeError, ValueError: It has not.
    """
    losses = {
        name: [[float(step), float(loss)] for step, loss in stage["losses"][name]]
        for name in ("loss", "eval_loss")
    }
    data = stage.get("data")
    if data is not None:
        data = {**data, "name": str(data["name"]), "sources": list(map(dict, data["sources"]))}
        if any(not isinstance(source["name"], str) for source in data["sources"]):
            raise TypeError("a source of data without a name")
    return {
        **stage,
        "command": str(stage["command"]),
        "step": int(stage["step"]),
        "tokens": int(stage["tokens"]),
        "data": data,
        "losses": losses,
    }


def log_of(checkpoint: Path, record: dict[str, Any]) -> Path:
    """Where the run of a checkpoint wrote what it told."""
    if Path(record["checkpoints"]).is_absolute():  # --checkpoint-path: not in the run.
        config = record["config"]
        run = Path(config["run_dir_path"]).expanduser() / str(config["run_name"])
    else:
        run = checkpoint.absolute().parent.parent
    return run / METRICS


class Line(NamedTuple):
    """A line of a run's log.

    Attributes:
        step: That it is of.
        row: What it says.
        text: As it stands there.
    """

    step: int
    row: dict[str, Any]
    text: str


def logged(path: Path) -> list[Line]:
    """The whole lines of a run's log; a last one that was cut short is left out.

    Raises:
        NopeError: A line is damaged; names it.
    """
    if not path.is_file():
        return []
    found: list[Line] = []
    try:
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                row = dict(parse_json(line))
                found.append(Line(int(row["step"]), row, line))
    except DAMAGE as error:
        raise NopeError(
            f"line {len(found) + 1} of this log is damaged ({type(error).__name__})",
            where=str(path),
            hint="move the file away; the checkpoints do not need it",
        ) from None
    return found


def curves(rows: Iterable[dict[str, Any]], last_step: int) -> dict[str, list[list[float]]]:
    """The losses of a run up to a step: pairs of a step and a loss, of training and of hold-out."""
    found: dict[str, list[list[float]]] = {"loss": [], "eval_loss": []}
    for row in rows:
        for name, points in found.items():
            if isinstance(row.get(name), float) and row["step"] <= last_step:
                points.append([row["step"], row[name]])
    return {name: thinned(points) for name, points in found.items()}


def thinned(points: list[list[float]]) -> list[list[float]]:
    """A curve of at most `POINTS` points: the last step and the mean loss of each group."""
    size = -(-len(points) // POINTS) or 1
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [[group[-1][0], sum(loss for _, loss in group) / len(group)] for group in groups]
