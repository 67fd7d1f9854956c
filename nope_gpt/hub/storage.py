"""Models on disk: load them, save them, and what any network can do with a disk and the Hub.

A model is a directory with `config.json` and `model.safetensors`, or several such files and an
index of them, in the layout of `published_layout.py`. What was exported for transformers, in that
of `transformers_layout.py`, is loaded too.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from nope_gpt.config import ModelConfig
from nope_gpt.errors import NopeError, UsageError
from nope_gpt.files.artefacts import MANIFEST, describe
from nope_gpt.files.json_files import DAMAGE, parse_json, read_json
from nope_gpt.files.writing import write_json, write_tensors, writing
from nope_gpt.hub import published_layout, remote, transformers_layout
from nope_gpt.hub.locating import CONFIG, INDEX, WEIGHTS, locate
from nope_gpt.hub.published_layout import FIRST_TOKEN, TIED
from nope_gpt.network import sharpening
from nope_gpt.network.sharpening import Sharpening

ROTARY = "rotary"
"""The key of config.json that says so of a checkpoint whose positions are not dropped yet."""

LARGEST_HEADER = 100_000_000
"""Bytes of what a safetensors file says of its tensors; its own library reads no more."""

Tell = Callable[[float], None]
"""What hears which share of the weights has been read."""


@dataclass(frozen=True)
class SavedModel:
    """A model as it lies on disk, in the names it has in memory."""

    config: ModelConfig
    state: dict[str, Tensor]
    trained_context_length: int | None
    sharpenings: Mapping[int, Sharpening] = field(default_factory=dict)
    first_token: int | None = None


def load(path: Path, tell: Tell = lambda _: None, *, rotary: bool = False) -> SavedModel:
    """Load a model directory of any generation of names.

    The vocabulary is the number of rows of the embedding: the published chat model's
    config.json states that of its base.

    Args:
        path: The directory.
        tell: Told which share of the weights has been read.
        rotary: Whether it may be a checkpoint whose positions are not dropped yet.

    Raises:
        NopeError: The files are damaged, incomplete or of another architecture.
    """
    settings = read_config(path / CONFIG)
    if settings.get(ROTARY) and not rotary:
        raise NopeError(
            "this model still turns queries and keys by their position, as it does at the "
            "beginning of a run with --rotary-until; it is of use once they are dropped",
            where=str(path),
            hint="go on with its run: nope pretrain --resume",
        )
    if settings.get("model_type") in transformers_layout.MODEL_TYPES:
        layout = str(settings["model_type"])
        settings = transformers_layout.own_settings(settings, str(path))
        state = transformers_layout.from_layout(
            read_weights(path, tell), layout, settings["num_decoder_layers"], str(path)
        )
    else:
        settings = published_layout.rename_settings(settings, str(path / CONFIG))
        state = published_layout.translate(read_weights(path, tell), str(path))
    return assemble(settings, state, str(path))


def assemble(settings: dict[str, Any], state: dict[str, Tensor], where: str) -> SavedModel:
    """Check that settings and tensors describe one and the same network.

    Raises:
        NopeError: They do not; says where.
    """
    if TIED not in state:
        raise NopeError("the token embedding is missing", where=where)
    if state[TIED].dim() != 2:
        raise NopeError("the token embedding is no matrix", where=where)
    known = {field.name for field in fields(ModelConfig)}
    try:
        config = ModelConfig(
            **{key: value for key, value in settings.items() if key in known}
            | {"vocabulary_size": state[TIED].size(0)}
        )
    except UsageError as error:
        raise NopeError(f"{CONFIG} describes no network: {error.what}", where=where) from None
    published_layout.check_shapes(config, state, where)
    length = settings.get("trained_context_length")
    return SavedModel(
        config,
        state,
        length if type(length) is int and length > 0 else None,
        sharpening.stated_in(settings, where),
        first_token_in(settings, config.vocabulary_size, where),
    )


def first_token_in(settings: dict[str, Any], vocabulary_size: int, where: str) -> int | None:
    """What everything that a model reads begins with, if it was trained so.

    Raises:
        NopeError: It is no token.
    """
    token = settings.get(FIRST_TOKEN)
    if token is not None and (type(token) is not int or not 0 <= token < vocabulary_size):
        raise NopeError(f"{FIRST_TOKEN} is {token!r}, which is no token", where=where)
    return token


def read_config(path: Path) -> dict[str, Any]:
    """Read a config.json as it is.

    Raises:
        NopeError: It is no table, or cannot be read.
    """
    try:
        settings = read_json(path)
    except DAMAGE as error:
        raise NopeError(f"{CONFIG} cannot be read: {error}", where=str(path)) from None
    if not isinstance(settings, dict):
        raise NopeError(f"{CONFIG} is not a table of settings", where=str(path))
    return settings


def weight_files(path: Path) -> list[Path]:
    """The files of weights of a model's directory.

    Raises:
        NopeError: The index of several is damaged, or one of them is missing.
    """
    if (path / WEIGHTS).is_file():
        return [path / WEIGHTS]
    try:
        names = sorted(set(read_json(path / INDEX)["weight_map"].values()))
        files = [path / Path(name).name for name in names]
        for file in files:
            file.stat()
        return files
    except DAMAGE as error:
        reason = f"{type(error).__name__}: {error}"
        raise NopeError(f"{INDEX} cannot be read ({reason})", where=str(path)) from None


def read_weights(path: Path, tell: Tell = lambda _: None) -> dict[str, Tensor]:
    """Read all tensors of a model's directory, with the names that they have there.

    Args:
        path: The directory.
        tell: Told after each tensor which share of the bytes has been read.
    """
    files = weight_files(path)
    total = sum(file.stat().st_size for file in files) or 1
    tensors: dict[str, Tensor] = {}
    read = 0
    for file in files:
        for name, tensor in read_tensors(file):
            tensors[name] = tensor
            read += tensor.nbytes
            tell(min(read / total, 1.0))
    return tensors


def digest(path: Path) -> str:
    """A sha256 of the weights of a model's directory: of the file, or of the hashes of several."""
    hashes = [str(describe(file)["sha256"]) for file in weight_files(path)]
    if len(hashes) == 1:
        return hashes[0]
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Read a safetensors file; nothing in it is ever executed."""
    with opened(path) as file:
        for name in file.keys():  # noqa: SIM118
            yield name, file.get_tensor(name)


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file, of which each tensor and each fact is there once.

    Raises:
        NopeError: It is not whole, or is something else.
    """
    try:
        with path.open("rb") as content:
            length = int.from_bytes(content.read(8), "little")
            parse_json(content.read(min(length, LARGEST_HEADER)).decode())
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, *DAMAGE, RuntimeError) as error:
        raise NopeError(
            f"this is not a whole safetensors file: {error}",
            where=str(path),
            hint="download or export the model again",
        ) from None


