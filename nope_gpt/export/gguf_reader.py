"""Reading a GGUF file again, tensor by tensor."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nope_gpt import __version__
from nope_gpt.config import ModelConfig
from nope_gpt.errors import NopeError
from nope_gpt.export.gguf_files import ROUTER, names
from nope_gpt.export.llama_cpp import tolerance_of
from nope_gpt.export.readers import EXACT, OwnReader
from nope_gpt.hub.published_layout import TIED
from nope_gpt.hub.storage import SavedModel
from nope_gpt.hub.transformers_layout import FACTOR
from nope_gpt.model import NoPEGPT
from nope_gpt.tokenization import BaseTokenizer, ChatTokenizer, encodings, tokenizer_of
from nope_gpt.tokenization.byte_pairs import SPLITS, merges, spelled, told_apart


class GgufReader(OwnReader):
    """The tensors and the vocabulary of a file, computed with by this package."""

    def __init__(self, path: Path, kind: str) -> None:
        from gguf import GGUFReader

        file = GGUFReader(path)
        model = NoPEGPT.from_saved(saved_in(file, str(path)))
        super().__init__(model, tokenizer_in(file, model.vocabulary_size, str(path)))
        version = importlib.metadata.version("gguf")
        self.name = f"nope-gpt {__version__} and gguf {version} from {path.name}"
        self.tolerance = EXACT if kind in ("f32", "f16", "bf16") else tolerance_of(kind)


def value(file: Any, key: str) -> Any:
    """A setting of a file.

    Raises:
        NopeError: It is not there.
    """
    field = file.get_field(key)
    if field is None:
        raise NopeError(f"this GGUF file has no {key}")
    return field.contents()


def saved_in(file: Any, where: str) -> SavedModel:
    """The network in a file, in float32.

    Raises:
        NopeError: It is not what is written here: something turns, gates or is missing.
    """
    from gguf.quants import dequantize

    tensors = {
        tensor.name: torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float()
        for tensor in file.tensors
    }
    width, num_layers = value(file, "llama.embedding_length"), value(file, "llama.block_count")
    is_dense = file.get_field("llama.expert_count") is None
    state = {}
    for ours, theirs in names(num_layers, dense=is_dense).items():
        if theirs not in tensors:
            raise NopeError(f"this GGUF file has no {theirs}", where=where)
        tensor = tensors.pop(theirs)
        state[ours] = tensor.flatten(0, -2) if "_exps" in theirs else tensor
    for name, tensor in tensors.items():
        if not does_nothing(name, tensor):
            raise NopeError(f"{name} of this GGUF file does something", where=where)
    if "rope_freqs.weight" not in tensors:
        raise NopeError("this GGUF file turns queries and keys", where=where)
    config = ModelConfig(
        vocabulary_size=len(state[TIED]),
        embedding_dimensions=width,
        num_q_heads=value(file, "llama.attention.head_count"),
        num_kv_heads=value(file, "llama.attention.head_count_kv"),
        num_decoder_layers=num_layers,
        hidden_ratio=value(file, "llama.feed_forward_length") // width,
    )
    begins = value(file, "tokenizer.ggml.add_bos_token")
    first_token = value(file, "tokenizer.ggml.bos_token_id") if begins else None
    return SavedModel(config, state, None, first_token=first_token)


def does_nothing(name: str, tensor: Tensor) -> bool:
    """Whether a tensor that is none of ours has the value that leaves the others alone."""
    neutral = {
        ROUTER: 0.0,
        "ffn_up": 1.0 if name.endswith("bias") else 0.0,
        "rope_freqs": FACTOR,
    }
    return bool((tensor == neutral.get(name.split(".")[-2], torch.nan)).all())


def tokenizer_in(file: Any, vocabulary_size: int, where: str) -> BaseTokenizer:
    """The tokenizer in a file, which must merge and steer as ours does.

    Raises:
        NopeError: It does not.
    """
    tokens = value(file, "tokenizer.ggml.tokens")
    pairs = [pair.split(" ") for pair in value(file, "tokenizer.ggml.merges")]
    vocabulary = {text: id for id, text in enumerate(tokens)}
    pairs = [pair for pair in pairs if "".join(pair) in vocabulary]
    ranks, others = told_apart(vocabulary, pairs)
    if pairs != [[spelled(left), spelled(right)] for left, right in merges(ranks)]:
        raise NopeError("this GGUF file merges in another order than its ranks", where=where)
    words = value(file, "tokenizer.ggml.pre")
    pattern = next(ours for ours, (_, theirs) in SPLITS.items() if theirs == words)
    added = {text: id for text, id in others.items() if not text.startswith("<|unused_")}
    encoding = encodings.described(ranks, pattern, added, where)
    tokenizer = tokenizer_of(BaseTokenizer(encoding), vocabulary_size)
    if isinstance(tokenizer, ChatTokenizer) and not value(file, "tokenizer.chat_template"):
        raise NopeError("this GGUF file has no chat template", where=where)
    return tokenizer
