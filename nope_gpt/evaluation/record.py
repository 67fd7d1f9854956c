"""What was found of a model, kept beside it: for TensorBoard, and for the cards of its exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nope_gpt.errors import NopeError
from nope_gpt.evaluation.evaluating import Evaluation
from nope_gpt.files.json_files import DAMAGE, read_json
from nope_gpt.files.writing import write_file, write_json
from nope_gpt.hub import storage
from nope_gpt.hub.history import STATE
from nope_gpt.hub.locating import RUN, step_of

RECORD = "evaluation.json"
PICTURE = "evaluation.png"


def place_for(model: str, directory: Path) -> Path:
    """Where what is found of a model is kept: its run, or its export.

    Args:
        model: As it was named.
        directory: With its files.

    Raises:
        UsageError: It is one checkpoint of a run, or a download.
    """
    path = Path(model).expanduser()
    if (path / RUN).is_file() and not (path / STATE).is_file():
        return path
    storage.refuse_to_change(directory)
    return directory


def keep(place: Path, directory: Path, found: Evaluation, picture: bytes | None) -> None:
    """Write it beside a model, and for a run into its TensorBoard.

    Args:
        place: Of `place_for`.
        directory: With the files that were evaluated.
        found: What was measured.
        picture: Of it, as a PNG.
    """
    write_json(place / RECORD, {"weights_sha256": storage.digest(directory), **found.as_dict()})
    if picture is not None:
        write_file(place / PICTURE, picture)
    if place == directory:
        return
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(place))
    step = step_of(directory)
    for each in found.lengths:
        name = f"Perplexity at {each.length // found.trained_length}x"
        writer.add_scalar(name, each.perplexity, step)
    if picture is not None:
        writer.add_image("Reach", decoded(picture), step)
    writer.close()


def decoded(picture: bytes) -> Any:
    """The pixels of a PNG: [channels, height, width]."""
    import io

    from matplotlib.image import imread

    return imread(io.BytesIO(picture), format="png").transpose(2, 0, 1)[:3]


def kept(model: str, directory: Path) -> tuple[dict[str, Any], bytes | None] | None:
    """What was found of a model, and its picture, if that is of these weights.

    Raises:
        NopeError: What is there is damaged.
    """
    path = Path(model).expanduser()
    place = path if (path / RUN).is_file() else directory
    if not (place / RECORD).is_file():
        return None
    try:
        found = read_json(place / RECORD)
        fits = found["weights_sha256"] == storage.digest(directory)
        for each in found["lengths"]:
            for name in ("length", "multiple", "perplexity", "perplexity_ratio", "bits_per_byte"):
                each[name] = float(each[name])
        found["tokens"] = int(found["tokens"])
    except DAMAGE as error:
        reason = f"{type(error).__name__}: {error}"
        raise NopeError(
            f"this is damaged ({reason})", where=str(place / RECORD), hint="nope eval --record"
        ) from None
    picture = place / PICTURE
    return (found, picture.read_bytes() if picture.is_file() else None) if fits else None
