"""Settings to command-line options, and old spellings to today's."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from nope_gpt.cli.terminal import fail, say_of_ranks
from nope_gpt.config import IMPLIED, PRESETS
from nope_gpt.config.knobs import (
    TEXTS,
    Knobs,
    flag_of,
    kind_of,
    known_fields,
    read_settings,
    resolve,
)
from nope_gpt.errors import Interrupted, NopeError, UsageError

C = TypeVar("C", bound=Knobs)

Layers = list[tuple[str, Mapping[str, Any]]]
"""Settings, weakest first, each with where they come from."""

AUTO = "auto"
"""A value of --batch-size, which is a number otherwise."""

LATEST = "latest"
"""What a bare --resume means."""

SPELLINGS = {
    "num-decoder-layers": "num-hidden-layers",
    "hidden-ratio": "feed-forward-ratio",
    "lora-rank": "rank",
    "lora-alpha": "alpha",
    "dataset-subsets": "dataset-subset",
    "base-checkpoint-path": "model",
    "anneal-learning-rate": "schedule=linear",
    "beam-width": "num-beams",
}

RETIRED = {
    "quantize-base-weights": "the base model is not quantized while tuning: leave the flag out",
    "quant-group-size": "the base model is not quantized while tuning: leave the flag out",
    "num-candidates": "the best one is printed, --json has all of them: leave the flag out",
    "resume-scheduler": "--resume always goes on with the schedule: leave the flag out",
}


def normalize(arguments: list[str]) -> list[str]:
    """Spell flags as they are spelled today: kebab-case, and one name for each thing.

    `--batch_size=2` becomes `--batch-size=2`, `--lora_rank` becomes `--rank`. For the
    commands that only read a model, `--checkpoint_path` is `--model`. `--batch-size auto` is a
    switch of its own. What follows a bare `--` is left alone.

    Raises:
        UsageError: A flag is no more.
    """
    command = next((word for word in arguments if not word.startswith("-")), None)
    result: list[str] = []
    skipped = False
    for index, word in enumerate(arguments):
        if skipped:
            skipped = False
            continue
        if word == "--":
            return result + arguments[index:]
        if not word.startswith("--"):
            result.append(word)
            continue
        flag, equals, value = word[2:].partition("=")
        flag = flag.replace("_", "-")
        following = next(iter(arguments[index + 1 :]), "-")
        if flag == "batch-size" and (value if equals else following) == AUTO:
            flag, equals, value, skipped = "auto-batch-size", "", "", not equals
        if flag in RETIRED:
            raise UsageError(f"--{flag} is gone: {RETIRED[flag]}")
        if flag == "checkpoint-path" and command in ("generate", "chat"):
            flag = "model"
        if flag == "resume" and not equals and following.startswith("-"):
            equals, value = "=", LATEST
        result.append(f"--{SPELLINGS.get(flag, flag)}{equals}{value}")
    return result


def configured(
    config_type: type[C], *arguments: inspect.Parameter, settings_file: bool = True
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for every knob of its config.

    The command is called with the resolved config and the arguments of its own. Only
    what was typed counts as a flag, so that a file or preset can set the rest; a resumed
    run's stored settings come after a preset and before a file.

    Args:
        config_type: The command's settings.
        arguments: Parameters of its own, with typer annotations.
        settings_file: Offer --config and, where there are any, --preset.
    """
    presets = PRESETS.get(config_type, {})
    own = [*arguments, *(common_parameters(presets) if settings_file else [])]
    knobs = [parameter_of(config_type, field) for field in dataclasses.fields(config_type)]
    knobs += [
        option(name, setting.kind | None, setting.reason, hidden=True)
        for name, setting in config_type.without_effect.items()
    ]

    def decorate(body: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(body)
        def command(**values: Any) -> None:
            with friendly():
                pass_over(config_type, values)
                base, layers = preset_layers(values, presets), file_layers(values)
                names = [field.name for field in dataclasses.fields(config_type)]
                flags = {name: values.pop(name) for name in names}
                given = {name: value for name, value in flags.items() if value not in (None, [])}
                layers.append(("the command line", given))
                base = implied_layers(config_type, base + layers) + base
                if RESUME in arguments:
                    chosen = values["resume"]
                    values["resume"], stored = resumption(config_type, base + layers, chosen)
                    base += stored
                layers = base + layers
                body(resolve(config_type, layers), **values)

        command.__signature__ = inspect.Signature([*own, *knobs])  # type: ignore[attr-defined]
        command.__annotations__ = {item.name: item.annotation for item in [*own, *knobs]}
        return command

    return decorate


def pass_over(config_type: type[Knobs], values: dict[str, Any]) -> None:
    """Take out the flags that change nothing, and say so of those that were given."""
    for name, setting in config_type.without_effect.items():
        if values.pop(name) is not None:
            say_of_ranks(f"note: --{name.replace('_', '-')} changes nothing: {setting.reason}")


def preset_layers(values: dict[str, Any], presets: Mapping[str, Mapping[str, Any]]) -> Layers:
    """The preset that was asked for, if one was."""
    preset = values.pop("preset", None)
    if preset is None:
        return []
    if preset not in presets:
        raise UsageError(f"--preset is {preset!r}, and must be one of {', '.join(presets)}")
    return [(f"--preset {preset}", presets[preset])]


def implied_layers(config_type: Any, layers: Layers) -> Layers:
    """The settings that go with others that were given."""
    given = {name for _, layer in layers for name, value in layer.items() if value is not None}
    implied = IMPLIED.get(config_type, {}).items()
    return [(f"--{name}", settings) for name, settings in implied if name in given]


def file_layers(values: dict[str, Any]) -> Layers:
    """The settings file that was asked for, if one was."""
    path = values.pop("config", None)
    return [] if path is None else [(f"--config {path}", read_settings(Path(path)))]


def resumption(config_type: Any, layers: Layers, chosen: str | None) -> tuple[bool | Path, Layers]:
    """What --resume means: what to go on from, and the settings it was begun with.

    Args:
        config_type: The command's settings.
        layers: Everything else that was asked for.
        chosen: `latest` for the run that the layers name; or a run or a checkpoint; or None.

    Raises:
        MissingError: There is no such run or checkpoint.
    """
    from nope_gpt.training.runs import resumed_from, run_path, stored_record

    if chosen is None:
        return False, []
    if chosen != LATEST:
        return resumed_from(Path(chosen).expanduser(), config_type.command)
    fields: dict[str, Any] = {
        field.name: field.default for field in dataclasses.fields(config_type)
    }
    for where, layer in layers:
        fields |= known_fields(config_type, layer, where)
    path = run_path(fields["run_dir_path"], fields["run_name"])
    return True, [(str(path), stored_record(path, config_type.command).get("config", {}))]


def common_parameters(presets: Mapping[str, Any]) -> list[inspect.Parameter]:
    """--config, and --preset where there are presets."""
    result = []
    if presets:
        result.append(
            option(
                "preset",
                str | None,
                f"Settings that belong together: {', '.join(presets)}. Flags override them.",
                metavar="[" + "|".join(presets) + "]",
            )
        )
    result.append(
        option(
            "config",
            str | None,
            "Settings from a TOML file, or from the run.json of a run. Flags override them.",
            metavar="FILE",
        )
    )
    return result


def option(
    name: str,
    kind: Any,
    help: str,
    *,
    default: Any = None,
    metavar: str | None = None,
    minimum: int | None = None,
    hidden: bool = False,
) -> inspect.Parameter:
    """An option that is not a knob, such as --resume."""
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[
            kind,
            typer.Option(
                "--" + name.replace("_", "-"),
                help=help,
                metavar=metavar,
                min=minimum,
                hidden=hidden,
            ),
        ],
    )


