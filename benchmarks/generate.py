"""How fast text comes out: ours beside the peers', and beside what the memory can deliver.

    pip install -e '.[bench]' gguf llama-cpp-python
    python benchmarks/generate.py [--shape 400m|tiny] [--rounds 5] [--steps 16]
        [--case 1x512] [--dtype bfloat16] [--without WAY] [--device cuda] [--d 384] ...

Every way runs the same random weights in a process of its own; a case is a batch and a context,
the tokens in the cache of each row. The processes take turns, round after round. In each of them
a way decodes a few tokens, one at a time, and forgets them; a short prompt it also reads anew,
long ones only once. The tables give medians: of all prompts' times to the first logits, and of
all decoding steps. llama.cpp is there if llama-cpp-python and gguf are installed, on a CPU.

Before anything is timed, the logits of every way, from a cache, must be those of our network
without a cache: in float32 to 1e-4, else by their divergence (KL); a rotation left on moves them
more. For each token all weights are read and the cache of every row; that over the time of a step
is set beside the rate at which all threads, or the GPU, read a big array, the best of several
ways, measured in every round too. Peak memory is that of the process from an empty cache on, with
Python and torch in each of them, or of all tensors on the GPU. The last table tells whether a
token costs more the later it comes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from engines import LlamaCpp, Ours, Transformers, Way, logits_of_sample, network, sample, write_gguf
from torch import Tensor
from torch.nn import functional as F
from train import SHAPES, Worker, forget_peak, hardware, memory, model_config, now

from nope_gpt.amounts import format_bytes

TINY = {"d": 64, "layers": 2, "heads": 4, "kv": 2, "ratio": 4, "vocabulary": 512}
NETWORKS = {"400m": {name: SHAPES["400m"][name] for name in TINY}, "tiny": TINY}
CASES = {"400m": ["1x512", "1x8192", "16x512"], "tiny": ["1x64", "1x256", "4x64"]}

WIDTHS = {"float32": 4, "bfloat16": 2, "int8": 1}
"""Bytes of a weight; llama.cpp's f16 counts as bfloat16, its Q8_0 as int8."""

SHORT = 1024
"""Tokens of a prompt, at most, that is read anew in every round."""

MILESTONES = (100, 1000)
"""Tokens of one generation at which its speed is told, as the median of the 32 around."""


class Entry(NamedTuple):
    """A way: what it is built by, the bytes of a weight, and how far its logits may diverge."""

    build: Callable[[dict[str, int], argparse.Namespace], Way]
    width: int
    divergence: float


def ours(kind: str, shape: dict[str, int], options: argparse.Namespace) -> Way:
    """This project's."""
    return Ours(shape, kind, torch.device(options.device))


def transformers(
    kind: str, is_static: bool, shape: dict[str, int], options: argparse.Namespace
) -> Way:
    """That of Hugging Face transformers."""
    return Transformers(shape, kind, torch.device(options.device), is_static=is_static)


def llama_cpp(kind: str, _shape: dict[str, int], options: argparse.Namespace) -> Way:
    """That of llama.cpp."""
    return LlamaCpp(options.place / f"{kind}.gguf", options.threads)


WAYS: dict[str, Entry] = {
    "nope, float32": Entry(partial(ours, "float32"), 4, 1e-8),
    "nope, bfloat16": Entry(partial(ours, "bfloat16"), 2, 1e-3),
    "nope, int8": Entry(partial(ours, "int8"), 1, 3e-3),
    "transformers, float32": Entry(partial(transformers, "float32", False), 4, 1e-8),
    "transformers, float32, static": Entry(partial(transformers, "float32", True), 4, 1e-8),
    "transformers, bfloat16": Entry(partial(transformers, "bfloat16", False), 2, 1e-3),
    "transformers, bfloat16, static": Entry(partial(transformers, "bfloat16", True), 2, 1e-3),
    "llama.cpp, f16": Entry(partial(llama_cpp, "f16"), 2, 1e-5),
    "llama.cpp, Q8_0": Entry(partial(llama_cpp, "Q8_0"), 1, 3e-3),
}


def say(answer: object) -> None:
    """Answer the process that asked."""
    print(json.dumps(answer), flush=True)


