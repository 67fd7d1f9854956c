"""Reading the `.pt` checkpoints of the old training scripts, and nothing else that is pickled.

torch's restricted unpickler builds tensors and plain containers only; a file that asks
for anything more is refused.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nope_gpt.amounts import format_bytes
from nope_gpt.errors import NopeError, UsageError
from nope_gpt.files.json_files import DAMAGE
from nope_gpt.hub import published_layout, storage
from nope_gpt.hub.storage import SavedModel
from nope_gpt.tokenization import BaseTokenizer

ADAPTED = re.compile(r"(.+)\.parametrizations\.weight\.(original|0\.lora_a|0\.lora_b)$")


def read_checkpoint(path: Path) -> tuple[SavedModel, BaseTokenizer]:
    """Read the model and the tokenizer of a checkpoint, its adapters folded in.

    Raises:
        NopeError: The file is damaged, asks for code to be run, or is not a checkpoint.
        UsageError: It is a file of weights, and the directory is meant.
    """
    where = str(path)
    if path.suffix in (".safetensors", ".gguf"):
        raise UsageError(
            f"this is a {path.suffix} file, and a model is a directory",
            where=where,
            hint=f"nope export --model {path.parent}",
        )
    try:
        record = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise NopeError(f"this file cannot be read: {error.strerror}", where=where) from None
    except Exception as error:  # What is no pickle can fail in any way.
        asks = re.search(r"Unsupported (?:global|class)[^\n]*", str(error))
        what = f"cannot be read without running code from it: {asks[0]}" if asks else "is damaged"
        reason = "" if asks else f", or is none ({type(error).__name__})"
        raise NopeError(f"this checkpoint {what}{reason}", where=where) from None
    if not isinstance(record, dict) or not {"model", "model_args"} <= record.keys():
        raise NopeError("this is not a checkpoint of the training scripts", where=where)
    try:
        settings = published_layout.rename_settings(dict(record["model_args"]), where)
        tensors = {key: value for key, value in record["model"].items() if torch.is_tensor(value)}
        refuse_larger(tensors, path.stat().st_size)
        alpha = float(record.get("lora_args", {}).get("alpha", 1.0))
        state = published_layout.translate(fold_adapters(tensors, alpha), where)
        name = str(record.get("tokenizer_args", {}).get("name", "r50k_base"))
    except (*DAMAGE, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise NopeError(f"this checkpoint is damaged ({reason})", where=where) from None
    return storage.assemble(settings, state, where), BaseTokenizer.from_tiktoken(name)


def refuse_larger(tensors: dict[str, Tensor], size: int) -> None:
    """Refuse a tensor of more bytes than its file: a few numbers, said to be many.

    Raises:
        ValueError: There is one; names it.
    """
    for name, tensor in tensors.items():
        if tensor.nbytes > size:
            raise ValueError(f"{name} would take {format_bytes(tensor.nbytes)}")


def fold_adapters(tensors: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """Replace each adapted weight and its adapter by W + alpha * B @ A."""
    result: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        if match := ADAPTED.match(name):
            parts.setdefault(match[1], {})[match[2].removeprefix("0.")] = tensor
        else:
            result[name] = tensor
    for name, part in parts.items():
        weight: Tensor = part["original"]
        if "lora_a" in part:
            weight = weight + alpha * (part["lora_b"] @ part["lora_a"])
        result[f"{name}.weight"] = weight
    return result