def argument(name: str, kind: Any, help: str, *, default: Any, metavar: str) -> inspect.Parameter:
    """A positional argument."""
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind, typer.Argument(help=help, metavar=metavar)],
    )


RESUME = option(
    "resume",
    str | None,
    "Go on with the run from its newest valid checkpoint, or begin it if there is none; or go "
    "on from this run or checkpoint. Settings are the stored ones and the flags given now.",
    metavar="[PATH]",
)

JSON = option("json", bool, "Print one JSON object on stdout, for programs.", default=False)


def parameter_of(config_type: type, field: dataclasses.Field[Any]) -> inspect.Parameter:
    """The option of a knob; its value is None unless it was typed."""
    kind, _ = kind_of(config_type, field.name)
    limits = field.metadata["limits"]
    shown = field.metadata["shown_default"] or (kind is not bool and str(field.default))
    if kind == TEXTS:
        kind, shown = list[str], "none"
    flag = flag_of(field)
    if kind is bool:  # What a file or a preset has turned on, can be turned off.
        flag = f"{flag}/--no-{flag[2:]}"
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[
            kind | None,
            typer.Option(
                flag,
                help=field.metadata["help"],
                rich_help_panel=field.metadata["panel"],
                show_default=shown,
                metavar="[" + "|".join(map(str, limits.choices)) + "]" if limits.choices else None,
            ),
        ],
    )


class friendly:  # noqa: N801
    """The one boundary where errors become messages and exit codes.

    A NopeError is printed without a traceback, unless NOPE_DEBUG is set; anything else is
    a bug and passes through. A reader that closes the pipe ends the program quietly.
    """

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, NopeError) and not os.environ.get("NOPE_DEBUG"):
            fail(error)
        if isinstance(error, RuntimeError) and "home directory" in str(error):  # Of `~` in a path.
            fail(UsageError("this user has no home directory", hint="set HOME, or XDG_CACHE_HOME"))
        if isinstance(error, KeyboardInterrupt):
            fail(Interrupted("interrupted", exit_code=130))
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
