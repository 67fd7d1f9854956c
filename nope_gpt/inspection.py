"""What lies in a directory of ours: a data set, a run, a checkpoint, an export or another model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from nope_gpt.config import PretrainConfig, TuneConfig
from nope_gpt.config.knobs import Knobs, differences, resolve
from nope_gpt.data.shards import TOLD, Dataset
from nope_gpt.data.staging import SUFFIX, Staging, is_held
from nope_gpt.errors import MissingError, NetworkError, NopeError, UsageError
from nope_gpt.export.record import Record
from nope_gpt.files import artefacts
from nope_gpt.files.artefacts import MANIFEST, PARITY
from nope_gpt.hub import storage
from nope_gpt.hub.history import METRICS, STATE, curves, logged, stages_of
from nope_gpt.hub.locating import (
    CONFIG,
    HOLDER,
    INDEX,
    LOCK,
    RUN,
    WEIGHTS,
    checkpoints_in,
    near,
    read_run,
    step_of,
)
from nope_gpt.network import sharpening
from nope_gpt.tokenization import BaseTokenizer, ChatTokenizer, tokenizer_of

Facts = dict[str, Any]
"""What is told of a directory, as JSON has it; `kind` says of what kind it is."""

COMMANDS: dict[str, type[Knobs]] = {
    config.command: config for config in (PretrainConfig, TuneConfig)
}
"""What makes runs."""


def kind_of(path: Path) -> str | None:
    """What a directory is, by what lies in it; None if it is nothing of ours."""
    if path.name.endswith(SUFFIX):
        return "unfinished dataset"
    has = {name: (path / name).is_file() for name in (RUN, STATE, PARITY, CONFIG, WEIGHTS, INDEX)}
    if artefacts.is_kind(path, "dataset"):
        return "dataset"
    if artefacts.is_kind(path, "checkpoint") or has[STATE]:
        return "checkpoint"
    if has[RUN]:
        return "run"
    if has[PARITY]:
        return "export"
    if has[CONFIG] and (has[WEIGHTS] or has[INDEX]):
        return "model"
    return None


def facts_of(path: Path, *, verify: bool = False) -> Facts:
    """Everything that is known of a directory.

    Args:
        path: Of an artefact, or of several.
        verify: Compare every file with its sha256, where one is recorded.

    Raises:
        MissingError: There is nothing, or nothing of ours.
        UsageError: It is a file.
        NopeError: It is damaged.
    """
    if path.is_file():
        raise UsageError(
            "this is a file, and what is inspected is a directory",
            where=str(path),
            hint=f"nope inspect {path.parent}",
        )
    if not path.is_dir():
        raise MissingError(
            "there is nothing here",
            where=str(path),
            hint=near(path) or "give the directory of a data set, run, checkpoint or export",
        )
    try:
        kind = kind_of(path)
        if kind:
            return {"path": str(path), "kind": kind, **KINDS[kind](path, verify)}
        return {"path": str(path), "kind": "collection", "items": items_in(path)}
    except OSError as error:
        raise NopeError(f"this cannot be read: {error.strerror}", where=str(path)) from None


def items_in(path: Path) -> list[Facts]:
    """The artefacts of a directory that holds several, each in few words.

    Raises:
        MissingError: There is none.
    """
    inside = artefacts_in(path)
    if not inside:
        raise MissingError(
            "this is nothing that nope has made",
            where=str(path),
            hint="give the directory of a data set, run, checkpoint or export",
        )
    return [
        {"name": str(each.relative_to(path)), "kind": kind_of(each), "bytes": size_of(each)}
        for each in inside
    ]


def artefacts_in(path: Path) -> list[Path]:
    """The artefacts in a directory, and in the directories in it that are none themselves."""
    found = []
    for child in sorted(each for each in path.iterdir() if each.is_dir()):
        if kind_of(child):
            found.append(child)
        else:
            found += [each for each in sorted(child.iterdir()) if each.is_dir() and kind_of(each)]
    return found


def dataset_facts(path: Path, verify: bool) -> Facts:
    """What the manifest of a data set says."""
    dataset = Dataset.open(path).with_keys(TOLD)
    if verify:
        artefacts.verify(path, dataset.manifest)
    return dataset.manifest


def unfinished_facts(path: Path, _: bool) -> Facts:
    """How far a preparation has come."""
    staging = Staging(path)
    plan = staging.plan() or {}
    return {
        "recipe": plan.get("recipe"),
        "units": len(list(staging.units.glob("*.json"))),
        "bytes": size_of(path),
        "prepared_now": any(map(is_held, path.glob("part-*.lock"))),
    }


def model_facts(path: Path, verify: bool) -> Facts:
    """What a model's directory holds, which is read whole and checked.

    Raises:
        NopeError: It is damaged.
    """
    if verify and (path / MANIFEST).is_file():
        artefacts.verify(path, artefacts.read_manifest(path, "checkpoint"))
    saved = storage.load(path, rotary=True)
    storage.refuse_infinite(saved.state, str(path))
    return {
        "parameters": sum(weight.numel() for weight in saved.state.values()),
        "dtypes": sorted({str(x.dtype).removeprefix("torch.") for x in saved.state.values()}),
        "config": saved.config.as_dict(),
        "trained_context_length": saved.trained_context_length,
        "first_token": saved.first_token,
        sharpening.SETTING: sharpening.as_setting(saved.sharpenings),
        "tokenizer": tokenizer_facts(path, saved.config.vocabulary_size),
        "stages": stages_of(path),
        "files": {each.name: each.stat().st_size for each in sorted(path.iterdir())},
    }


def tokenizer_facts(path: Path, vocabulary_size: int) -> Facts:
    """A model's tokenizer, and whether it takes turns; why it cannot be read, if it cannot."""
    try:
        tokenizer = tokenizer_of(BaseTokenizer.load(path), vocabulary_size)
    except NetworkError as error:
        return {"complaint": error.what}
    return {"name": tokenizer.name, "chat": isinstance(tokenizer, ChatTokenizer)}


