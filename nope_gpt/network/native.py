"""Decoding at the speed of the memory on a CPU: a small library, compiled once in the background.

Torch's own product of one row runs on one thread, and Python's time between a hundred small
operations is felt; `native.cpp` reads all weights in one go. It is compiled for this very
processor by the C++ compiler that is there, by a process that outlives this one if need be,
and kept in the user's cache. Until it is there, and where it cannot be, decoding is torch's.

Shapes: M tokens, V vocabulary.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from nope_gpt.errors import NopeError
from nope_gpt.files.places import cache_directory
from nope_gpt.network.caching import KVCache
from nope_gpt.network.embedding import TiedEmbedding
from nope_gpt.network.quantization import Int8Embedding, Int8Linear

SOURCE = Path(__file__).with_suffix(".cpp")
SOURCES = [SOURCE, SOURCE.with_name("native_vectors.h")]
FLAGS = ["-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared"]

MOST_TOKENS = 8
"""With more tokens of a row at a time torch's products of matrices are faster."""

WORTHWHILE_PARAMETERS = 20_000_000
"""Of a model that is worth some seconds of compiling."""

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
"""Of weights, as native.cpp numbers them."""

Address, Number = ctypes.c_void_p, ctypes.c_int64


class Matrix(ctypes.Structure):
    """A weight, and a scale for each row if it holds integers."""

    _fields_ = [("weight", Address), ("scale", Address)]


class Layer(ctypes.Structure):
    """The weights of a block."""

    _fields_ = [
        *[(name, Address) for name in ("attention_norm", "feed_forward_norm")],
        *[(name, Matrix) for name in ("q", "k", "v", "out", "up", "down")],
    ]


class Network(ctypes.Structure):
    """A network's shape and weights."""

    _fields_ = [
        *[(name, Number) for name in ("C", "V", "H", "G", "D", "F", "num_layers", "kind")],
        ("epsilon", ctypes.c_double),
        ("growth", ctypes.c_double),
        ("growth_length", Number),
        ("embedding", Matrix),
        ("norm", Address),
        ("layers", Address),
    ]


class Cache(ctypes.Structure):
    """A cache's memory and sizes."""

    _fields_ = [("memory", Address), *[(x, Number) for x in ("is_half", "num_rows", "capacity")]]


class Token(ctypes.Structure):
    """A token to read: which one, and where its entry goes."""

    _fields_ = [(name, Number) for name in ("id", "row", "slot", "visible")]


class NativeReader:
    """Reads a few tokens at a time through a network on a CPU.

    It uses the weights where they lie; they must stay there.
    """

    def __init__(self, library: ctypes.CDLL, model: Any) -> None:
        self.library = library
        self.kept: list[Any] = []
        config, growth = model.config, model.decoder.growth
        layers = (Layer * config.num_decoder_layers)(*map(self.layer, model.decoder.layers))
        self.kept.append(layers)
        self.vocabulary_size: int = config.vocabulary_size
        self.network = Network(
            C=config.embedding_dimensions,
            V=config.vocabulary_size,
            H=config.num_q_heads,
            G=config.num_kv_heads,
            D=config.head_dimensions,
            F=config.hidden_dimensions,
            num_layers=config.num_decoder_layers,
            kind=KINDS[model.token_embeddings.weight.dtype],
            epsilon=model.norm.eps,
            growth=growth.rate if growth else 0.0,
            growth_length=growth.length if growth else 1,
            embedding=self.matrix(model.token_embeddings),
            norm=self.floats(model.norm.weight),
            layers=ctypes.addressof(layers),
        )

    @classmethod
    def of(cls, model: Any, *, wait: bool = False) -> Self | None:
        """The reader of a model, or None where it is not for it, or not compiled yet.

        Args:
            model: A NoPEGPT.
            wait: Until it is compiled.

        Raises:
            NopeError: It was to be waited for, and cannot be had.
        """
        reason = obstacle(model)
        is_worthwhile = model.num_weights >= WORTHWHILE_PARAMETERS
        library = None if reason else compiled(begin=wait or is_worthwhile, wait=wait)
        if library:
            return cls(library, model)
        if wait:
            raise NopeError(
                f"the native reader cannot be compiled: {reason or complaint()}",
                hint="leave --compile out: torch decodes too, more slowly",
            )
        return None

    def layer(self, block: Any) -> Layer:
        """The weights of a block."""
        attention, feed_forward = block.attention, block.feed_forward
        return Layer(
            attention_norm=self.floats(block.attention_norm.weight),
            feed_forward_norm=self.floats(block.feed_forward_norm.weight),
            q=self.matrix(attention.q_proj),
            k=self.matrix(attention.k_proj),
            v=self.matrix(attention.v_proj),
            out=self.matrix(attention.out_proj),
            up=self.matrix(feed_forward.up),
            down=self.matrix(feed_forward.down),
        )

    def floats(self, weight: Tensor) -> int:
        """The address of a vector in float32, whatever it is kept in."""
        self.kept.append(weight.detach().float().contiguous())
        return int(self.kept[-1].data_ptr())

    def matrix(self, module: Any) -> Matrix:
        """Where a matrix lies."""
        weight: Tensor = module.weight
        scale: Tensor | None = getattr(module, "scale", None)
        self.kept.append(weight)
        scales = None if scale is None else self.floats(scale)
        return Matrix(weight=weight.data_ptr(), scale=scales)

    def can_read(self, cache: KVCache, rows: Sequence[int], num_new: int) -> bool:
        """Whether so many new tokens of each row can be read in one go."""
        if num_new == 1:
            return True
        fits = len(cache.tokens[rows[0]]) + num_new <= cache.capacity
        return len(rows) == 1 and num_new <= MOST_TOKENS and fits

    def read(self, cache: KVCache, rows: Sequence[int], tokens: Tensor, *, every: bool) -> Tensor:
        """Read new tokens into the cache.

        Args:
            cache: Of the model.
            rows: Of the cache, B of them.
            tokens: [B, T].
            every: Whether the logits after every token are wanted, or after the last one.

        Returns:
            Logits [B * T, V] of every token, or [B, V] of the last ones.
        """
        num_new = tokens.size(1)
        starts = [len(cache.tokens[row]) for row in rows]
        cache.reserve(max(starts) + num_new)
        new = [
            Token(
                id=id,
                row=row,
                slot=cache.slot(start + i),
                visible=min(start + i + 1, cache.capacity),
            )
            for row, start, ids in zip(rows, starts, tokens.tolist(), strict=True)
            for i, id in enumerate(ids)
        ]
        count = len(new)
        first = 0 if every or num_new == 1 else count - 1
        logits = torch.empty(count - first, self.vocabulary_size)
        memory = cache.memory
        place = Cache(
            memory=memory.data_ptr(),
            is_half=memory.dtype == torch.bfloat16,
            num_rows=cache.num_rows,
            capacity=cache.num_allocated,
        )
        self.library.decode(
            ctypes.byref(self.network),
            ctypes.byref(place),
            (Token * count)(*new),
            count,
            first,
            logits.data_ptr(),
            torch.get_num_threads(),
        )
        return logits


