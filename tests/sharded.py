"""Under torchrun: every optimizer at every level of sharding moves as the unsharded one."""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from nope_gpt.config import PretrainConfig
from nope_gpt.device import Ranks
from nope_gpt.model import NoPEGPT
from nope_gpt.training import distribution, state
from nope_gpt.training.optimization import make_optimizers
from nope_gpt.training.sharding import whole

SHAPE = {
    "vocabulary_size": 61,
    "embedding_dimensions": 24,
    "num_q_heads": 3,
    "num_kv_heads": 1,
    "num_decoder_layers": 2,
    "hidden_ratio": 2,
}


def fresh(seed: int = 0) -> NoPEGPT:
    torch.manual_seed(seed)
    return NoPEGPT(**SHAPE)


def step(network, config, optimizers, trained, tokens, share, ranks) -> tuple[float, float]:
    """One update; the loss and the norm before clipping."""
    halves = tokens[share].chunk(2)
    loss_sum = torch.zeros(())
    for index, half in enumerate(halves):
        with distribution.synchronizing(network, config, index == len(halves) - 1):
            loss = network(half, half) / tokens.numel()
            (loss * ranks).backward()
        loss_sum += loss.detach()
    norm = whole(torch.nn.utils.clip_grad_norm_(trained, 0.5)).item()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if ranks > 1:
        dist.all_reduce(loss_sum)
    return loss_sum.item(), norm


def compare(optimizer: str, level: int, hybrid: bool, ranks: Ranks) -> None:
    config = PretrainConfig(
        optimizer=optimizer, ddp_sharding_level=level, hybrid_sharding=hybrid, learning_rate=1e-2
    )
    single, model = fresh(), fresh()
    network = distribution.distribute(model, config, ranks, torch.device("cpu"))
    if hybrid:  # Two nodes of one rank each: replicas, and nothing is sharded within a node.
        (weight, *_) = model.parameters()
        assert isinstance(weight, DTensor)
        assert weight.device_mesh.shape == (2, 1)
        assert weight.to_local().shape == weight.shape
    pairs = []
    for one in (single, model):
        trained = list(one.parameters())
        pairs.append((make_optimizers(one, config, torch.float32), trained))
    for number in range(4):
        generator = torch.Generator().manual_seed(number)
        tokens = torch.randint(0, 61, (8, 12), generator=generator)
        share = slice(ranks.rank * 4, ranks.rank * 4 + 4)
        alone = step(single, config, *pairs[0], tokens, slice(0, 8), 1)
        together = step(network, config, *pairs[1], tokens, share, 2)
        for a, b in zip(alone, together, strict=True):
            assert abs(a - b) <= 1e-5 * abs(a), (optimizer, level, number, alone, together)
        if number == 1:  # Through a checkpoint, into a model that was sharded anew.
            weights, tensors = state.gathered(model, pairs[1][0])
            both = [weights, tensors]
            dist.broadcast_object_list(both)
            model = fresh(1)
            network = distribution.distribute(model, config, ranks, torch.device("cpu"))
            optimizers = make_optimizers(model, config, torch.float32)
            state.put_back_weights(model, both[0])
            state.put_back_optimizers(model, optimizers, both[1])
            pairs[1] = (optimizers, list(model.parameters()))
    weights, tensors = state.gathered(model, pairs[1][0])
    alone_weights, alone_tensors = state.gathered(single, pairs[0][0])
    if ranks.is_first:
        for ours, theirs in ((weights, alone_weights), (tensors, alone_tensors)):
            assert ours.keys() == theirs.keys(), (optimizer, level)
            for name in theirs:
                torch.testing.assert_close(ours[name], theirs[name], rtol=2e-3, atol=2e-5)
    else:
        assert not weights and not tensors


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ranks = Ranks.from_environment()
    os.environ["LOCAL_WORLD_SIZE"] = "1"  # As if each rank were a node.
    count = 0
    for optimizer in ("adamw", "adafactor", "muon"):
        for level in (0, 2, 3):
            for hybrid in (False, True) if level else (False,):
                compare(optimizer, level, hybrid, ranks)
                count += 1
    dist.barrier()
    dist.destroy_process_group()
    if ranks.is_first:
        print(f"{count} combinations")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
