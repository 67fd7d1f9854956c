"""How a setting is declared once and read everywhere.

A knob is a dataclass field that carries its own help, range and flag name. The
command line, the run files and the documentation are all made from the fields,
so a default or a limit is written in one place only.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from nope_gpt.errors import MissingError, UsageError
from nope_gpt.files.json_files import parse_json


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a knob's value may be; the bounds are inclusive unless said otherwise."""

    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[Any, ...] | None = None

    def complaint(self, value: Any) -> str | None:
        """Say what is wrong with a value, or return None."""
        if isinstance(value, float) and not math.isfinite(value):
            return "must be a finite number"
        if self.choices is not None and value not in self.choices:
            return f"must be one of {', '.join(map(str, self.choices))}"
        if self.minimum is not None and value < self.minimum:
            return f"must be at least {self.minimum:g}"
        if self.maximum is not None and value > self.maximum:
            return f"must be at most {self.maximum:g}"
        if self.above is not None and value <= self.above:
            return f"must be above {self.above:g}"
        if self.below is not None and value >= self.below:
            return f"must be below {self.below:g}"
        return None


def knob(
    default: Any,
    help: str,
    *,
    panel: str,
    flag: str | None = None,
    shown_default: str | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: tuple[Any, ...] | None = None,
) -> Any:
    """Declare a setting.

    Args:
        default: The value when nobody says otherwise; `dataclasses.MISSING` makes it required.
        help: One or two sentences for `--help` and the documentation.
        panel: The heading under which `--help` shows it.
        flag: The flag without dashes, where it differs from the field's name.
        shown_default: What to show as the default where the value itself says little.
        minimum, maximum, above, below, choices: The `Limits`.
    """
    metadata = {
        "help": help,
        "panel": panel,
        "flag": flag,
        "shown_default": shown_default,
        "limits": Limits(minimum, maximum, above, below, choices),
    }
    return dataclasses.field(default=default, metadata=metadata)


def like(
    owner: type[Knobs],
    name: str,
    default: Any = dataclasses.MISSING,
    *,
    help: str | None = None,
    panel: str | None = None,
    shown_default: str | None = None,
) -> Any:
    """Declare a setting that another group of settings declares, with what is different here.

    What is shown as the default belongs to the default, and is not taken over by another one.
    """
    field = owner.__dataclass_fields__[name]
    metadata = dict(field.metadata)
    if default is dataclasses.MISSING:
        default = field.default
    else:
        metadata["shown_default"] = None
    changes = {"help": help, "panel": panel, "shown_default": shown_default}
    metadata |= {key: value for key, value in changes.items() if value is not None}
    return dataclasses.field(default=default, metadata=metadata)


TEXTS = tuple[str, ...]
"""The type of a knob that may be given several times."""


def flag_of(field: dataclasses.Field[Any]) -> str:
    """The flag that sets a field, with its dashes."""
    return "--" + (field.metadata.get("flag") or field.name.replace("_", "-"))


@functools.cache
def kind_of(owner: Any, name: str) -> tuple[type, bool]:
    """The plain type of a field and whether it may be None."""
    annotation = _annotations(owner)[name]
    if isinstance(annotation, types.UnionType):
        (plain,) = (part for part in typing.get_args(annotation) if part is not types.NoneType)
        return plain, True
    return annotation, False


_annotations = functools.cache(typing.get_type_hints)
"""The types of a class's fields; to evaluate them takes time."""


@dataclasses.dataclass(frozen=True)
class WithoutEffect:
    """A setting of the old scripts that changes nothing here.

    Attributes:
        kind: Its type.
        reason: Why it changes nothing.
    """

    kind: type
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Knobs:
    """A group of settings that checks itself.

    Attributes:
        without_effect: Settings that are accepted by these names, and not kept.

    Raises:
        UsageError: A value has the wrong type or lies outside its limits; names the flag.
    """

    without_effect: typing.ClassVar[Mapping[str, WithoutEffect]] = {}

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = checked(type(self), field, getattr(self, field.name))
            object.__setattr__(self, field.name, value)

    def changed(self, **values: Any) -> typing.Self:
        """A copy with some values replaced."""
        return dataclasses.replace(self, **values)

    def settled(self) -> typing.Self:
        """With what is taken where nothing is given, as far as that is known before a run."""
        return self

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def checked(owner: type, field: dataclasses.Field[Any], value: Any) -> Any:
    """Return a knob's value in its declared type, or refuse it by its flag's name.

    Raises:
        UsageError: It is no such value; says what is.
    """
    kind, optional = kind_of(owner, field.name)
    if value is None and optional:
        return None
    if kind == TEXTS:
        if isinstance(value, list | tuple) and all(type(item) is str for item in value):
            return tuple(value)
        raise UsageError(f"{flag_of(field)} is {shown(value)}, and must be a list of texts")
    if type(value) is int and abs(value) >> 63:
        raise UsageError(f"{flag_of(field)} has more than 63 bits")
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
        raise UsageError(f"{flag_of(field)} is {shown(value)}, and must be {names[kind]}")
    if isinstance(value, str) and "\0" in value:
        raise UsageError(f"{flag_of(field)} has a zero byte in it")
    limits: Limits | None = field.metadata.get("limits")
    complaint = limits.complaint(value) if limits else None
    if complaint:
        raise UsageError(f"{flag_of(field)} is {value}, and {complaint}")
    return value


