"""The loss and its gradients, in bfloat16: ours, all logits at once, and torch's own without.

    python benchmarks/cross_entropy.py [--tokens 4096] [--dimensions 384] [--rounds 5]

All ways in turn on the same numbers; medians. The error is that of the mean loss against
float64 on the same rounded numbers, in nats, and that of the gradient of the hidden states.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from train import hardware

from nope_gpt.device import reuse_freed_memory
from nope_gpt.network.cross_entropy import summed_cross_entropy


def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Chunks, gradients on the way forward."""
    return summed_cross_entropy(hidden, [weight], targets) / len(targets)


def all_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """What everybody writes."""
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


def torchs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """torch.nn.functional.linear_cross_entropy, where there is one."""
    return F.linear_cross_entropy(hidden, weight, targets).float()


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--dimensions", type=int, default=384)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    reuse_freed_memory()
    ways: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "ours": ours,
        "all logits": all_logits,
    }
    if hasattr(F, "linear_cross_entropy"):
        ways["torch's linear_cross_entropy"] = torchs
    print(f"{hardware(options)}; {options.tokens} tokens, {options.dimensions} dimensions\n")
    print("| vocabulary | way | seconds | error of the loss | of the gradient |")
    print("|---|---|---|---|---|")
    for vocabulary in (4096, 50257):
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(options.tokens, options.dimensions, generator=generator)
        weight = torch.randn(vocabulary, options.dimensions, generator=generator) * 0.05
        targets = torch.randint(0, vocabulary, (options.tokens,), generator=generator)
        hidden, weight = (
            x.bfloat16().to(options.device).requires_grad_() for x in (hidden, weight)
        )
        targets = targets.to(options.device)
        exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
        truth = F.cross_entropy(F.linear(*exact), targets)
        (gradient,) = torch.autograd.grad(truth, exact[:1])
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        errors = {}
        for _ in range(options.rounds + 1):
            for name, way in ways.items():
                started = time.perf_counter()
                loss = way(hidden, weight, targets)
                grads = torch.autograd.grad(loss, (hidden, weight))
                errors[name] = (
                    abs(loss.item() - truth.item()),
                    float((grads[0].double() - gradient).norm() / gradient.norm()),
                )
                seconds[name].append(time.perf_counter() - started)
        for name, times in seconds.items():
            loss_error, gradient_error = errors[name]
            print(
                f"| {vocabulary:,} | {name} | {statistics.median(times[1:]):.3f} | "
                f"{loss_error:.1e} nats | {gradient_error:.1e} |"
            )


if __name__ == "__main__":
    main()
