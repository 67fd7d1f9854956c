"""The published layout: load it, save it, and translate every historical name.

A model is a directory with `config.json` and `model.safetensors`, or several such files and an
index of them. On disk the tensors have their published names, in memory names that explain
themselves; the tables here are the only place where both are known. What was exported for
transformers is loaded too; the names of that are in `transformers_layout.py`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nope_gpt import transformers_layout
from nope_gpt.artifacts import DAMAGE, describe, write_json, write_tensors
from nope_gpt.config import ModelConfig
from nope_gpt.errors import NetworkError, NopeError, UsageError
from nope_gpt.locating import CONFIG, INDEX, WEIGHTS

HISTORICAL_SETTINGS = {
    "num_layers": ("num_decoder_layers",),
    "num_hidden_layers": ("num_decoder_layers",),
    "feed_forward_ratio": ("hidden_ratio",),
    "num_heads": ("num_q_heads", "num_kv_heads"),
    "num_attention_heads": ("num_q_heads", "num_kv_heads"),
}

HISTORICAL_NAMES = (
    (r"^(?:_orig_mod\.|model\.)+", ""),
    (r"^(?:body|decoder)\.(\d+)\.", r"decoder.layers.\1."),
    (r"\.attention\.", ".stage1."),
    (r"\.(?:mlp\.layers\.0|feedforward\.linear1)\.", ".stage2.linear1."),
    (r"\.(?:mlp\.layers\.2|feedforward\.linear2)\.", ".stage2.linear2."),
    (r"\.stage1\.in_proj_weight$", ".stage1.qkv_proj.weight"),
    (r"^output_norm\.", "token_classifier.norm."),
    (r"^output_layer\.", "token_classifier.linear."),
)

LAYER_NAMES = {
    "norm1": "attention_norm",
    "stage1.q_proj": "attention.q_proj",
    "stage1.k_proj": "attention.k_proj",
    "stage1.v_proj": "attention.v_proj",
    "stage1.out_proj": "attention.out_proj",
    "norm2": "feed_forward_norm",
    "stage2.linear1": "feed_forward.up",
    "stage2.linear2": "feed_forward.down",
}

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""That weights may have."""

TIED = "token_embeddings.weight"
TIED_PUBLISHED = "token_classifier.linear.weight"


def published_names(num_layers: int) -> dict[str, str]:
    """Map the name of every tensor in memory to its published name."""
    names = {TIED: TIED_PUBLISHED, "norm.weight": "token_classifier.norm.weight"}
    for layer in range(num_layers):
        for published, ours in LAYER_NAMES.items():
            prefix = f"decoder.layers.{layer}."
            names[f"{prefix}{ours}.weight"] = f"{prefix}{published}.weight"
    return names


Tell = Callable[[float], None]
"""What hears which share of the weights has been read."""


@dataclass(frozen=True)
class SavedModel:
    """A model as it lies on disk, in the names it has in memory."""

    config: ModelConfig
    state: dict[str, Tensor]
    trained_context_length: int | None


def load(path: Path, tell: Tell = lambda _: None) -> SavedModel:
    """Load a model directory of any generation of names.

    The vocabulary is the number of rows of the embedding: the published chat model's
    config.json states that of its base.

    Raises:
        NopeError: The files are damaged, incomplete or of another architecture.
    """
    settings = read_config(path / CONFIG)
    if settings.get("model_type") in transformers_layout.MODEL_TYPES:
        layout = str(settings["model_type"])
        settings = transformers_layout.own_settings(settings, str(path))
        state = transformers_layout.from_layout(
            read_weights(path, tell), layout, settings["num_decoder_layers"], str(path)
        )
    else:
        settings = rename_settings(settings, str(path / CONFIG))
        state = translate(read_weights(path, tell), str(path))
    return assemble(settings, state, str(path))


def assemble(settings: dict[str, Any], state: dict[str, Tensor], where: str) -> SavedModel:
    """Check that settings and tensors describe one and the same network."""
    if TIED not in state:
        raise NopeError("the token embedding is missing", where=where)
    if state[TIED].dim() != 2:
        raise NopeError("the token embedding is no matrix", where=where)
    known = set(ModelConfig.__dataclass_fields__)
    try:
        config = ModelConfig(
            **{key: value for key, value in settings.items() if key in known}
            | {"vocabulary_size": state[TIED].size(0)}
        )
    except UsageError as error:
        raise NopeError(f"{CONFIG} describes no network: {error.what}", where=where) from None
    except OverflowError as error:
        raise NopeError(f"{CONFIG} describes no network: {error}", where=where) from None
    check_shapes(config, state, where)
    length = settings.get("trained_context_length")
    return SavedModel(config, state, length if type(length) is int and length > 0 else None)