def shown(value: Any) -> str:
    """A value as an error shows it: of one that may be deep or long, what kind it is."""
    if isinstance(value, dict | list):
        return "a table" if isinstance(value, dict) else "a list"
    return repr(value)


T = TypeVar("T", bound=Knobs)


def known_fields(config_type: type[T], values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Map flag or field names of a file or preset to fields, refusing unknown ones.

    Settings without effect are left out.

    Raises:
        UsageError: One is not known.
    """
    names: dict[str, str] = {}
    for field in dataclasses.fields(config_type):
        names[field.name] = field.name
        names[flag_of(field)[2:].replace("-", "_")] = field.name
    result = {}
    for name, value in values.items():
        key = name.replace("-", "_")
        if key in config_type.without_effect:
            continue
        if key not in names:
            raise UsageError(
                f"unknown setting {name!r}",
                where=where,
                hint="the settings are the flags of the command: see its --help",
            )
        result[names[key]] = value
    return result


def resolve(
    config_type: type[T],
    layers: Iterable[tuple[str, Mapping[str, Any]]],
) -> T:
    """Build a config from layers of settings; a later layer wins.

    Args:
        config_type: The config to build.
        layers: Pairs of where the settings come from and the settings.

    Raises:
        UsageError: A setting is unknown or out of range; names where it came from.
    """
    values: dict[str, Any] = {}
    origin = {}
    for where, layer in layers:
        for name, value in known_fields(config_type, layer, where).items():
            values[name], origin[name] = value, where
    for field in dataclasses.fields(config_type):
        if field.name in values:
            try:
                checked(config_type, field, values[field.name])
            except UsageError as error:
                raise UsageError(error.what, where=origin[field.name]) from None
    return config_type(**values)


def differences(config: Knobs, preset: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """The settings of a config that would be others if they were left out, by their flags.

    Args:
        config: The settings.
        preset: What is taken in place of the defaults, by the names of the fields.
    """
    result = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        taken = preset.get(field.name, field.default)
        if value != taken and not is_same(config, field.name, taken):
            result[flag_of(field)] = value
    return result


def is_same(config: Knobs, name: str, value: Any) -> bool:
    """Whether another value of a setting, which others may settle, leaves a config as it is."""
    try:
        return config.changed(**{name: value}).settled() == config.settled()
    except UsageError:
        return False


def as_words(flags: Mapping[str, Any]) -> list[str]:
    """Settings by their flags, as what is typed; where one is None, its flag is left out."""
    words = []
    for flag, value in flags.items():
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        elif value is not None:
            for item in value if isinstance(value, tuple) else [value]:
                words += [flag, str(item)]
    return words


def read_settings(path: Path) -> dict[str, Any]:
    """Read a TOML file, or the JSON that a run wrote, as flat settings.

    Raises:
        MissingError: There is no such file.
        UsageError: The file is neither TOML nor JSON, or is not a table.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise MissingError("there is no such settings file", where=str(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the settings file cannot be read: {error}", where=str(path)) from None
    try:
        settings = parse_json(text) if path.suffix == ".json" else tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"the settings file cannot be parsed: {error}",
            where=str(path),
            hint="write one `name = value` a line (TOML), or pass the run.json of a run",
        ) from None
    if isinstance(settings, dict) and isinstance(settings.get("config"), dict):
        settings = settings["config"]
    if not isinstance(settings, dict):
        raise UsageError("the settings file is not a table of settings", where=str(path))
    return settings
