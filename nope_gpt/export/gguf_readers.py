"""Reading a GGUF file again: tensor by tensor here, and with llama.cpp if it is installed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nope_gpt import __version__, encodings
from nope_gpt.byte_pairs import SPLITS, merges, spelled, told_apart
from nope_gpt.config import ModelConfig
from nope_gpt.errors import NopeError
from nope_gpt.export.gguf_files import ROUTER, names
from nope_gpt.export.readers import EXACT, OwnReader, Tolerance
from nope_gpt.hub import SavedModel
from nope_gpt.memory import Message
from nope_gpt.model import NoPEGPT
from nope_gpt.tokenization import BaseTokenizer, ChatTokenizer, tokenizer_of
from nope_gpt.transformers_layout import FACTOR

TOLERANCES = {
    "f32": Tolerance(1e-4, 1e-8),
    "f16": Tolerance(None, 1e-3),
    "bf16": Tolerance(None, 1e-3),
    "q8_0": Tolerance(None, 1e-2),
}
"""Of llama.cpp by what matrices are kept in: it rounds activations to the same kind."""

LLAMA_CONTEXT = 512
"""Tokens of context to compare with."""

COARSE = Tolerance(None, 1.0)
"""Of coarser quantizations: what a model loses to them is for its users to judge."""


def tolerance_of(kind: str) -> Tolerance:
    """How far a kind of file may be from its source when llama.cpp computes with it."""
    return TOLERANCES.get(kind, COARSE)


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
        vocabulary_size=len(state["token_embeddings.weight"]),
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


class LlamaCppReader:
    """llama.cpp, by llama-cpp-python, with a cache in float32."""

    def __init__(self, path: Path, kind: str) -> None:
        import llama_cpp

        quiet()
        self.llama: Any = llama_cpp.Llama(
            str(path),
            n_ctx=LLAMA_CONTEXT,
            n_batch=LLAMA_CONTEXT,
            logits_all=True,
            type_k=llama_cpp.GGML_TYPE_F32,
            type_v=llama_cpp.GGML_TYPE_F32,
            n_gpu_layers=0,
            n_threads=os.cpu_count(),
            verbose=False,
        )
        version = importlib.metadata.version("llama-cpp-python")
        self.name = f"llama.cpp (llama-cpp-python {version}) from {path.name}"
        self.tolerance = tolerance_of(kind)

    @staticmethod
    def is_there() -> bool:
        """Whether llama-cpp-python is installed."""
        return importlib.util.find_spec("llama_cpp") is not None

    def logits(self, tokens: Sequence[int]) -> Tensor:
        self.llama.reset()
        self.llama.eval(list(tokens))
        return torch.from_numpy(self.llama.scores[: len(tokens)].copy())

    def continuation(self, tokens: Sequence[int], count: int) -> list[int]:
        self.llama.reset()
        self.llama.eval(list(tokens))
        result: list[int] = []
        for _ in range(count):
            result.append(int(self.llama.scores[self.llama.n_tokens - 1].argmax()))
            self.llama.eval(result[-1:])
        return result

    def tokenize(self, text: str) -> list[int]:
        return list(self.llama.tokenize(text.encode(), special=False))

    def tokenize_prompt(self, messages: list[Message]) -> list[int]:
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        template = self.llama.metadata["tokenizer.chat_template"]
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        text = environment.from_string(template).render(
            messages=messages, add_generation_prompt=True
        )
        return list(self.llama.tokenize(text.encode(), add_bos=False, special=True))


@cache
def quiet() -> Any:
    """Keep llama.cpp from writing to the terminal; what fails raises."""
    import llama_cpp

    callback = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(callback, None)
    return callback  # Which must outlive this call.
