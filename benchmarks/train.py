"""How fast a training step is: ours beside the peers', and beside the hardware's own rate.

    pip install -e '.[bench]'
    python benchmarks/train.py [--shape small|vocabulary|400m] [--device cuda] [--rounds 5]
        [--steps 3] [--d 384] [--layers 6] ...

Every way trains the same network on the same micro-batch in a process of its own: forward,
backward, clipping, fused AdamW. The processes take turns, round after round, and the table
gives medians over all steps; first steps, with their compilation, are not counted, but told.
Before the first step, the loss of every way in float32 must be ours to 1e-4 on the same weights
and batch; a rotation left on, or another activation, moves it more. The first step must then have
our loss and our gradient norm as near as its precision allows. The rate of the hardware is that
of bare matrix products on the shapes of the network, forward and back, weighted by their
operations. Peak memory is that of a warm step: of the process on a CPU, less what it took before
its first step, so without the weights; of all tensors on a GPU.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nope_gpt.amounts import format_bytes
from nope_gpt.config import ModelConfig, PretrainConfig
from nope_gpt.device import autocast, reuse_freed_memory
from nope_gpt.hub import transformers_layout
from nope_gpt.model import NoPEGPT
from nope_gpt.sizing.arithmetic import count_parameters, training_flops_per_token
from nope_gpt.training import compilation
from nope_gpt.training.compilation import obstacle
from nope_gpt.training.optimization import make_optimizers

SMALL = {"d": 384, "layers": 6, "heads": 6, "kv": 2, "ratio": 4, "vocabulary": 4096}
SMALL |= {"T": 256, "B": 16}
SHAPES: dict[str, dict[str, int]] = {
    "small": SMALL,
    "vocabulary": SMALL | {"vocabulary": 50257},
    "400m": SMALL
    | {"d": 1280, "layers": 20, "heads": 20, "kv": 5, "vocabulary": 50257}
    | {"T": 4096, "B": 4},
}

Step = Callable[[Tensor, Tensor], Tensor]


def model_config(shape: dict[str, int]) -> ModelConfig:
    """Our config of a shape."""
    return ModelConfig(
        vocabulary_size=shape["vocabulary"],
        embedding_dimensions=shape["d"],
        num_q_heads=shape["heads"],
        num_kv_heads=shape["kv"],
        num_decoder_layers=shape["layers"],
        hidden_ratio=shape["ratio"],
    )


def seeded(shape: dict[str, int]) -> NoPEGPT:
    """Our network, with the weights that every way begins with."""
    torch.manual_seed(0)
    return NoPEGPT.from_config(model_config(shape))


def ours(shape: dict[str, int], device: torch.device, *, compiled: bool) -> tuple[nn.Module, Step]:
    """This project's model, loss and settings of the process."""
    reuse_freed_memory()
    model = seeded(shape).to(device)
    if compiled:
        compilation.begin(model)
    return model, lambda tokens, targets: model(tokens, targets) / targets.numel()


def transformers(shape: dict[str, int], _: torch.device) -> tuple[nn.Module, Step]:
    """The same network in Hugging Face transformers."""
    model = arcee(seeded(shape), shape["T"])

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        # The targets are ours, one later already.
        result: Tensor = model(
            input_ids=tokens, labels=targets, shift_labels=targets, use_cache=False
        ).loss
        return result

    return model, loss


