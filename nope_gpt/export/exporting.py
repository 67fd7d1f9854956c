"""The verb `export`: a model to directories that other programs read, each compared with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nope_gpt import __version__
from nope_gpt.config import ExportConfig
from nope_gpt.errors import NetworkError, NopeError, first_line
from nope_gpt.evaluation.record import PICTURE
from nope_gpt.export import card, parity
from nope_gpt.export.formats import FORMATS
from nope_gpt.export.readers import Reader
from nope_gpt.export.record import Record, Report
from nope_gpt.export.source import Source, open_source
from nope_gpt.files.artefacts import PARITY, describe, publish, refuse_existing
from nope_gpt.files.json_files import DAMAGE
from nope_gpt.files.writing import refuse_small_disk, write_file, write_json
from nope_gpt.hub import remote
from nope_gpt.hub.locating import HISTORY
from nope_gpt.network.sharpening import as_setting

CARD = "README.md"

OWN_FILES = (
    "*.safetensors", "*.safetensors.index.json", "*.gguf", "*.jinja", "tokenizer*", "config.json",
    "generation_config.json", "Modelfile", HISTORY, PARITY, card.PICTURE, PICTURE,
)  # fmt: skip
"""What an export writes: on the Hub, those of an earlier one are replaced or removed."""

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        path: Its directory.
        record: What it is, and how it compares with its source.
        url: Of the commit on the Hub, if it was uploaded.
    """

    path: Path
    record: Record
    url: str | None = None


def export(config: ExportConfig, tell: Tell = lambda _: None) -> list[Export]:
    """Write a model in each format, compare each with its source, then upload them.

    Args:
        config: Every setting.
        tell: Told what is going on, a line at a time.

    Returns:
        What was written, in the order of the formats.

    Raises:
        NopeError: There is no such model, a place cannot be written, or what was written is not
            what the source is; that format is not kept.
        NetworkError: An upload failed; everything that was written is kept.
    """
    source = open_source(config)
    places = places_of(source, config)
    kept = {name: made_before(path, name, source, config) for name, path in places.items()}
    for name, path in places.items():
        if kept[name] is None:
            refuse_existing(path, overwrite=config.overwrite)
    refuse_impossible(source, config)
    made = []
    for name, path in places.items():
        if record := kept[name]:
            tell(f"{path} is there already, as asked for")
            write_card(path, called(path, name, config), source, record)
            made.append(Export(path, record))
        else:
            for about, note in source.notes(name).items():
                tell(f"{name}: {about.lower()}: {note}")
            made.append(export_one(name, path, source, config, tell))
    if config.push_to_hub is None:
        return made
    return [upload(item, config, tell) for item in made]


def refuse_impossible(source: Source, config: ExportConfig) -> None:
    """Refuse what cannot be written or uploaded, before anything is.

    Raises:
        NopeError: It cannot; says why.
    """
    if config.push_to_hub:
        for name in config.formats:
            remote.refuse_name(repository_of(name, config))
    for name in config.formats:
        FORMATS[name].refuse(source, config)


def places_of(source: Source, config: ExportConfig) -> dict[str, Path]:
    """The directory of each format: of one the output itself, of several each one in it."""
    place = Path(config.output).expanduser() if config.output else Path("exports") / source.name
    several = len(config.formats) > 1
    return {name: place / name if several else place for name in config.formats}


def repository_of(format: str, config: ExportConfig) -> str:
    """The repository on the Hub of a format."""
    return f"{config.push_to_hub}{f'-{format}' if len(config.formats) > 1 else ''}"


def called(path: Path, format: str, config: ExportConfig) -> str:
    """What the card calls an export: its repository, or its directory."""
    if config.push_to_hub:
        return repository_of(format, config)
    return path.name if path.is_absolute() else path.as_posix()


def export_one(name: str, path: Path, source: Source, config: ExportConfig, tell: Tell) -> Export:
    """Write one format, compare it with its source, and put it in its place."""
    format = FORMATS[name]
    refuse_small_disk(path.parent, format.num_bytes(source, config), "this export", "--output")
    with publish(path, overwrite=config.overwrite) as directory:
        tell(f"writing {path}")
        reports = []
        for open_reader in format.write(directory, source, config):
            report = read_again(source, open_reader, name)
            tell(f"  {report.line}")
            parity.refuse_difference(report, f"--format {name}")
            reports.append(report)
        if source.history:
            write_json(directory / HISTORY, {"stages": source.history})
        for picture, content in card.pictures(source).items():
            write_file(directory / picture, content)
        record = Record(name, __version__, asked(name, source, config), reports, {})
        write_card(directory, called(path, name, config), source, record)
        files = {file.name: describe(file) for file in sorted(directory.iterdir())}
        record = replace(record, files=files)
        record.write(directory)
    return Export(path, record)


def write_card(directory: Path, name: str, source: Source, record: Record) -> None:
    """Write what people read first of an export.

    Args:
        directory: With the files of the export.
        name: The card's for it.
        source: Of the export.
        record: Of the comparison.
    """
    text = card.model_card(name, record.format, source, record.reports, directory)
    write_file(directory / CARD, text.encode())


def read_again(source: Source, open_reader: Callable[[], Reader], name: str) -> Report:
    """Compare an artefact with its source; a library that cannot read it is a complaint too.

    Raises:
        NopeError: It cannot be read.
    """
    try:
        return parity.compare(source, open_reader())
    except NopeError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise NopeError(
            f"the export cannot be read again, and was not kept: {reason}",
            where=f"--format {name}",
            hint="pip install --upgrade transformers llama-cpp-python",
        ) from error


def asked(name: str, source: Source, config: ExportConfig) -> dict[str, Any]:
    """What an artefact depends on."""
    return {
        "weights_sha256": source.fingerprint,
        "context_length": source.context_length,
        "license": source.license,
        "attention_scales": as_setting(source.saved.sharpenings),
        "first_token": source.saved.first_token,
        "evaluation": source.evaluation and source.evaluation[0],
        **FORMATS[name].depends_on(config),
    }


def made_before(path: Path, name: str, source: Source, config: ExportConfig) -> Record | None:
    """The record of what is to be uploaded, if it was written already and is still that."""
    if config.push_to_hub is None or config.overwrite:
        return None
    try:
        record = Record.read(path)
        files = {file: describe(path / file) for file in record.files if file != CARD}
    except (*DAMAGE, NopeError):
        return None
    same = replace(record, format=name, version=__version__, asked=asked(name, source, config))
    return record if record == same and files.items() <= record.files.items() else None


def upload(item: Export, config: ExportConfig, tell: Tell) -> Export:
    """Upload what was written; files that are on the Hub already are not sent again.

    Raises:
        NetworkError: The Hub cannot be reached, or refuses.
    """
    repo_id = repository_of(item.record.format, config)
    tell(f"uploading {item.path} to {repo_id}")
    try:
        url = remote.upload(
            item.path,
            repo_id,
            private=config.private or None,
            allow_patterns=[PARITY, *item.record.files],
            delete_patterns=list(OWN_FILES),
        )
        return replace(item, url=url)
    except NetworkError as error:
        raise NetworkError(
            error.what,
            where=error.where,
            hint=f"{item.path} is kept, and the same command goes on from there; {error.hint}",
        ) from None
