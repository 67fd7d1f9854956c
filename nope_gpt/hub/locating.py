"""What `--model` means: a run, a checkpoint, an export or a Hub id to a model's directory."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from nope_gpt.errors import MissingError, NetworkError, NopeError, UsageError
from nope_gpt.files.artefacts import MANIFEST, read_manifest, verify
from nope_gpt.files.json_files import DAMAGE, check, read_json
from nope_gpt.hub.remote import contacting

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARDS = "model-*.safetensors"
TOKENIZER = "tokenizer.json"
RANKS = "tokenizer.tiktoken"
RUN = "run.json"
HISTORY = "history.json"
HOLDER, LOCK = "run.pid", "run.lock"
"""In a run that a process trains now: its name, and what it holds."""


Tell = Callable[[str], None]
"""What hears of a checkpoint that was passed over."""


def untold(_: str) -> None:
    """Hear nothing."""


def locate(model: str | Path, tell: Tell = untold, **options: Any) -> Path:
    """Find the directory of a model, downloading it if it is on the Hub.

    Args:
        model: A run directory (its newest valid checkpoint), a checkpoint or export
            directory, or the id of a model on the Hub. A name that ends in .pt, as in the
            old scripts, is also the directory of that name without the suffix.
        tell: Told of newer checkpoints that are damaged.
        options: What `huggingface_hub.snapshot_download` takes: revision, token, cache_dir.

    Raises:
        MissingError: There is no such model.
        UsageError: It is something else, such as a data set or a .pt file.
        NetworkError: The Hub cannot be reached and holds what is missing here.
        NopeError: The checkpoint that is named is damaged.
    """
    try:
        path = Path(model).expanduser()
        path.is_file()  # A name that is too long for the system is told here.
    except (OSError, RuntimeError) as error:
        raise MissingError(f"there is no such model: {error}", where=str(model)[:80]) from None
    if path.is_dir():
        return model_in(path, tell)
    if path.is_file():
        raise UsageError(
            "this is a single file, and a model is a directory",
            where=str(path),
            hint=f"for a checkpoint of the old scripts: "
            f"nope export --model {path} --format hub --output exports/{path.stem}",
        )
    if path.suffix == ".pt" and path.with_suffix("").is_dir():
        return model_in(path.with_suffix(""), tell)
    if path.suffix in (".pt", ".pth", ".bin", ".ckpt", ".safetensors"):
        raise MissingError("there is no such file", where=str(path))
    close = near(path)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)):
        raise MissingError(
            "there is no such model",
            where=str(path),
            hint=close
            or "give a run, checkpoint or export directory, or a Hub id such as "
            "andrewdalpino/NoPE-GPT-400M-Chat",
        )
    try:
        return download(str(model), **options)
    except (MissingError, NetworkError) as error:
        error.hint = close or error.hint
        raise


def near(path: Path) -> str | None:
    """What may have been meant by a directory that is not there."""
    beside = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, beside, n=1)
    return f"did you mean {path.parent / close[0]}?" if close else None


def model_in(path: Path, tell: Tell = untold) -> Path:
    """The model directory that a local directory is or leads to.

    Raises:
        MissingError: It is none, and leads to none.
        UsageError: It holds something else, such as a .pt file.
        NopeError: A checkpoint is damaged.
    """
    if (path / CONFIG).is_file() and ((path / WEIGHTS).is_file() or (path / INDEX).is_file()):
        if (path / MANIFEST).is_file():
            verify(path, read_manifest(path, "checkpoint"))
        return path
    if (path / RUN).is_file():
        return newest_checkpoint(checkpoints_of(path), tell)
    if any(path.glob("step-*")):
        return newest_checkpoint(path, tell)
    if (path / MANIFEST).is_file():
        read_manifest(path, "checkpoint")
    for pattern in ("*.pt", "*.pth", "pytorch_model*.bin"):
        for file in sorted(path.glob(pattern)):
            raise UsageError(
                f"this holds a pickled checkpoint, {file.name}, and no {WEIGHTS}",
                where=str(path),
                hint=f"nope export --model {file} --format hub --output exports/{file.stem}",
            )
    present = [name for name in (CONFIG, WEIGHTS) if (path / name).is_file()]
    raise MissingError(
        f"this is not a model: it has {present[0] if present else 'neither ' + CONFIG} "
        f"{'but no' if present else 'nor'} {WEIGHTS if present != [WEIGHTS] else CONFIG}",
        where=str(path),
        hint="give a run, checkpoint or export directory, or a Hub id",
    )


def checkpoints_of(run: Path) -> Path:
    """The directory of a run's checkpoints."""
    return run / str(read_run(run)["checkpoints"])


def read_run(directory: Path) -> dict[str, Any]:
    """What the run.json of a run, or of a checkpoint, says.

    Raises:
        MissingError: There is none.
        NopeError: It is damaged.
    """
    file = directory / RUN
    try:
        record = read_json(file)
        kinds = {"command": str, "config": dict, "checkpoints": str, "facts": dict}
        check({"facts": {}} | record, kinds)
        (directory / record["checkpoints"]).is_dir()  # A name that no place can have is told here.
    except FileNotFoundError:
        raise MissingError("this is not a run", where=str(directory)) from None
    except DAMAGE as error:
        reason = f"{type(error).__name__}: {error}"
        raise NopeError(f"this run's settings are damaged ({reason})", where=str(file)) from None
    return dict(record)


def newest_checkpoint(directory: Path, tell: Tell = untold) -> Path:
    """The valid checkpoint with the most steps, found by looking, never by a pointer.

    Args:
        directory: Of the checkpoints.
        tell: Told of newer ones that are damaged.

    Raises:
        MissingError: There is none; tells what is wrong with those that are there.
    """
    complaints = []
    for path in sorted(checkpoints_in(directory), key=step_of, reverse=True):
        try:
            verify(path, read_manifest(path, "checkpoint"))
        except NopeError as error:
            complaints.append(f"{path.name}: {error.what}")
        else:
            for complaint in complaints:
                tell(f"passed over {complaint}")
            return path
    raise MissingError(
        "there is no valid checkpoint" + "".join(f"\n  {text}" for text in complaints),
        where=str(directory),
        hint="train first: nope pretrain, or choose another run",
    )


def checkpoints_in(directory: Path) -> list[Path]:
    """Everything in a directory that is named like a checkpoint."""
    return [path for path in directory.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]


def step_of(checkpoint: Path) -> int:
    """The number of steps after which a checkpoint was saved."""
    return int(checkpoint.name.removeprefix("step-"))


def download(repo_id: str, **options: Any) -> Path:
    """A model's files from the Hub: those that are on this machine, without asking the network.

    `hf download` gets a newer version.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    with suppress(LocalEntryNotFoundError, HFValidationError):
        here = Path(snapshot_download(repo_id, **options | {"local_files_only": True}))
        if is_whole(here):
            return here
    with contacting("model", repo_id, "try again with a network, or give a local directory"):
        files = [CONFIG, WEIGHTS, INDEX, SHARDS, TOKENIZER, RANKS, HISTORY]
        return Path(snapshot_download(repo_id, allow_patterns=files, **options))


def is_whole(path: Path) -> bool:
    """Whether a model's directory has all that a download would bring, but for what is optional."""
    needed = [CONFIG]
    try:
        if '"bpe-' in (path / TOKENIZER).read_text(encoding="utf-8")[:40]:
            needed.append(RANKS)
        if not (path / WEIGHTS).is_file():
            index = read_json(path / INDEX)
            needed += [Path(name).name for name in index["weight_map"].values()]
        return all((path / name).is_file() for name in needed)
    except DAMAGE:
        return False
