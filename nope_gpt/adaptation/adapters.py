"""Adapters on disk, in the layout of PEFT, and folded into a model.

An adapter is two files in a directory, `adapter_config.json` and `adapter_model.safetensors`.
The names in it are those that transformers gives the same network, so PEFT loads it onto a model
that was exported for transformers. The header of the tensors' file says which weights it is for,
and which ones it makes of them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from nope_gpt.adaptation import lora
from nope_gpt.config import CONTROL_TOKENS
from nope_gpt.errors import MissingError, NopeError, UsageError
from nope_gpt.files.json_files import DAMAGE, read_json
from nope_gpt.files.writing import write_json, write_tensors
from nope_gpt.hub import storage
from nope_gpt.hub.locating import locate
from nope_gpt.hub.published_layout import TIED
from nope_gpt.hub.storage import SavedModel
from nope_gpt.hub.transformers_layout import MATRICES

SETTINGS = "adapter_config.json"
TENSORS = "adapter_model.safetensors"

PREFIX = "base_model.model.model."
OWN_ROWS = "token_embeddings.rows"
ROWS = f"{PREFIX}embed_tokens.token_adapter.trainable_tokens_delta"
EMBEDDING = f"{PREFIX}embed_tokens.weight"
HEAD = "base_model.model.lm_head.weight"
PARTS = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}


@dataclass(frozen=True)
class Adapter:
    """What tuning changes of a model.

    Attributes:
        tensors: By their names in memory: `lora_a` and `lora_b` beside matrices, `rows` or
            `weight` of the embedding.
        alpha: Strength.
        dropout: It was trained with.
        base: What it was trained on, for people.
        base_sha256: Of that model's file of weights.
        makes_sha256: Of the file with the adapter folded in, "" if there is none.
        vocabulary_size: With it.
    """

    tensors: dict[str, Tensor]
    alpha: float
    dropout: float
    base: str
    base_sha256: str
    makes_sha256: str
    vocabulary_size: int

    @property
    def rank(self) -> int:
        return next(len(x) for name, x in self.tensors.items() if name.endswith("lora_a"))


def save(path: Path, adapter: Adapter) -> None:
    """Write an adapter into a directory."""
    rows = adapter.tensors.get(OWN_ROWS)
    last = range(
        adapter.vocabulary_size - (0 if rows is None else len(rows)), adapter.vocabulary_size
    )
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha * adapter.rank,
        "lora_dropout": adapter.dropout,
        "bias": "none",
        "target_modules": sorted(name.rpartition(".")[2] for name in MATRICES.values()),
        "modules_to_save": ["embed_tokens"] if TIED in adapter.tensors else None,
        "ensure_weight_tying": True,  # The head is the embedding, whatever is trained of it.
        "trainable_token_indices": None if rows is None else {"embed_tokens": list(last)},
    }
    header = {
        "format": "pt",
        "base_sha256": adapter.base_sha256,
        "makes_sha256": adapter.makes_sha256,
        "vocabulary_size": str(adapter.vocabulary_size),
    }
    tensors = {theirs(name): tensor.contiguous() for name, tensor in adapter.tensors.items()}
    if EMBEDDING in tensors:  # PEFT looks for both of what is tied.
        tensors[HEAD] = tensors[EMBEDDING].clone()
    write_tensors(path / TENSORS, tensors, metadata=header)
    write_json(path / SETTINGS, settings)


def load(path: Path) -> Adapter:
    """Read an adapter from a directory.

    Raises:
        MissingError: There is none.
        NopeError: It is damaged, or of another network.
    """
    file = path / TENSORS
    if not file.is_file():
        raise MissingError(
            "there is no adapter",
            where=str(path),
            hint="give a run of `nope tune` without --full, or a checkpoint of one",
        )
    try:
        settings = read_json(path / SETTINGS)
        with storage.opened(file) as opened:
            header = opened.metadata() or {}
            names = sorted(set(opened.keys()) - {HEAD})
            tensors = {ours(name): opened.get_tensor(name) for name in names}
        return Adapter(
            tensors=tensors,
            alpha=settings["lora_alpha"] / settings["r"],
            dropout=float(settings["lora_dropout"]),
            base=str(settings["base_model_name_or_path"]),
            base_sha256=header["base_sha256"],
            makes_sha256=header["makes_sha256"],
            vocabulary_size=int(header["vocabulary_size"]),
        )
    except NopeError as error:
        raise NopeError(f"this adapter cannot be read: {error.what}", where=str(path)) from None
    except DAMAGE as error:
        reason = f"{type(error).__name__}: {error}"
        raise NopeError(f"this adapter cannot be read ({reason})", where=str(path)) from None


def place_of(name: str) -> Path:
    """The directory of the adapter that a run, a checkpoint or a directory of its own has."""
    path = Path(name).expanduser()
    return path if (path / TENSORS).is_file() else locate(name)


def theirs(name: str) -> str:
    """A tensor's name in PEFT's layout."""
    if name == TIED:
        return EMBEDDING
    if name == OWN_ROWS:
        return ROWS
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(\w+\.\w+)\.(\w+)", name)
    assert match is not None
    return f"{PREFIX}layers.{match[1]}.{MATRICES[match[2]]}.{PARTS[match[3]]}"


def ours(name: str) -> str:
    """A tensor's name in memory, from PEFT's layout.

    Raises:
        KeyError: It belongs to another network.
    """
    if name in (EMBEDDING, ROWS):
        return TIED if name == EMBEDDING else OWN_ROWS
    modules = {theirs: own for own, theirs in MATRICES.items()}
    parts = {theirs: own for own, theirs in PARTS.items()}
    pattern = rf"{re.escape(PREFIX)}layers\.(\d+)\.(\w+\.\w+)\.(lora_[AB]\.weight)"
    match = re.fullmatch(pattern, name)
    if match is None:
        raise KeyError(name)
    return f"decoder.layers.{match[1]}.{modules[match[2]]}.{parts[match[3]]}"


def folded(model: SavedModel, directory: Path, adapters: Sequence[Path]) -> SavedModel:
    """A model with adapters folded in, one after the other.

    Args:
        model: To begin with.
        directory: Where it was read from.
        adapters: Each of this model, or of what the one before makes of it.

    Raises:
        UsageError: One is for other weights; names both.
        NopeError: One is damaged.
    """
    known = [storage.digest(directory)] if adapters else []
    for path in adapters:
        adapter = load(path)
        if adapter.base_sha256 not in known:
            raise UsageError(
                f"this adapter was trained on other weights, {adapter.base}, than those of "
                f"{directory}",
                where=str(path),
                hint="give the model that it was tuned from as --model, and of several adapters "
                "the older ones first",
            )
        known.append(adapter.makes_sha256)
        model = with_adapter(model, adapter)
    return replace(model, first_token=None, sharpenings={}) if adapters else model


def with_adapter(model: SavedModel, adapter: Adapter) -> SavedModel:
    """A model with one adapter folded in, and with the rows of its new tokens.

    Raises:
        NopeError: It is for a model of another shape.
    """
    state = dict(model.state)
    missing = adapter.vocabulary_size - len(state[TIED])
    if missing > len(CONTROL_TOKENS):
        raise NopeError(f"the adapter is for {missing:,} tokens more than the model has")
    if missing > 0:
        state[TIED] = torch.cat([state[TIED], state[TIED].new_zeros(missing, state[TIED].size(1))])
    config = model.config.changed(vocabulary_size=len(state[TIED]))
    try:
        state = lora.merged(state, adapter.tensors, adapter.alpha)
    except (LookupError, RuntimeError) as error:
        raise NopeError(f"the adapter does not fit the model: {error}") from None
    return replace(model, config=config, state=state)
