"""One network as each library runs it: ours, transformers, llama.cpp.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from train import arcee, seeded

from nope_gpt.export import gguf_files
from nope_gpt.model import NoPEGPT
from nope_gpt.network.caching import KVCache

CPU = torch.device("cpu")

LLAMA_CPP_ERROR = 4
"""GGML_LOG_LEVEL_ERROR of ggml.h."""


def network(shape: dict[str, int]) -> NoPEGPT:
    """The weights of every way."""
    model = seeded(shape)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.02, generator=generator)
    return model.eval()


def prepared(model: NoPEGPT, kind: str) -> NoPEGPT:
    """Our network as `--dtype` would load it."""
    if kind == "int8":
        return model.quantize(torch.bfloat16)
    return model.to(getattr(torch, kind))


def empty_cache(model: NoPEGPT, capacity: int, batch: int) -> KVCache:
    """Our cache, for decoding by the compiled code."""
    return model.new_cache(capacity, batch, compile="on")


def predicted(model: NoPEGPT, cache: KVCache, tokens: Tensor) -> Tensor:
    """Our logits [B, V] after new tokens [B, T]."""
    return model.predict(tokens, cache)


def shortened(cache: KVCache, length: int) -> None:
    """Our cache without what follows so many tokens."""
    for row in range(cache.num_rows):
        cache.truncate(row, length)


def generation(model: NoPEGPT, count: int) -> Iterator[object]:
    """Our tokens, drawn one after another."""
    return model.generate(torch.zeros(1, dtype=torch.long), max_tokens=count)


class Way(Protocol):
    """A network that reads tokens into a cache.

    Attributes:
        size: Bytes of its weights.
        exact: Its logits [V] for the sample in float32, if it can have them.
    """

    size: int
    exact: Tensor | None

    def begin(self, capacity: int, batch: int) -> None:
        """Have an empty cache."""
        ...

    def read(self, tokens: Tensor) -> Tensor:
        """Read tokens [B, T]; returns the logits [B, V] after the last ones."""
        ...

    def forget(self, count: int) -> None:
        """Take the last tokens out of the cache."""
        ...


def logits_of_sample(way: Way, vocabulary_size: int) -> Tensor:
    """The logits [V] after a short text, of which the last token is read alone."""
    tokens = sample(1, 24, vocabulary_size)
    way.begin(24, 1)
    way.read(tokens[:, :-1])
    return way.read(tokens[:, -1:])[0].float()


def sample(batch: int, length: int, vocabulary_size: int) -> Tensor:
    """Random tokens [B, T], the same ones each time."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, vocabulary_size, (batch, length), generator=generator)


def bytes_of(tensors: Iterator[Tensor]) -> int:
    """What tensors take, each counted once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


class Ours:
    """This project's."""

    def __init__(self, shape: dict[str, int], kind: str, device: torch.device = CPU) -> None:
        self.device = device
        self.model = prepared(network(shape), "float32").to(device)
        self.exact = logits_of_sample(self, shape["vocabulary"])
        self.model = prepared(self.model, kind)
        self.size = bytes_of(iter(self.model.state_dict().values()))

    def begin(self, capacity: int, batch: int) -> None:
        self.cache: KVCache | None = None
        self.cache = empty_cache(self.model, capacity, batch)

    def read(self, tokens: Tensor) -> Tensor:
        assert self.cache
        return predicted(self.model, self.cache, tokens.to(self.device))

    def forget(self, count: int) -> None:
        assert self.cache
        shortened(self.cache, len(self.cache.tokens[0]) - count)

    def generate(self, count: int) -> Iterator[object]:
        """Tokens drawn one after another."""
        return generation(self.model, count)


class Transformers:
    """Hugging Face transformers, with its cache that grows or the one that does not."""

    def __init__(
        self, shape: dict[str, int], kind: str, device: torch.device = CPU, *, is_static: bool
    ) -> None:
        self.is_static = is_static
        self.device = device
        self.model = arcee(network(shape), shape["T"]).eval().to(device)
        assert self.model.config._attn_implementation == "sdpa"
        self.exact = logits_of_sample(self, shape["vocabulary"])
        self.model.to(getattr(torch, kind))
        self.size = bytes_of(self.model.parameters())

    def begin(self, capacity: int, batch: int) -> None:  # noqa: ARG002
        from transformers import DynamicCache, StaticCache

        config = self.model.config
        self.cache: Any = None
        if self.is_static:
            self.cache = StaticCache(config=config, max_cache_len=capacity)
        else:
            self.cache = DynamicCache(config=config)

    @torch.inference_mode()
    def read(self, tokens: Tensor) -> Tensor:
        tokens = tokens.to(self.device)
        found = self.model(input_ids=tokens, cache=self.cache, use_cache=True, logits_to_keep=1)
        result: Tensor = found.logits[:, -1]
        return result

    @torch.inference_mode()
    def forget(self, count: int) -> None:
        self.cache.crop(-count)