def serve(name: str, options: argparse.Namespace) -> None:
    """Be one way: answer each line on stdin, what to do and with what numbers."""
    shape, rows = options.dimensions, options.dimensions["vocabulary"]
    device = torch.device(options.device)
    if name == "reference":
        model = network(shape)
        if find_spec("llama_cpp") and find_spec("gguf"):
            write_gguf(model, shape["T"], options.place)
        with torch.inference_mode():
            say(model(sample(1, 24, rows))[0, -1].tolist())
        return
    if name == "memory":
        serve_bandwidth(options.threads, device)
        return
    way = WAYS[name].build(shape, options)
    exact = None if way.exact is None else way.exact.tolist()
    say({"exact": exact, "logits": logits_of_sample(way, rows).tolist(), "size": way.size})
    for line in sys.stdin:
        what, *numbers = json.loads(line)
        if what == "read":
            batch, context, room = numbers
            way.begin(context + room, batch)
            forget_peak(device)
            say(seconds_of(partial(way.read, sample(batch, context, rows)), device))
        elif what == "decode":
            batch, count = numbers
            tokens = sample(batch, count, rows).split(1, dim=1)
            say([seconds_of(partial(way.read, each), device) for each in tokens])
            way.forget(count)
        elif what == "generate":
            assert isinstance(way, Ours)
            following = way.generate(*numbers)
            say([seconds_of(partial(next, following), device) for _ in range(*numbers)])
        else:
            say(memory(device))


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """What it takes, until the device has done it."""
    started = now(device)
    work()
    return now(device) - started


def serve_bandwidth(threads: int, device: torch.device) -> None:
    """Answer each line on stdin with the bytes a second at which a big array is read."""
    if device.type != "cpu":
        serve_bandwidth_of_gpu(device)
        return
    array = np.ones(1 << 27, np.uint64)
    floats = array.view(np.float32)
    tensor, pool = torch.from_numpy(floats), ThreadPoolExecutor(threads)
    integers, numbers = np.array_split(array, threads), np.array_split(floats, threads)
    ways: list[Callable[[], object]] = [
        tensor.sum,
        tensor.max,
        lambda: list(pool.map(np.bitwise_or.reduce, integers)),
        lambda: list(pool.map(np.add.reduce, integers)),
        lambda: list(pool.map(np.max, numbers)),
    ]
    say({})
    for _ in sys.stdin:
        say(array.nbytes / min(seconds_of(way, device) for way in ways * 3))


def serve_bandwidth_of_gpu(device: torch.device) -> None:
    """Answer each line on stdin with the bytes a second at which a GPU reads a big array."""
    tensor = torch.ones(1 << 30, device=device)
    say({})
    for _ in sys.stdin:
        taken = min(seconds_of(way, device) for way in [tensor.sum, tensor.max] * 5)
        say(tensor.nbytes / taken)


