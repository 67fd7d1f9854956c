"""llama.cpp itself, where it is installed: it reads a file again, and makes it coarser."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nope_gpt.errors import NopeError
from nope_gpt.export.readers import Tolerance
from nope_gpt.memory import Message

QUANTIZER = "pip install llama-cpp-python, or put llama.cpp's llama-quantize on the PATH"

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


def quantizations() -> list[str]:
    """What llama.cpp's quantizer makes of a model by itself, in small letters."""
    from gguf import LlamaFileType

    names = (kind.name.removeprefix("MOSTLY_").lower() for kind in LlamaFileType)
    return sorted(name for name in names if name.startswith(("q2", "q3", "q4", "q5", "q6")))


Quantizer = Callable[[Path, Path, str], None]


def find_quantizer() -> Quantizer | None:
    """llama.cpp's quantizer: its library's, or its program's."""
    if importlib.util.find_spec("llama_cpp") is not None:
        return quantize_by_library
    program = shutil.which("llama-quantize")
    return None if program is None else partial(quantize_by_program, program)


def quantize(source: Path, path: Path, name: str) -> None:
    """Have llama.cpp write a file again with a quantization.

    Raises:
        NopeError: It failed.
    """
    quantizer = find_quantizer()
    assert quantizer is not None
    quantizer(source, path, name)
    if not path.is_file():
        raise NopeError(f"llama.cpp could not quantize to {name}", where=str(path))


def quantize_by_library(source: Path, path: Path, name: str) -> None:
    """By llama-cpp-python."""
    import llama_cpp
    from gguf import LlamaFileType

    quiet()
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = int(LlamaFileType[f"MOSTLY_{name.upper()}"])
    if llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), settings):
        raise NopeError(f"llama.cpp could not quantize to {name}", where=str(path))


def quantize_by_program(program: str, source: Path, path: Path, name: str) -> None:
    """By llama-quantize."""
    done = subprocess.run(  # noqa: S603
        [program, str(source), str(path), name.upper()], capture_output=True, check=False
    )
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        reason = (lines or ["no reason given"])[-1]
        raise NopeError(f"llama-quantize failed: {reason}", where=str(path))