def save(path: Path, model: SavedModel, largest_file: int | None = None) -> None:
    """Write config.json and model.safetensors into a directory that exists.

    The tied matrix is stored once, as in the published files.

    Args:
        path: The directory.
        model: What to write.
        largest_file: Bytes beyond which the weights are spread over several files.

    Raises:
        NopeError: A weight is not a finite number; names its tensor.
    """
    refuse_infinite(model.state, str(path))
    names = published_layout.published_names(model.config.num_decoder_layers)
    tensors = {published: model.state[name].detach() for name, published in names.items()}
    settings: dict[str, Any] = dict(sorted(model.config.as_dict().items()))
    if model.trained_context_length is not None:
        settings["trained_context_length"] = model.trained_context_length
    if model.first_token is not None:
        settings[FIRST_TOKEN] = model.first_token
    if model.sharpenings:
        settings[sharpening.SETTING] = sharpening.as_setting(model.sharpenings)
    write_weights(path, tensors, {TIED: published_layout.TIED_PUBLISHED}, largest_file)
    write_json(path / CONFIG, settings)


def write_sharpenings(path: Path, found: Mapping[int, Sharpening], trained_length: int) -> None:
    """Write into a model's config.json how much sharper attention is to be, and nothing else.

    Args:
        path: The model's directory.
        found: By length of the context, in tokens.
        trained_length: Of the context, beyond which they hold.

    Raises:
        UsageError: Its files are not to be changed: a checkpoint's, or a download's.
    """
    refuse_to_change(path)
    settings = read_config(path / CONFIG)
    scales = {sharpening.SETTING: sharpening.as_setting(found)}
    write_json(path / CONFIG, settings | {"trained_context_length": trained_length} | scales)