def obstacle(model: Any) -> str | None:
    """Why a model cannot be decoded by the library, or None."""
    if model.device.type != "cpu":
        return "it is for CPUs"
    kinds = {nn.Linear, TiedEmbedding, Int8Linear, Int8Embedding}
    holders = [m for m in model.modules() if isinstance(getattr(m, "weight", None), Tensor)]
    matrices = [m for m in holders if m.weight.dim() == 2]
    if not {type(module) for module in matrices} <= kinds:
        return "the model has adapters"
    dtypes = {module.weight.dtype for module in matrices}
    if len(dtypes) != 1 or not dtypes <= KINDS.keys():
        return "it is for float32, bfloat16 and int8"
    if not all(module.weight.is_contiguous() for module in matrices):
        return "a matrix is not contiguous"
    return None


def compiler() -> str | None:
    """The C++ compiler of this machine."""
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")


@functools.cache
def place() -> Path | str:
    """Where the library of this machine is, or will be; or why it cannot be."""
    if sys.platform == "win32":
        return "it is not for Windows"
    found = compiler()
    if found is None:
        return "there is no C++ compiler (apt install g++)"
    version = subprocess.run([found, "--version"], capture_output=True, check=False).stdout
    code = [source.read_bytes() for source in SOURCES]
    identity = [*code, version, " ".join([found, *FLAGS]).encode(), processor()]
    name = hashlib.sha256(b"\0".join(identity)).hexdigest()[:16]
    try:
        return cache_directory() / f"native-{name}.so"
    except RuntimeError:
        return "there is no home directory to keep it in (set HOME, or XDG_CACHE_HOME)"


def processor() -> bytes:
    """What -march=native follows."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return platform.processor().encode()
    return b"\n".join(sorted({x for x in lines if x.startswith((b"flags", b"Features"))}))


def compiled(*, begin: bool = False, wait: bool = False) -> ctypes.CDLL | None:
    """The library, if it is compiled.

    Args:
        begin: Begin to compile it otherwise, in the background.
        wait: Until that is over.
    """
    path = place()
    if isinstance(path, str):
        return None
    library = loaded(path)
    if library is None and begin and not log_of(path).is_file():
        process = compile_beside(path)
        if process and wait:
            process.wait()
        library = loaded(path)
    return library


def loaded(path: Path) -> ctypes.CDLL | None:
    """The library, if it is there; one that was cut short, as by a loss of power, is removed."""
    try:
        return load(path) if path.is_file() else None
    except OSError:
        path.unlink(missing_ok=True)
        return None


@functools.cache
def load(path: Path) -> ctypes.CDLL:
    """Load the library."""
    library = ctypes.CDLL(str(path))
    pointers = [ctypes.c_void_p] * 3
    library.decode.argtypes = [*pointers, Number, Number, Address, Number]
    library.decode.restype = None
    return library


@functools.cache
def compile_beside(path: Path) -> subprocess.Popen[bytes] | None:
    """Begin to compile, once, in a process that goes on when this one ends.

    The library, or the log of a failure, appears whole by a rename.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    temporary = f"{path}.{os.getpid()}-{time.time_ns()}"
    command = shlex.join([str(compiler()), *FLAGS, "-o", temporary, str(SOURCE)])
    log, final = shlex.quote(f"{temporary}.log"), shlex.quote(str(log_of(path)))
    script = (
        f"if {command} 2> {log}; then mv {shlex.quote(temporary)} {shlex.quote(str(path))}; "
        f"rm {log}; else mv {log} {final}; fi"
    )
    return subprocess.Popen(
        ["/bin/sh", "-c", script],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def log_of(path: Path) -> Path:
    """What the compiler said when it failed."""
    return path.with_suffix(".log")


def complaint() -> str:
    """Why there is no library."""
    path = place()
    if isinstance(path, str):
        return path
    try:
        lines = log_of(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return f"{path.parent} cannot be written"
    return next((line for line in lines if "error" in line), "the compiler failed")
