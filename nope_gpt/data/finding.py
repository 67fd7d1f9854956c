"""Which prepared data set a training command means."""

from __future__ import annotations

from pathlib import Path

from nope_gpt.data.documents import CHAT, PREFERENCE, TEXT
from nope_gpt.data.shards import Dataset
from nope_gpt.data.staging import SUFFIX
from nope_gpt.errors import MissingError, UsageError
from nope_gpt.files.artefacts import MANIFEST
from nope_gpt.files.writing import is_leftover

FINEWEB = ("sample-10BT", "r50k_base")
"""The subset and the encoding that `nope pretrain` takes if it is prepared."""

HELD = {TEXT: "text", CHAT: "conversations"}
MAKERS = {TEXT: "nope prepare fineweb", CHAT: "nope prepare smoltalk"}


def find_dataset(
    root: Path,
    name: str | None,
    fineweb: tuple[str | None, str | None] = (None, None),
    content: str = TEXT,
) -> Path:
    """The directory of the data set that a command means.

    Args:
        root: The root of the data sets, or one data set's own directory.
        name: The one in the root.
        fineweb: Subset and encoding, where those name it.
        content: "text" or "chat": what it must hold if nobody names it; where there are no
            conversations, pairs of them are taken.

    Raises:
        MissingError: It is not there, or none is; lists those that are.
        UsageError: There are several and none was named, or one was in two ways.
    """
    if any(fineweb) and (name or (root / MANIFEST).is_file()):
        raise UsageError(
            "--dataset-subset and --token-encoding choose among data sets of FineWeb, and one is "
            "named already",
            where=name or str(root),
            hint="leave them out: a data set has the tokens that it was prepared with",
        )
    if (root / MANIFEST).is_file():
        if name and name != root.name:
            raise UsageError(
                f"--dataset is {name!r}, and --dataset-path is another data set",
                where=str(root),
                hint="give the root of the data sets, or leave --dataset out",
            )
        return root
    manifests = root.glob(f"*/{MANIFEST}")
    present = sorted(path.parent.name for path in manifests if not is_leftover(path.parent))
    hint = "nope prepare FILE, or choose one with --dataset"
    if not name and content == TEXT:
        subset, encoding = (mine or usual for mine, usual in zip(fineweb, FINEWEB, strict=True))
        fineweb_name = "-".join(part for part in ("fineweb", subset, encoding) if part != "none")
        if any(fineweb) or fineweb_name in present:
            name = fineweb_name
            hint = f"{MAKERS[TEXT]} --dataset-subset {subset} --token-encoding {encoding}"
    if name:
        if name not in present:
            raise MissingError(
                f"there is no data set {name!r}; {alternatives(root, name, present)}",
                where=str(root),
                hint=hint,
            )
        return root / name
    return root / the_only(root, present, content)


def the_only(root: Path, present: list[str], content: str) -> str:
    """The name of the one data set of a kind; where there are no conversations, of pairs.

    Raises:
        MissingError: There is none.
        UsageError: There are several.
    """
    held = {name: Dataset.open(root / name).content for name in present}
    fitting = [name for name in present if held[name] == content]
    if not fitting and content == CHAT:
        fitting = [name for name in present if held[name] == PREFERENCE]
    if not fitting:
        unfinished = sorted(path.stem for path in root.glob(f"*{SUFFIX}"))
        raise MissingError(
            f"there is no data set of {HELD[content]}"
            + (f", but an unfinished {unfinished[0]}" if unfinished else ""),
            where=str(root),
            hint="the `nope prepare` that began it goes on with it"
            if unfinished
            else f"nope prepare python-docs, which needs no network, or {MAKERS[content]}",
        )
    if len(fitting) > 1:
        raise UsageError(
            f"there are several data sets: {', '.join(fitting)}",
            where=str(root),
            hint=f"choose one: --dataset {fitting[0]}",
        )
    return fitting[0]


def alternatives(root: Path, name: str, present: list[str]) -> str:
    """What is there instead of a data set."""
    if (root / f"{name}{SUFFIX}").is_dir():
        return "its preparation is not finished"
    return f"there are {', '.join(present)}" if present else "nor any other"