def measured(shape: dict[str, int], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All ways in turn: the figures of each case, and then those of a long generation."""
    with tempfile.TemporaryDirectory() as place:
        arguments = ["--threads", str(options.threads), "--place", place]
        arguments += ["--device", options.device]
        arguments += ["--dimensions", json.dumps(shape)]
        start = partial(Worker, arguments=arguments, script=__file__)
        reference = start("reference")
        reference.end()
        workers = {way: start(way) for way in chosen(options)}
        compare(workers, torch.tensor(reference.first))
        bandwidth = start("memory")
        for case in options.case:
            yield measured_case(case, workers, bandwidth, options)
        generated = {}
        for way in (way for way in workers if way.startswith("nope")):
            times = workers[way].ask(json.dumps(["generate", MILESTONES[-1] + 16]))
            generated[way] = [statistics.median(times[n - 16 : n + 16]) for n in MILESTONES]
        yield {"generated": generated}
        for worker in (*workers.values(), bandwidth):
            worker.end()


def measured_case(
    case: str, workers: dict[str, Worker], bandwidth: Worker, options: argparse.Namespace
) -> dict[str, Any]:
    """All ways in turn: seconds to the first logits, seconds of a step, and peak memory."""
    batch, context = map(int, case.split("x"))
    reading = json.dumps(["read", batch, context, options.steps])
    decoding = json.dumps(["decode", batch, options.steps])
    first: dict[str, list[float]] = {}
    for way, worker in workers.items():
        first[way] = [worker.ask(reading)]
        print(f"{case}: {way} has read in {first[way][0]:.1f} s", file=sys.stderr)
    is_short = batch * context <= SHORT
    steps: dict[str, list[float]] = {way: [] for way in workers}
    rates = []
    for _ in range(options.rounds):
        rates.append(bandwidth.ask("once"))
        for way, worker in workers.items():
            if is_short:
                first[way].append(worker.ask(reading))
            steps[way] += worker.ask(decoding)
    return {
        "case": case,
        "bandwidth": statistics.median(rates),
        "best_bandwidth": max(rates),
        "ways": {
            way: {
                # The first reading of a short prompt warms up.
                "first": statistics.median(first[way][is_short:]),
                "step": statistics.median(steps[way]),
                "size": worker.first["size"],
                "peak_memory": worker.ask('["memory"]'),
            }
            for way, worker in workers.items()
        },
    }


def chosen(options: argparse.Namespace) -> list[str]:
    """The ways that are wanted and possible."""
    without = set(options.without)
    if options.device != "cpu" or not (find_spec("llama_cpp") and find_spec("gguf")):
        without |= {way for way in WAYS if way.startswith("llama.cpp")}
    widths = {WIDTHS[dtype] for dtype in options.dtype or WIDTHS}
    return [way for way in WAYS if way not in without and WAYS[way].width in widths]


def compare(workers: dict[str, Worker], reference: Tensor) -> None:
    """Stop if a way computes something else than our network does."""
    for way, worker in workers.items():
        exact, logits = (worker.first.pop(name) for name in ("exact", "logits"))
        error = 0.0 if exact is None else float((torch.tensor(exact) - reference).abs().max())
        expected, found = (x.double().log_softmax(0) for x in (reference, torch.tensor(logits)))
        divergence = float(F.kl_div(found, expected, reduction="sum", log_target=True))
        print(f"{way}: largest error in float32 {error:.1e}, KL {divergence:.1e}", file=sys.stderr)
        if not (error <= 1e-4 and divergence <= WAYS[way].divergence):
            raise SystemExit(f"{way} computes another network")


def beside(way: str, peer: str, found: dict[str, dict[str, float]]) -> str:
    """How many times as fast as a peer's fastest way with weights of its width, or the nearest."""
    peers = [other for other in found if other.startswith(peer)]
    if not peers:
        return "–"
    widths = {WAYS[other].width for other in peers}
    width = min(widths, key=lambda each: abs(each - WAYS[way].width))
    step = min(found[other]["step"] for other in peers if WAYS[other].width == width)
    return f"{step / found[way]['step']:.2f}"


def table(shape: dict[str, int], found: dict[str, Any]) -> str:
    """The figures of a case as markdown."""
    batch, context = map(int, found["case"].split("x"))
    config = model_config(shape)
    numbers = batch * context * 2 * config.num_decoder_layers * config.kv_dimensions
    usual, best = (found[name] / 1e9 for name in ("bandwidth", "best_bandwidth"))
    lines = [
        f"Batch {batch}, context {context:,}. The memory reads {usual:.1f} GB/s, {best:.1f} in the "
        "best round.",
        "",
        "| way | first token | tok/s | beside transformers | beside llama.cpp | GB/s | "
        "of the memory's | peak memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for way, figures in found["ways"].items():
        size = figures["size"] + numbers * (4 if WAYS[way].width == 4 else 2)
        rate, peers = size / figures["step"], ("transformers", "llama.cpp")
        comparison = " | ".join(beside(way, peer, found["ways"]) for peer in peers)
        lines.append(
            f"| {way} | {figures['first']:.3f} s | {batch / figures['step']:,.1f} | {comparison} | "
            f"{rate / 1e9:.1f} | {rate / found['bandwidth']:.0%} | "
            f"{format_bytes(figures['peak_memory'])} |"
        )
    return "\n".join(lines)


def flatness(found: dict[str, Any]) -> str:
    """The speed at two places of one generation as markdown."""
    titles = " | ".join(f"tok/s at token {n:,}" for n in MILESTONES)
    lines = [f"| way | {titles} | beside each other |", "|---|---|---|---|"]
    for way, (early, late) in found["generated"].items():
        lines.append(f"| {way} | {1 / early:,.1f} | {1 / late:,.1f} | {early / late:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=NETWORKS, default="400m")
    for name in TINY:
        parser.add_argument(f"--{name}", type=int, help="instead of the shape's")
    parser.add_argument("--case", action="append", help="BATCHxCONTEXT, instead of the shape's")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=16, help="tokens to decode in each round")
    parser.add_argument("--dtype", action="append", choices=WIDTHS, help="only ways of this one")
    parser.add_argument("--without", action="append", default=[], choices=WAYS)
    parser.add_argument("--json", action="store_true", help="a line for each table")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--dimensions", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.way:
        serve(options.way, options)
        return
    options.case = options.case or CASES[options.shape]
    given = {name: getattr(options, name) for name in TINY}
    shape = NETWORKS[options.shape] | {name: n for name, n in given.items() if n is not None}
    longest = max(int(case.split("x")[1]) for case in options.case)
    machine = hardware(options)
    if find_spec("llama_cpp"):
        machine += f", llama-cpp-python {version('llama-cpp-python')}"
    print(
        json.dumps({"hardware": machine, "shape": shape}) if options.json else f"{machine}\n{shape}"
    )
    for found in measured(shape | {"T": longest + options.steps}, options):
        if options.json:
            print(json.dumps(found), flush=True)
        else:
            text = flatness(found) if "generated" in found else table(shape, found)
            print(f"\n{text}", flush=True)


if __name__ == "__main__":
    main()