class LlamaCpp:
    """llama.cpp by its own interface, with its own defaults and no cache of floats."""

    exact = None

    def __init__(self, file: Path, threads: int) -> None:
        self.api = quiet_llama_cpp()
        settings = self.api.llama_model_default_params()
        self.model = self.api.llama_model_load_from_file(str(file).encode(), settings)
        self.size = self.api.llama_model_size(self.model)
        vocabulary = self.api.llama_model_get_vocab(self.model)
        self.vocabulary_size = self.api.llama_vocab_n_tokens(vocabulary)
        self.threads, self.context = threads, None

    def begin(self, capacity: int, batch: int) -> None:
        if self.context:
            self.api.llama_free(self.context)
            self.api.llama_batch_free(self.batch)
        settings = self.api.llama_context_default_params()
        # A row's share is a multiple of 256.
        settings.n_ctx = batch * -(-capacity // 256) * 256
        settings.n_seq_max = batch
        settings.n_threads = settings.n_threads_batch = self.threads
        self.context = self.api.llama_init_from_model(self.model, settings)
        self.most = self.api.llama_n_batch(self.context)
        self.batch = self.api.llama_batch_init(self.most, 0, 1)
        self.length = 0

    def read(self, tokens: Tensor) -> Tensor:
        num_rows, count = tokens.shape
        flat = [
            (id, row, self.length + i)
            for row, ids in enumerate(tokens.tolist())
            for i, id in enumerate(ids)
        ]
        self.length += count
        found = []
        for first in range(0, len(flat), self.most):
            found += self.decode(flat[first : first + self.most])
        return torch.from_numpy(np.stack(found)).view(num_rows, self.vocabulary_size)

    def decode(self, tokens: list[tuple[int, int, int]]) -> list[np.ndarray]:
        """Read some tokens: which, in which row and where; the logits after the last of a row."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        ends = []
        for i, (id, row, position) in enumerate(tokens):
            batch.token[i], batch.pos[i] = id, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
            batch.logits[i] = position == self.length - 1
            if batch.logits[i]:
                ends.append(i)
        if self.api.llama_decode(self.context, batch):
            raise SystemExit("llama_decode failed")
        addresses = [self.api.llama_get_logits_ith(self.context, i) for i in ends]
        return [np.ctypeslib.as_array(x, (self.vocabulary_size,)).copy() for x in addresses]

    def forget(self, count: int) -> None:
        self.length -= count
        kept = self.api.llama_get_memory(self.context)
        self.api.llama_memory_seq_rm(kept, -1, self.length, -1)


def quiet_llama_cpp() -> Any:
    """The library, which tells only of errors."""
    import llama_cpp

    @llama_cpp.llama_log_callback
    def log(level: int, text: bytes, _: object) -> None:
        # The package's own filter takes one level for another.
        if level == LLAMA_CPP_ERROR:
            sys.stderr.write(text.decode(errors="replace"))

    llama_cpp.log_that_is_called = log
    llama_cpp.llama_log_set(log, None)
    llama_cpp.llama_backend_init()
    return llama_cpp


def write_gguf(model: NoPEGPT, length: int, place: Path) -> None:
    """Write f16.gguf and Q8_0.gguf as `nope export` does, but without a vocabulary."""
    from gguf import GGMLQuantizationType, GGUFWriter

    for kind, name in ((GGMLQuantizationType.F16, "f16"), (GGMLQuantizationType.Q8_0, "Q8_0")):
        writer = GGUFWriter(place / f"{name}.gguf", "llama")
        writer.add_tokenizer_model("none")
        gguf_files.write_settings(writer, model.config, length + 256, dense=False)
        gguf_files.write_tensors(writer, model.saved(), kind, dense=False)
        gguf_files.finish(writer)
