"""`nope tune`."""

from __future__ import annotations

import os
from pathlib import Path

from nope_gpt.cli.launching import GPUS, launch
from nope_gpt.cli.options import JSON, RESUME, configured
from nope_gpt.cli.terminal import result_of_ranks, say
from nope_gpt.config import PrepareConfig, TuneConfig
from nope_gpt.errors import UsageError


@configured(TuneConfig, RESUME, GPUS, JSON)
def command(config: TuneConfig, resume: bool | Path, gpus: int | None, json: bool) -> None:
    """Teach a base model to answer, from conversations or from pairs of answers.

    Trains low-rank adapters and the rows of the control tokens, or all weights with --full, on
    the answers alone; with pairs, to prefer the better one (DPO). The base model stays as it is;
    the checkpoints of the new run have the adapters folded in, and hold them apart as well. A file,
    `smoltalk`, `ultrafeedback` or, with --extend, `fineweb` that is not prepared yet is prepared
    first; any other data set by `nope prepare`.

    Examples:

    - `nope tune --model runs/pretrain`

    - `nope tune --model runs/pretrain --dataset chats.jsonl`

    - `nope tune --model andrewdalpino/NoPE-GPT-400M-Base --dataset smoltalk --dataset-subset
      smol-magpie-ultra:0.5,smol-summarize@20000`

    - `nope tune --model runs/tune --dataset pairs.jsonl --run-name preferences`

    - `nope tune --extend 2x --model runs/pretrain`
    """
    from nope_gpt.cli.watching import TrainingWatcher
    from nope_gpt.training.extending import extend
    from nope_gpt.training.tuning import tune

    source = source_of(config)
    if source:
        # What is prepared is the mixture already: its shares are not to be taken again.
        config = config.changed(dataset=prepared(source, config), dataset_subset="all")
    if gpus is not None:
        more = ["--dataset", str(config.dataset), "--dataset-subset", "all"] if source else []
        launch(config, gpus, more)
        return
    verb = extend if config.extend else tune
    path = verb(config, [TrainingWatcher("tune")], resume=resume)
    result_of_ranks(str(path), {"run": str(path)}, json)


def source_of(config: TuneConfig) -> str | None:
    """What --dataset names, if that is to be prepared: a file, or one that is known of the Hub."""
    from nope_gpt.data.catalog import known_collection
    from nope_gpt.files.artefacts import MANIFEST

    name = config.dataset
    if name is None or (Path(config.dataset_path).expanduser() / name / MANIFEST).is_file():
        return None
    return name if Path(name).is_file() or known_collection(name) else None


def prepared(source: str, config: TuneConfig) -> str:
    """Prepare a source with the model's tokenizer, and return the data set's name.

    Raises:
        UsageError: Several ranks would do it, or it is text.
    """
    from nope_gpt.cli.preparing import PreparationWatcher, estimated
    from nope_gpt.data import prepare as data
    from nope_gpt.data.catalog import known_collection
    from nope_gpt.data.documents import TEXT
    from nope_gpt.hub.locating import locate

    if config.model is None:
        raise UsageError("there is no base model to tune", hint="nope tune --model runs/pretrain")
    model = locate(config.model)
    subset = config.dataset_subset if known_collection(source) else None
    subset = None if subset == "all" else subset  # What `nope prepare` takes by itself.
    settings = PrepareConfig(
        dataset_path=config.dataset_path, token_encoding=str(model), dataset_subset=subset
    )
    if "WORLD_SIZE" in os.environ:
        raise UsageError(
            f"{source} is not prepared, and one process is to do it",
            hint=f"nope prepare {source} --token-encoding {model}, then torchrun",
        )
    say(f"preparing {source} with the tokenizer of {config.model}")
    say(estimated(data.dry_run([source], settings)), style="dim")
    with PreparationWatcher() as watcher:
        made = data.prepare([source], settings, watcher)
    is_text = config.extend is not None
    fitting = [item for item in made if (item.manifest["content"] == TEXT) == is_text]
    if not fitting:
        held, wanted = ("conversations", "text") if is_text else ("text", "conversations")
        raise UsageError(
            f"this holds {held}, and no {wanted}",
            where=source,
            hint="--extend learns on text" if is_text else "`nope pretrain` trains on text",
        )
    if len(fitting) > 1:
        names = ", ".join(item.path.name for item in fitting)
        raise UsageError(
            f"this holds conversations and pairs of answers, which are two data sets: {names}",
            where=source,
            hint=f"tune on one after the other: --dataset {fitting[0].path.name}",
        )
    say(f"prepared {fitting[0].path}")
    return fitting[0].path.name
