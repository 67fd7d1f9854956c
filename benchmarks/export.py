"""What each export weighs, how near it is to its source, and how fast llama.cpp runs it.

    pip install -e '.[bench,gguf]' llama-cpp-python
    python benchmarks/export.py [--model DIR] [--rounds 5] [--tokens 24] [--place DIR]

Without a model it is one of the published chat model's shape (408,450,560 weights) whose random
attention is sharp enough to tell one position from another; such weights are the hardest to round,
so judge quantizations on a trained model. Every format is written by `nope export`, whose gate
compares it with its source in the real library: the tables give its reports. Of GGUF, the form of
one expert and the dense form are run by llama.cpp in turns, round after round: the speed is that
of one row which decodes after 64 tokens, a median over the rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from train import hardware

from nope_gpt.amounts import format_bytes
from nope_gpt.config import ExportConfig
from nope_gpt.export.exporting import export
from nope_gpt.model import NoPEGPT
from nope_gpt.tokenization import BaseTokenizer

CHAT_400M = (50261, 1280, 20, 5, 20, 4)
PROMPT = 64

EXPORTS: list[tuple[str, dict[str, Any]]] = [
    ("hub", {"format": "hub"}),
    ("transformers", {"format": "transformers"}),
    ("transformers, bfloat16", {"format": "transformers", "dtype": "bfloat16"}),
    ("llama", {"format": "llama"}),
    ("gguf f32", {"format": "gguf"}),
    ("gguf f16", {"format": "gguf", "dtype": "float16"}),
    ("gguf f16, dense", {"format": "gguf", "dtype": "float16", "dense": True}),
    ("gguf q8_0", {"format": "gguf", "quantize": "q8_0"}),
    ("gguf q8_0, dense", {"format": "gguf", "quantize": "q8_0", "dense": True}),
    ("gguf q4_k_m", {"format": "gguf", "quantize": "q4_k_m"}),
    ("gguf q4_k_m, dense", {"format": "gguf", "quantize": "q4_k_m", "dense": True}),
]


def random_model(place: Path) -> Path:
    """A chat model of the published shape, its attention sharp."""
    torch.manual_seed(0)
    model = NoPEGPT(*CHAT_400M)
    with torch.no_grad():
        for layer in model.decoder.layers:
            layer.attention.q_proj.weight.mul_(4)
    model.save_pretrained(place)
    BaseTokenizer.from_tiktoken("r50k_base").save(place)
    return place


def size_of(path: Path) -> int:
    """Bytes of the weights."""
    return sum(file.stat().st_size for file in path.iterdir() if file.suffix in WEIGHTS)


WEIGHTS = (".safetensors", ".gguf")


def speeds(files: dict[str, Path], rounds: int, count: int) -> dict[str, list[float]]:
    """Tokens a second of each GGUF file, round after round."""
    import llama_cpp

    from nope_gpt.export.llama_cpp import quiet

    quiet()
    opened = {
        name: llama_cpp.Llama(str(path), n_ctx=512, n_threads=os.cpu_count(), verbose=False)
        for name, path in files.items()
    }
    found: dict[str, list[float]] = {name: [] for name in files}
    for _ in range(rounds + 1):
        for name, llama in opened.items():
            llama.reset()
            llama.eval(list(range(100, 100 + PROMPT)))
            begun = time.perf_counter()
            for token in range(count):
                llama.eval([200 + token])
            found[name].append(count / (time.perf_counter() - begun))
    return {name: values[1:] for name, values in found.items()}


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--place", type=Path)
    parser.set_defaults(device="cpu", threads=os.cpu_count())
    arguments = parser.parse_args()
    libraries = (f"{name} {version(name)}" for name in ("gguf", "llama-cpp-python"))
    print(hardware(arguments), *libraries, sep=", ")
    with tempfile.TemporaryDirectory() as temporary:
        place = arguments.place or Path(temporary)
        model = arguments.model or str(random_model(place / "source"))
        print("\n| export | weights | seconds | read by | largest error | largest logit | KL | "
              "likeliest | greedy | texts |")  # fmt: skip
        print("|---|---|---|---|---|---|---|---|---|---|")
        files = {}
        for name, settings in EXPORTS:
            begun = time.perf_counter()
            output = str(place / name.replace(" ", "-").replace(",", ""))
            made = export(ExportConfig(model=model, output=output, overwrite=True, **settings))[0]
            seconds = time.perf_counter() - begun
            for report in made.record.reports:
                reader = report.read_by.partition(" from ")[0]
                print(
                    f"| {name} | {format_bytes(size_of(made.path))} | {seconds:.0f} | {reader} | "
                    f"{report.largest_error:.1e} | {report.largest_logit:.1f} | "
                    f"{report.divergence:.1e} | {report.likeliest:.1%} | {report.continued}/24 | "
                    f"{report.texts}/{report.num_texts} |",
                    flush=True,
                )
            if settings["format"] == "gguf" and name != "gguf f32":
                files[name] = next(made.path.glob("*.gguf"))
        found = speeds(files, arguments.rounds, arguments.tokens)
    print("\n| gguf | tok/s, median (lowest to highest) |")
    print("|---|---|")
    for name, values in found.items():
        print(
            f"| {name} | {statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f}) |"
        )


if __name__ == "__main__":
    main()