def read_config(path: Path) -> dict[str, Any]:
    """Read a config.json as it is."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except DAMAGE as error:
        raise NopeError(f"{CONFIG} cannot be read: {error}", where=str(path)) from None
    if not isinstance(settings, dict):
        raise NopeError(f"{CONFIG} is not a table of settings", where=str(path))
    return settings


def rename_settings(settings: dict[str, Any], where: str) -> dict[str, Any]:
    """Give historical settings their published names and check that none is missing."""
    result = dict(settings)
    for old, names in HISTORICAL_SETTINGS.items():
        if old in settings:
            result = dict.fromkeys(names, settings[old]) | result
    needed = ("embedding_dimensions", "num_q_heads", "num_kv_heads", "num_decoder_layers")
    for name in (*needed, "hidden_ratio"):
        if name not in result:
            raise NopeError(f"{CONFIG} has no {name}: this is not a NoPE GPT", where=where)
    return result


def weight_files(path: Path) -> list[Path]:
    """The files of weights of a model's directory.

    Raises:
        NopeError: The index of several is damaged.
    """
    if (path / WEIGHTS).is_file():
        return [path / WEIGHTS]
    try:
        index = json.loads((path / INDEX).read_text(encoding="utf-8"))
        return [path / Path(name).name for name in sorted(set(index["weight_map"].values()))]
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
    total = sum(file.stat().st_size for file in files if file.is_file()) or 1
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
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise NopeError(
            f"this is not a whole safetensors file: {error}",
            where=str(path),
            hint="download or export the model again",
        ) from None


def translate(tensors: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """Give tensors of any generation the names they have in memory.

    Raises:
        NopeError: A tensor belongs to another network, such as a table of positions.
    """
    published: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for pattern, replacement in HISTORICAL_NAMES:
            name = re.sub(pattern, replacement, name)
        if name.endswith(".stage1.qkv_proj.weight"):
            prefix = name.removesuffix("qkv_proj.weight")
            if tensor.dim() != 2 or tensor.size(0) % 3:
                raise NopeError(f"{name} has shape {tuple(tensor.shape)}", where=where)
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                published[f"{prefix}{part}_proj.weight"] = rows.clone()
        else:
            published[name] = tensor
    if TIED in published:
        embedding = published.pop(TIED)
        head = published.setdefault(TIED_PUBLISHED, embedding)
        if head is not embedding and not torch.equal(head, embedding):
            raise NopeError("the embedding and the head differ, and must be tied", where=where)
    found = (re.match(r"decoder\.layers\.(\d+)", name) for name in published)
    layers = {match[1] for match in found if match}
    ours = {theirs: name for name, theirs in published_names(len(layers)).items()}
    unknown = sorted(published.keys() - ours.keys())
    if unknown:
        positions = any("position" in name for name in unknown)
        reason = "it has positional embeddings" if positions else f"it holds {unknown[0]}"
        raise NopeError(f"this is another network than NoPE GPT: {reason}", where=where)
    return {ours[name]: tensor for name, tensor in published.items()}


def check_shapes(config: ModelConfig, state: dict[str, Tensor], where: str) -> None:
    """Check that every tensor is there and has the shape that the config says."""
    d, kv, hidden = config.embedding_dimensions, config.kv_dimensions, config.hidden_dimensions
    shapes = {
        TIED: (config.vocabulary_size, d),
        "q_proj.weight": (d, d),
        "k_proj.weight": (kv, d),
        "v_proj.weight": (kv, d),
        "out_proj.weight": (d, d),
        "up.weight": (hidden, d),
        "down.weight": (d, hidden),
        "norm.weight": (d,),
    }
    for name in published_names(config.num_decoder_layers):
        if name not in state:
            raise NopeError(f"{CONFIG} asks for {name}, which is not there", where=where)
        expected = next(shape for suffix, shape in shapes.items() if name.endswith(suffix))
        if tuple(state[name].shape) != expected:
            raise NopeError(
                f"{name} has shape {tuple(state[name].shape)}, and {CONFIG} asks for {expected}",
                where=where,
            )
        if state[name].dtype not in DTYPES:
            raise NopeError(f"{name} holds {state[name].dtype}, not weights", where=where)
    extra = sorted(state.keys() - published_names(config.num_decoder_layers).keys())
    if extra:
        raise NopeError(f"{CONFIG} has no place for {extra[0]}", where=where)


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
    names = published_names(model.config.num_decoder_layers)
    tensors = {published: model.state[name].detach() for name, published in names.items()}
    settings: dict[str, Any] = dict(sorted(model.config.as_dict().items()))
    if model.trained_context_length is not None:
        settings["trained_context_length"] = model.trained_context_length
    write_weights(path, tensors, {TIED: TIED_PUBLISHED}, largest_file)
    write_json(path / CONFIG, settings)


def refuse_infinite(state: dict[str, Tensor], where: str) -> None:
    """Refuse weights that are no numbers; names the tensor."""
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


def upload(path: Path, repo_id: str, **options: Any) -> str:
    """Upload a model directory to the Hub, making the repository if need be.

    Args:
        path: The directory.
        repo_id: OWNER/NAME.
        options: `token`, `private`, and what `huggingface_hub.upload_folder` takes.

    Returns:
        The address of the commit.

    Raises:
        UsageError: The repository cannot have that name, or is public and was to be private.
        NetworkError: The Hub cannot be reached, or refuses; the directory stays.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    refuse_name(repo_id)
    private = options.pop("private", None)
    api = HfApi(token=options.pop("token", None))
    try:
        api.create_repo(repo_id, exist_ok=True, private=private)
        if private and not api.repo_info(repo_id).private:
            raise UsageError(
                "this repository is there already, and is public",
                where=repo_id,
                hint="make it private in its settings, or choose another name",
            )
        return str(api.upload_folder(repo_id=repo_id, folder_path=path, **options))
    except HfHubHTTPError as error:
        status = error.response.status_code
        refused = f"the Hub does not let you write here ({status})"
        raise NetworkError(
            refused if status in (401, 403) else f"the upload failed: {error}",
            where=repo_id,
            hint="hf auth login, then try again",
        ) from None
    except (HTTPError, OSError, RuntimeError) as error:  # The last of a file that did not arrive.
        raise NetworkError(
            f"the upload failed: {error}", where=repo_id, hint="hf auth login, then try again"
        ) from None


def refuse_name(repo_id: str) -> None:
    """Refuse what cannot be the name of a repository.

    Raises:
        UsageError: It cannot; says why.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        reason = str(error).rstrip(".")
        raise UsageError(f"{repo_id!r} cannot be a repository: {reason}") from None