def mark_rotary(path: Path) -> None:
    """Write into config.json that the positions of a checkpoint are not dropped yet."""
    write_json(path / CONFIG, read_config(path / CONFIG) | {ROTARY: True})


def refuse_to_change(path: Path) -> None:
    """Refuse a model whose files have to stay as they are.

    Raises:
        UsageError: It is a checkpoint, whose files have their sha256, or a download.
    """
    is_checkpoint = (path / MANIFEST).is_file()
    if is_checkpoint or path.parent.parent.name.startswith("models--"):  # In the Hub's cache.
        kind = "a checkpoint" if is_checkpoint else "a download"
        raise UsageError(
            f"this is {kind}, and its files stay as they are",
            where=str(path),
            hint="nope export --model MODEL --output exports/NAME, and calibrate that",
        )


def refuse_infinite(state: dict[str, Tensor], where: str) -> None:
    """Refuse weights that are no numbers; names the tensor.

    Raises:
        NopeError: There are some.
    """
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise NopeError(f"{name} holds numbers that are not finite", where=where)


def write_weights(
    path: Path, tensors: dict[str, Tensor], header: dict[str, str], largest_file: int | None
) -> None:
    """Write tensors as model.safetensors, or as several files and an index of them."""
    whole = {name: tensor.to("cpu").contiguous() for name, tensor in tensors.items()}
    size = sum(tensor.nbytes for tensor in whole.values())
    if largest_file is None or size <= largest_file:
        write_tensors(path / WEIGHTS, whole, metadata=header)
        return
    from huggingface_hub import split_torch_state_dict_into_shards

    plan = split_torch_state_dict_into_shards(whole, max_shard_size=largest_file)
    for file, names in plan.filename_to_tensors.items():
        write_tensors(path / file, {name: whole[name] for name in names}, metadata=header)
    index = {"metadata": {"total_size": size}, "weight_map": plan.tensor_to_filename}
    write_json(path / INDEX, index)


class Pretrained(nn.Module):
    """What any network of ours can do with a disk and the Hub.

    Attributes:
        config: Its shape.
        trained_context_length: Tokens of context that it was trained on, if that is known.
        sharpenings: How much sharper attention is to be, by planned context.
        first_token: What all it reads begins with, if it was trained so.
    """

    config: ModelConfig
    trained_context_length: int | None
    sharpenings: dict[int, Sharpening]
    first_token: int | None

    @classmethod
    def from_config(cls, config: ModelConfig) -> Self:
        return cls(**config.as_dict())

    @classmethod
    def from_pretrained(cls, model: str | Path, **options: Any) -> Self:
        """Load a model, ready to generate.

        Args:
            model: A run, checkpoint or export directory, or a Hub id.
            options: For the Hub: `revision`, `token`, `cache_dir`, `local_files_only`.

        Raises:
            NopeError: There is no such model, or its files are not a NoPE GPT.
        """
        return cls.from_saved(load(locate(model, **options)))

    @classmethod
    def from_saved(cls, saved: SavedModel) -> Self:
        with torch.device("meta"):
            model = cls.from_config(saved.config)
        model.load_state_dict(saved.state, assign=True)
        model.trained_context_length = saved.trained_context_length
        model.sharpenings = dict(saved.sharpenings)
        model.first_token = saved.first_token
        return model.eval()

    def saved(self, state: dict[str, Tensor] | None = None) -> SavedModel:
        """This model as it goes to disk, with other weights if some are given."""
        return SavedModel(
            self.config,
            state or self.state_dict(),
            self.trained_context_length,
            self.sharpenings,
            self.first_token,
        )

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json and model.safetensors in the published layout.

        Raises:
            CapacityError: The disk is full.
            NopeError: The weights are not finite, or the place cannot be written.
        """
        path = Path(directory)
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
        save(path, self.saved())

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the model to the Hub; returns the address of the commit.

        Args:
            repo_id: OWNER/NAME.
            options: `token`, `private`, `commit_message`, `revision`.

        Raises:
            UsageError: The repository cannot have that name, or is public and was to be private.
            NetworkError: The Hub cannot be reached, or refuses.
            CapacityError: The disk has no room for a copy.
            NopeError: The weights are not finite.
        """
        with tempfile.TemporaryDirectory() as directory:
            self.save_pretrained(directory)
            return remote.upload(Path(directory), repo_id, **options)