def arcee(source: NoPEGPT, length: int) -> nn.Module:
    """A network in Hugging Face transformers, as `nope export` writes it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = transformers_layout.settings(
        source.config,
        transformers_layout.ARCEE,
        dtype="float32",
        context_length=length,
        trained_context_length=None,
        ends=[None],
        pad=None,
    )
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    layers = source.config.num_decoder_layers
    state = transformers_layout.to_layout(source.state_dict(), transformers_layout.ARCEE, layers)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert missing in ([], ["lm_head.weight"]) and not unexpected, (missing, unexpected)
    model.tie_weights()
    return model


class PlainBlock(nn.Module):
    """A block as a compact training script writes it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, kv = config.embedding_dimensions, config.kv_dimensions
        self.size = config.head_dimensions
        self.sizes = (d, kv, kv)
        self.norm1 = nn.RMSNorm(d, eps=torch.finfo(torch.float32).eps)
        self.norm2 = nn.RMSNorm(d, eps=torch.finfo(torch.float32).eps)
        self.qkv = nn.Linear(d, d + 2 * kv, bias=False)
        self.out = nn.Linear(d, d, bias=False)
        self.up = nn.Linear(d, config.hidden_dimensions, bias=False)
        self.down = nn.Linear(config.hidden_dimensions, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norm1(x)).split(self.sizes, dim=-1)
        q, k, v = (p.view(*p.shape[:2], -1, self.size).transpose(1, 2) for p in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(y.transpose(1, 2).reshape(x.shape))
        return x + self.down(F.silu(self.up(self.norm2(x))))


class Plain(nn.Module):
    """The network as a compact training script writes it: all logits, one cross entropy."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocabulary_size, config.embedding_dimensions)
        self.blocks = nn.ModuleList(PlainBlock(config) for _ in range(config.num_decoder_layers))
        self.norm = nn.RMSNorm(config.embedding_dimensions, eps=torch.finfo(torch.float32).eps)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.embedding.weight)
        return F.cross_entropy(logits.view(-1, logits.size(-1)).float(), targets.view(-1))


def plain(shape: dict[str, int], device: torch.device) -> tuple[nn.Module, Step]:
    """A nanoGPT-class script: a compact model, compiled as a whole where that is possible."""
    source, model = seeded(shape), Plain(model_config(shape))
    with torch.no_grad():
        model.embedding.weight.copy_(source.token_embeddings.weight)
        model.norm.weight.copy_(source.norm.weight)
        for block, layer in zip(model.blocks, source.decoder.layers, strict=True):
            attention, feed_forward = layer.attention, layer.feed_forward
            parts = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
            block.qkv.weight.copy_(torch.cat(parts))
            block.out.weight.copy_(attention.out_proj.weight)
            block.up.weight.copy_(feed_forward.up.weight)
            block.down.weight.copy_(feed_forward.down.weight)
    return model, model if obstacle(device) else torch.compile(model)


Build = Callable[[dict[str, int], torch.device], tuple[nn.Module, Step]]

WAYS: dict[str, tuple[Build, torch.dtype]] = {
    "nope, compiled": (partial(ours, compiled=True), torch.bfloat16),
    "nope, eager": (partial(ours, compiled=False), torch.bfloat16),
    "transformers, float32": (transformers, torch.float32),
    "transformers, bfloat16": (transformers, torch.bfloat16),
    "nanoGPT-class": (plain, torch.bfloat16),
}


def product_rate(shape: dict[str, int], device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of bare matrix products, forward and back."""
    config, rows = model_config(shape), shape["B"] * shape["T"]
    d, kv, hidden = config.embedding_dimensions, config.kv_dimensions, config.hidden_dimensions
    layers = config.num_decoder_layers
    sizes = [(d, d + 2 * kv, layers), (d, d, layers), (d, hidden, layers), (hidden, d, layers)]
    flops = seconds = 0.0
    for inner, outer, count in [*sizes, (d, config.vocabulary_size, 1)]:
        x, weight, gradient = (
            torch.randn(size, device=device).to(dtype)
            for size in ((rows, inner), (outer, inner), (rows, outer))
        )
        for one, other in ((x, weight.T), (gradient, weight), (gradient.T, x)):
            once = least_seconds(lambda a=one, b=other: torch.mm(a, b), device)
            seconds += count * once
            flops += count * 2 * rows * inner * outer
    return flops / seconds


def least_seconds(work: Callable[[], object], device: torch.device) -> float:
    """The median of five times, after one that does not count."""
    times = []
    for _ in range(6):
        started = now(device)
        work()
        times.append(now(device) - started)
    return statistics.median(times[1:])


def now(device: torch.device) -> float:
    """The time, when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def serve(way: str, shape: dict[str, int], device: torch.device) -> None:
    """Be one way: answer each line on stdin, a number of steps, with their seconds."""
    if way == "products":
        reuse_freed_memory()
        print("{}", flush=True)
        dtypes = (torch.bfloat16, torch.float32)[: 2 if device.type == "cpu" else 1]
        for _ in sys.stdin:
            print(json.dumps([product_rate(shape, device, x) for x in dtypes]), flush=True)
        return
    build, precision = WAYS[way]
    model, loss_of = build(shape, device)
    model.to(device).train()
    generator = torch.Generator().manual_seed(0)
    sample = torch.randint(
        0, shape["vocabulary"], (shape["B"], shape["T"] + 1), generator=generator
    )
    tokens, targets = sample[:, :-1].contiguous().to(device), sample[:, 1:].contiguous().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    if way.startswith("nope"):
        config = PretrainConfig(learning_rate=1e-4, optimizer="adamw")
        (optimizer,) = make_optimizers(model, config, precision)

    def step() -> tuple[float, float, float]:
        started = now(device)
        with autocast(device, precision):
            loss = loss_of(tokens, targets)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item(), norm.item(), now(device) - started

    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        exact = loss_of(tokens, targets).item()
    forget_peak(device)
    before = memory(device) if device.type == "cpu" else 0
    loss, norm, first = step()
    print(json.dumps({"exact": exact, "loss": loss, "norm": norm, "first": first}), flush=True)
    # What compiling took is no part of a step.
    forget_peak(device)
    step()
    for line in sys.stdin:
        if line.strip() == "memory":
            print(json.dumps(memory(device) - before), flush=True)
        else:
            print(json.dumps([step()[2] for _ in range(int(line))]), flush=True)


def memory(device: torch.device) -> int:
    """The most bytes since `forget_peak`: of tensors on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return 0


def forget_peak(device: torch.device) -> None:
    """Give back what is free, and begin the peak of the memory at what is in use now."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


class Worker:
    """A way in a process of its own."""

    def __init__(self, way: str, arguments: list[str], script: str = __file__) -> None:
        command = [sys.executable, script, "--way", way, *arguments]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.first = self.read()

    def read(self) -> Any:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a way failed: {self.process.args}")
        return json.loads(line)

    def ask(self, what: str | int) -> Any:
        """Have it do so many steps, or something else; returns what it answers."""
        assert self.process.stdin
        print(what, file=self.process.stdin, flush=True)
        return self.read()

    def end(self) -> None:
        """Let it go."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def measured(shape: dict[str, int], options: argparse.Namespace) -> dict[str, Any]:
    """All ways in turn."""
    arguments = ["--device", options.device, "--threads", str(options.threads)]
    arguments += ["--dimensions", json.dumps(shape)]
    without = {"nope, compiled"} if obstacle(torch.device(options.device)) else set()
    ways = [way for way in WAYS if way not in without.union(options.without)]
    workers = {way: Worker(way, arguments) for way in ways}
    refuse_other_networks(workers)
    products = Worker("products", arguments)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    rates = []
    for _ in range(options.rounds):
        rates.append(products.ask("once"))
        for way in ways:
            seconds[way] += workers[way].ask(options.steps)
    peaks = {way: workers[way].ask("memory") for way in ways}
    for worker in (*workers.values(), products):
        worker.end()
    return {
        "product_rates": [statistics.median(each) for each in zip(*rates, strict=True)],
        "seconds": {way: statistics.median(times) for way, times in seconds.items()},
        "first_step": {way: workers[way].first["first"] for way in ways},
        "peak_memory": peaks,
    }


def refuse_other_networks(workers: dict[str, Worker]) -> None:
    """Stop if a way trains something else than ours."""
    ours = workers["nope, eager"].first
    for way, worker in workers.items():
        for what, tolerance in (("exact", 1e-4), ("loss", 3e-3), ("norm", 1e-2 * ours["norm"])):
            if abs(worker.first[what] - ours[what]) > tolerance:
                raise SystemExit(f"{way} trains another network: {what} {worker.first} {ours}")


def table(shape: dict[str, int], found: dict[str, Any]) -> str:
    """The figures as markdown."""
    config = model_config(shape)
    flops = training_flops_per_token(config, shape["T"], causal=False)
    tokens, rate, peaks = shape["B"] * shape["T"], found["product_rates"][0], found["peak_memory"]
    peer, plain = "transformers, bfloat16", "nanoGPT-class"
    rates = " in bfloat16, ".join(f"{each / 1e9:,.0f} GFLOP/s" for each in found["product_rates"])
    last = "float32" if len(found["product_rates"]) > 1 else "bfloat16"
    lines = [
        f"Bare products: {rates} in {last}. {flops / 1e6:.1f} MFLOPs for each token of "
        f"{count_parameters(config).total:,} parameters (PaLM convention).",
        "",
        "| way | tok/s | GFLOP/s | of bf16 products | beside transformers bf16 | "
        "beside nanoGPT-class | peak memory | beside transformers bf16 | first step |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for way, seconds in found["seconds"].items():
        speed = tokens / seconds
        beside = [found["seconds"].get(each, float("nan")) / seconds for each in (peer, plain)]
        lines.append(
            f"| {way} | {speed:,.0f} | {speed * flops / 1e9:,.0f} | {speed * flops / rate:.0%} | "
            f"{beside[0]:.2f} | {beside[1]:.2f} | {format_bytes(peaks[way])} | "
            f"{peaks[way] / peaks.get(peer, float('nan')):.2f} | {found['first_step'][way]:.1f} s |"
        )
    return "\n".join(lines)


def hardware(options: argparse.Namespace) -> str:
    """What this ran on."""
    from importlib.metadata import version

    name = platform.processor() or platform.machine()
    if options.device.startswith("cuda"):
        name = torch.cuda.get_device_name()
    elif Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if "model name" in line), name)
    return (
        f"{name}, {options.threads} threads, Python {platform.python_version()}, torch "
        f"{torch.__version__}, transformers {version('transformers')}"
    )


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="small")
    for name in SMALL:
        parser.add_argument(f"--{name}", type=int, help="instead of the shape's")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="in each round")
    parser.add_argument("--without", action="append", default=[], choices=WAYS)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--dimensions", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.way:
        serve(options.way, options.dimensions, torch.device(options.device))
        return
    given = {name: getattr(options, name) for name in SMALL}
    shape = SHAPES[options.shape] | {name: n for name, n in given.items() if n is not None}
    found = measured(shape, options)
    if options.json:
        print(json.dumps({"shape": shape, "hardware": hardware(options), **found}))
        return
    print(f"{hardware(options)}\n{shape}\n\n{table(shape, found)}")


if __name__ == "__main__":
    main()
