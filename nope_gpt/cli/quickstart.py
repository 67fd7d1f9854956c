"""`nope quickstart`: the whole family in a row, on text that every Python carries."""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from functools import partial
from pathlib import Path

from nope_gpt.amounts import format_seconds
from nope_gpt.cli.options import configured
from nope_gpt.cli.terminal import result, say
from nope_gpt.config import (
    PRESETS,
    ChatConfig,
    ExportConfig,
    GenerateConfig,
    PrepareConfig,
    PretrainConfig,
    QuickstartConfig,
    TuneConfig,
)
from nope_gpt.config.knobs import Knobs, as_words, differences
from nope_gpt.errors import Interrupted, UsageError

ENCODING = "bpe:4096"
QUESTION = "What does textwrap.dedent do?"
OPENINGS = ("If the", "This method", "Return a")


@configured(QuickstartConfig, settings_file=False)
def command(
    config: QuickstartConfig,
) -> None:
    """Make a small language model from Python's own documentation, in minutes, offline.

    Runs prepare, pretrain, tune, export and generate in a row and shows each as the line
    you would type. If it was interrupted, the same command goes on where it stopped.

    Examples:

    - `nope quickstart`

    - `nope quickstart --directory ~/first-model --pretrain-steps 2000`
    """
    started = time.perf_counter()
    root = Path(config.directory).expanduser()
    prepared = prepare(root)
    try:
        base = pretrain(root, prepared, config)
        ask(base, config)
        tuned = tune(root, prepared, base, config)
    except UsageError as error:
        hint = "repeat the settings it was begun with, or choose another --directory"
        raise UsageError(error.what, where=error.where, hint=hint) from None
    except Interrupted as error:  # A run goes on by --resume; this does by itself.
        raise Interrupted(
            error.what, exit_code=error.exit_code, hint="the same command goes on"
        ) from None
    exported = export(root, tuned)
    answer(exported, config)
    say(
        f"\nDone in {format_seconds(time.perf_counter() - started)}. What to type next:",
        style="bold",
    )
    if shutil.which("nope") is None:
        say(f"  (nope is in {Path(sys.executable).parent}: activate that environment first)")
    say(f"  nope chat --model {exported}")
    say(f'  nope generate "{OPENINGS[0]}" --model {base}')
    say(f"  nope export --model {tuned} --format transformers --output {root / 'for-transformers'}")
    say(f"  tensorboard --logdir {root / 'runs'}")
    say("  nope prepare YOUR-TEXT.txt --token-encoding bpe:4096 && nope pretrain --preset tiny")
    say("  nope size --memory 24GB")
    result(str(exported), {}, as_json=False)


def announce(command: str, settings: Knobs, *arguments: str, preset: str | None = None) -> None:
    """Show a step as the line that does it by itself."""
    beside = PRESETS[type(settings)][preset] if preset else {}
    words = [*arguments, *(["--preset", preset] if preset else [])]
    words += as_words(differences(settings, beside))
    say(f"\n$ nope {command} {shlex.join(words)}", style="bold")


def prepare(root: Path) -> Path:
    """Text and conversations from python-docs; returns the root of the data sets."""
    from nope_gpt.cli.datasets import summary
    from nope_gpt.cli.preparing import PreparationWatcher
    from nope_gpt.data import prepare as data

    datasets = root / "datasets"
    settings = PrepareConfig(dataset_path=str(datasets), token_encoding=ENCODING)
    announce("prepare", settings, "python-docs")
    if any(datasets.glob("*/manifest.json")):
        say("  already there")
        return datasets
    say("  reading the documentation of this Python")
    with PreparationWatcher() as watcher:
        made = data.prepare(["python-docs"], settings, watcher)
    for item in made:
        say(f"  {summary(item.manifest)}", style="dim")
    return datasets


def pretrain(root: Path, datasets: Path, config: QuickstartConfig) -> Path:
    """A base model; returns its run."""
    from nope_gpt.cli.watching import TrainingWatcher
    from nope_gpt.training import pretraining

    settings = PretrainConfig(
        **PRESETS[PretrainConfig]["tiny"]
        | {
            "dataset_path": str(datasets),
            "run_dir_path": str(root / "runs"),
            "max_steps": config.pretrain_steps,
            "seed": config.seed,
        }
    )
    announce("pretrain", settings, preset="tiny")
    return pretraining.pretrain(settings, [TrainingWatcher("pretrain")], resume=True)


def tune(root: Path, datasets: Path, base: Path, config: QuickstartConfig) -> Path:
    """An assistant; returns its run."""
    from nope_gpt.cli.watching import TrainingWatcher
    from nope_gpt.training import tuning

    settings = TuneConfig(
        **PRESETS[TuneConfig]["tiny"]
        | {
            "model": str(base),
            "dataset_path": str(datasets),
            "run_dir_path": str(root / "runs"),
            "max_steps": config.tune_steps,
            "seed": config.seed,
        }
    )
    announce("tune", settings, preset="tiny")
    return tuning.tune(settings, [TrainingWatcher("tune")], resume=True)


def export(root: Path, tuned: Path) -> Path:
    """The assistant in the published layout."""
    from nope_gpt.export.exporting import export as export_model

    output = root / "exports" / "docs-chat"
    settings = ExportConfig(model=str(tuned), output=str(output), overwrite=True)
    announce("export", settings)
    return export_model(settings, partial(say, style="dim"))[0].path


def ask(base: Path, config: QuickstartConfig) -> None:
    """A sample of the base model's prose, and what it makes of the question."""
    from nope_gpt.cli.loading import open_model
    from nope_gpt.cli.writing import write_stream
    from nope_gpt.generation.streaming import TextStream

    settings = GenerateConfig(model=str(base), max_tokens=80, temperature=0.6, seed=config.seed)
    model, tokenizer = open_model(settings, "generate")
    for prompt in (*OPENINGS, QUESTION):
        announce("generate", settings, prompt)
        if prompt == QUESTION:
            say("Before tuning, a question is just text to continue:", style="dim")
        sys.stdout.write(prompt)
        write_stream(TextStream(model, tokenizer, tokenizer.tokenize(prompt), settings), False)
        sys.stdout.write("\n")
        sys.stdout.flush()


def answer(exported: Path, config: QuickstartConfig) -> None:
    """What the assistant answers."""
    from nope_gpt.chat.session import ChatSession
    from nope_gpt.cli.loading import open_model
    from nope_gpt.cli.writing import write_stream

    settings = ChatConfig(
        model=str(exported),
        max_tokens=120,
        temperature=0.6,
        system_message="",
        seed=config.seed,
    )
    announce("chat", settings)
    say(f"After tuning, it answers:\n> {QUESTION}", style="dim")
    model, tokenizer = open_model(settings, "chat")
    write_stream(ChatSession(model, tokenizer, settings).reply(QUESTION), False)
    sys.stdout.write("\n")
    sys.stdout.flush()