def checkpoint_facts(path: Path, verify: bool) -> Facts:
    """A model, and the step that it was saved after."""
    manifest = artefacts.read_manifest(path, "checkpoint")
    return {"step": manifest.get("step"), **model_facts(path, verify)}


def export_facts(path: Path, verify: bool) -> Facts:
    """How an export was compared with its source, and the model, where nope reads that format.

    Raises:
        NopeError: A file is not what was compared.
    """
    record = Record.read(path)
    if verify:
        artefacts.verify(path, {"kind": "export", "files": record.files})
    model = model_facts(path, verify) if (path / CONFIG).is_file() else {"stages": stages_of(path)}
    return {
        **model,
        "format": record.format,
        "version": record.version,
        "reports": [report.as_dict() for report in record.reports],
        "files": {each.name: each.stat().st_size for each in sorted(path.iterdir())},
    }


def run_facts(path: Path, verify: bool) -> Facts:
    """How far a run has come, what it was told, and its checkpoints."""
    record, rows = read_run(path), [line.row for line in logged(path / METRICS)]
    step = max((row["step"] for row in rows), default=0)
    return {
        **{name: record.get(name) for name in ("command", "version", "data", "facts")},
        "changed_settings": changed(path / RUN, record["command"], record["config"]),
        "step": step,
        "trained_by": holder(path),
        "latest": {name: value for row in rows for name, value in row.items()},
        "losses": curves(rows, step),
        "checkpoints": [
            checkpoint_line(each, verify)
            for each in sorted(checkpoints_in(path / record["checkpoints"]), key=step_of)
        ],
    }


def changed(path: Path, command: str, settings: Facts) -> Facts:
    """The settings of a run that would be others if they were left out, by their flags.

    Raises:
        UsageError: One is not what it may be.
    """
    config = COMMANDS.get(command)
    if config is None:
        return settings
    names = {field.name for field in dataclasses.fields(config)}
    known = {name: value for name, value in settings.items() if name in names}
    return differences(resolve(config, [(str(path), known)]))


def holder(path: Path) -> str | None:
    """The process that trains a run now."""
    if (path / LOCK).is_file() and is_held(path / LOCK):
        with suppress(OSError):
            return (path / HOLDER).read_text(encoding="utf-8")
    return None


def checkpoint_line(path: Path, verify: bool) -> Facts:
    """A checkpoint of a run, and what is wrong with it, if anything."""
    complaint = None
    try:
        manifest = artefacts.read_manifest(path, "checkpoint")
        if verify:
            artefacts.verify(path, manifest)
    except NopeError as error:
        complaint = error.what
    return {"step": step_of(path), "bytes": size_of(path), "complaint": complaint}


def size_of(path: Path) -> int:
    """Bytes of all files in a directory."""
    return sum(each.stat().st_size for each in path.rglob("*") if each.is_file())


KINDS: dict[str, Callable[[Path, bool], Facts]] = {
    "dataset": dataset_facts,
    "unfinished dataset": unfinished_facts,
    "run": run_facts,
    "checkpoint": checkpoint_facts,
    "export": export_facts,
    "model": model_facts,
}
"""What is known of each kind."""
