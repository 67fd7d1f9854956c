"""What sizing promises: exact counts, bytes near those of a real step, plans that fit."""

from __future__ import annotations

import dataclasses
import itertools
import shlex
import subprocess
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from nope_gpt import cross_entropy, sizing
from nope_gpt.config import SHAPE_400M, SHAPE_TINY, ModelConfig, PretrainConfig, SizeConfig
from nope_gpt.errors import CapacityError, UsageError
from nope_gpt.knobs import flag_of, kind_of, resolve
from nope_gpt.model import NoPEGPT
from nope_gpt.training.optimization import make_optimizers

BASE_400M = ModelConfig(**SHAPE_400M)

SMALL = SizeConfig(**SHAPE_TINY, tokens_per_sample=64).changed(embedding_dimensions=128)


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, kv, hidden = config.embedding_dimensions, config.kv_dimensions, config.hidden_dimensions
        self.heads = (config.num_q_heads, config.num_kv_heads, config.num_kv_heads)
        self.qkv = nn.ModuleList(nn.Linear(d, width, bias=False) for width in (d, kv, kv))
        self.out = nn.Linear(d, d, bias=False)
        self.up, self.down = nn.Linear(d, hidden, bias=False), nn.Linear(hidden, d, bias=False)
        self.norm1, self.norm2 = nn.RMSNorm(d), nn.RMSNorm(d)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        q, k, v = (
            project(normed).unflatten(-1, (heads, -1)).transpose(1, 2)
            for project, heads in zip(self.qkv, self.heads, strict=True)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.silu(self.up(self.norm2(x))))


class Network(nn.Module):
    """The architecture in plain PyTorch, written without a look at the package's own."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocabulary_size, config.embedding_dimensions)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_decoder_layers))
        self.norm = nn.RMSNorm(config.embedding_dimensions)
        self.recompute = isinstance(config, SizeConfig) and config.activation_checkpointing

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return F.linear(self.norm(x), self.embedding.weight)


def variants(**choices: list[object]) -> list[SizeConfig]:
    """The small config with every combination of the choices."""
    combinations = itertools.product(*choices.values())
    return [SMALL.changed(**dict(zip(choices, each, strict=True))) for each in combinations]


def random_tokens(config: SizeConfig) -> Tensor:
    return torch.randint(config.vocabulary_size, (config.batch_size, config.tokens_per_sample))


def autocast(config: SizeConfig) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bfloat16")


def model_of(config: SizeConfig) -> NoPEGPT:
    """The package's own network, as it trains."""
    shape = {name: getattr(config, name) for name in ModelConfig.__dataclass_fields__}
    model = NoPEGPT(**shape).train()
    if config.activation_checkpointing:
        model.decoder.enable_activation_checkpointing()
    return model


def optimizers_of(config: SizeConfig, model: NoPEGPT) -> list[torch.optim.Optimizer]:
    settings = PretrainConfig(optimizer=config.optimizer)
    return make_optimizers(model, settings, torch.float32)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of every tensor made under it, until the last reference goes."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        for storage in {tensor.untyped_storage() for tensor in tensors} - set(self.known):
            self.known.add(storage)
            weakref.finalize(storage, self.count, -storage.nbytes())
            self.count(storage.nbytes())
        return result

    def count(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)


def saved_by_autograd(config: SizeConfig) -> int:
    """Bytes of the storages that the blocks' forward pass saves, but for the parameters."""
    network = model_of(config)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    saved = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with autocast(config), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        network.decoder(network.token_embeddings(random_tokens(config)))
    kept = [tensor for address, tensor in saved.items() if address not in parameters]
    return sum(tensor.untyped_storage().nbytes() for tensor in kept)


def parsed(command: str) -> PretrainConfig:
    program, verb, *words = shlex.split(command)
    assert (program, verb) == ("nope", "pretrain")
    fields = {flag_of(field): field.name for field in dataclasses.fields(PretrainConfig)}
    values, rest = {}, iter(words)
    for flag in rest:
        kind, _ = kind_of(PretrainConfig, fields[flag])
        values[flag[2:]] = True if kind is bool else kind(next(rest))
    return resolve(PretrainConfig, [(command, values)])


@st.composite
def shapes(draw: st.DrawFn) -> ModelConfig:
    num_kv_heads = draw(st.integers(1, 4))
    num_q_heads = num_kv_heads * draw(st.integers(1, 4))
    return ModelConfig(
        embedding_dimensions=num_q_heads * draw(st.integers(1, 24)),
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        num_decoder_layers=draw(st.integers(1, 5)),
        hidden_ratio=draw(st.integers(1, 4)),
        vocabulary_size=draw(st.integers(1, 1000)),
    )


memories = st.integers(10**8, 2 * 10**11)

size_configs = st.builds(
    SizeConfig,
    tokens_per_sample=st.sampled_from([128, 1024, 4096]),
    optimizer=st.sampled_from(["adamw", "adafactor"]),
    precision=st.sampled_from(["float32", "bfloat16"]),
    activation_checkpointing=st.booleans(),
)


def preference(memory: int, config: SizeConfig) -> tuple[int, bool, int]:
    """How good the plan is: larger, then without recomputation, then a larger batch."""
    try:
        plan = sizing.largest_that_trains(memory, config)
    except CapacityError:
        return (0, False, 0)
    size = sizing.count_parameters(plan.config).total
    return (size, not plan.config.activation_checkpointing, plan.config.batch_size)


def test_published_models_have_the_parameters_that_were_published():
    chat = BASE_400M.changed(vocabulary_size=50261)
    totals = [sizing.count_parameters(config).total for config in (ModelConfig(), BASE_400M, chat)]
    assert totals == [227_657_728, 408_445_440, 408_450_560]


@given(shapes())
@settings(max_examples=40, deadline=None)
def test_parameters_equal_those_of_a_network(config):
    with torch.device("meta"):
        network = Network(config)
    count = sizing.count_parameters(config)
    assert count.total == sum(parameter.numel() for parameter in network.parameters())
    assert count.embedding == network.embedding.weight.numel()
    assert count.norms == sum(each.numel() for each in network.parameters() if each.dim() == 1)


@given(shapes(), st.integers(1, 40))
@settings(max_examples=20, deadline=None)
def test_forward_flops_equal_those_that_torch_counts(config, tokens):
    network = Network(config)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, tokens, dtype=torch.long))
    assert sizing.forward_flops(config, tokens) == counter.get_total_flops()


def test_training_flops_follow_the_causal_and_the_palm_convention():
    assert sizing.training_flops_per_token(BASE_400M, 4096, causal=True) == 3_079_818_240
    assert sizing.training_flops_per_token(BASE_400M, 4096, causal=False) == 3_708_963_840
    assert sizing.training_flops(BASE_400M, 4096, 10**9, causal=True) == 3_079_818_240 * 10**9


def test_a_compute_optimal_run_sees_twenty_tokens_per_parameter_unless_told():
    assert sizing.compute_optimal_tokens(BASE_400M) == 20 * 408_445_440
    assert sizing.compute_optimal_tokens(BASE_400M, 12) == 12 * 408_445_440


def test_inference_holds_the_weights_and_a_cache_of_the_key_and_value_heads():
    memory = sizing.inference_memory(BASE_400M, context_length=8192, bytes_per_value=2)
    assert memory.as_dict() == {"weights": 2 * 408_445_440, "cache": 8192 * 20 * 5 * 64 * 2 * 2}


@pytest.mark.parametrize(
    "config",
    variants(
        precision=["float32", "bfloat16"],
        activation_checkpointing=[False, True],
        num_kv_heads=[1, 2, 4],
        hidden_ratio=[2, 4],
        batch_size=[2],
        vocabulary_size=[512],
    ),
)
def test_activations_are_what_autograd_saves(config):
    saved = sizing.training_moments(config)["backward"]
    once, twice = (saved_by_autograd(config.changed(batch_size=size)) for size in (2, 4))
    assert saved.activations == pytest.approx(twice - once, rel=0.05)
    assert saved.autocast_copies == 2 * once - twice, "what does not grow with the batch"


@pytest.mark.parametrize("config", variants(optimizer=["adamw", "adafactor", "muon"]))
def test_optimizer_state_is_what_the_optimizers_keep(config):
    model = model_of(config)
    optimizers = optimizers_of(config, model)
    model(random_tokens(config)).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    kept = [value for state in states for value in state.values()]
    kept_bytes = sum(value.nbytes for value in kept if value.dim() > 0)  # steps are scalars
    assert sizing.training_moments(config)["step"].optimizer == kept_bytes


@pytest.mark.parametrize(
    "config",
    variants(
        precision=["float32", "bfloat16"],
        activation_checkpointing=[False, True],
        optimizer=["adamw", "adafactor", "muon"],
        batch_size=[4, 16],
        vocabulary_size=[128, 4096],
    ),
)
def test_the_peak_is_that_of_a_real_step(config, monkeypatch):
    monkeypatch.setattr(cross_entropy, "CACHED_BYTES", {})  # As on a GPU: a chunk at once.
    tokens = random_tokens(config)
    with LiveBytes() as live:
        model = model_of(config)
        optimizers = optimizers_of(config, model)
        for _ in range(2):
            for _ in range(2):
                with autocast(config):
                    loss = model(tokens, tokens)
                loss.backward()
            for optimizer in optimizers:
                optimizer.step()
    moments = sizing.training_moments(config)
    if config.precision == "bfloat16":  # A CPU widens the logits first, a GPU as it reads them.
        loss = moments["loss"]
        widened = min(tokens.numel(), sizing.LOSS_CHUNK) * config.vocabulary_size * 4
        moments["loss"] = dataclasses.replace(loss, logits=loss.logits + widened)
    peak = max(moment.peak for moment in moments.values())
    assert peak == pytest.approx(live.peak, rel=0.05)


def test_the_chunk_is_that_of_the_loss():
    assert sizing.LOSS_CHUNK == cross_entropy.CHUNK


@given(memories, memories)
def test_more_memory_never_leaves_less_usable(one, other):
    assert sizing.usable_memory(min(one, other)) <= sizing.usable_memory(max(one, other))


def test_usable_memory_holds_back_slack_and_a_reserve():
    usable = [sizing.usable_memory(gigabytes * 10**9) for gigabytes in (2, 4, 24)]
    assert usable == [1_700_000_000, 3_400_000_000, 21_800_000_000]


@given(memories, memories, size_configs)
@settings(max_examples=60, deadline=None)
def test_more_memory_never_gives_a_smaller_plan(one, other, config):
    less, more = sorted((one, other))
    assert preference(less, config) <= preference(more, config)


@given(st.integers(10**10, 2 * 10**11), size_configs)
@settings(max_examples=40, deadline=None)
def test_a_plan_fits_and_twice_its_batch_does_not(memory, config):
    plan = sizing.largest_that_trains(memory, config)
    usable = sizing.usable_memory(memory)
    assert plan.memory.peak <= usable
    doubled = plan.config.changed(batch_size=2 * plan.config.batch_size)
    assert plan.gradient_accumulation_steps == 1 or sizing.training_memory(doubled).peak > usable
    assert plan.config.activation_checkpointing >= config.activation_checkpointing


@given(st.integers(10**10, 2 * 10**11), size_configs)
@settings(max_examples=40, deadline=None)
def test_the_command_of_a_plan_parses_back_to_it(memory, config):
    plan = sizing.largest_that_trains(memory, config)
    typed = parsed(plan.command)
    published = sizing.PUBLISHED_SHAPES[plan.name].as_dict()
    for name, value in (plan.config.as_dict() | published).items():
        if name not in ("vocabulary_size", "memory"):
            assert getattr(typed, name) == value == getattr(plan.config, name)
    assert typed.batch_size * typed.gradient_accumulation_steps == 256


def test_the_command_says_only_what_differs_from_the_defaults():
    plan = sizing.largest_that_trains(10 * 10**9, SizeConfig())
    assert plan.command == (
        "nope pretrain --embedding-dimensions 1280 --num-q-heads 20 --num-kv-heads 5 "
        "--num-hidden-layers 20 --batch-size 4 --gradient-accumulation-steps 64 "
        "--activation-checkpointing --precision bfloat16"
    )


def test_what_fits_no_shape_is_refused_with_the_largest_part_and_a_command_that_fits():
    memory = sizing.parse_memory("300MB")
    with pytest.raises(CapacityError) as caught:
        sizing.largest_that_trains(memory, SizeConfig(memory="300MB"))
    assert caught.value.exit_code == 4
    assert caught.value.what == (
        "tiny, the smallest shape, needs 473.7 MB to train even with activation checkpointing, "
        "and 255.0 MB are usable; the largest part is logits, 308.8 MB"
    )
    assert caught.value.where == "--memory 300MB"
    assert "--tokens-per-sample 512" in caught.value.hint
    typed = parsed(caught.value.hint).as_dict()
    config = SizeConfig(**{name: typed[name] for name in SizeConfig().as_dict() if name in typed})
    assert sizing.training_memory(config).peak <= sizing.usable_memory(memory)


def test_adafactor_is_offered_before_a_shorter_sample():
    with pytest.raises(CapacityError) as caught:
        sizing.largest_that_trains(500 * 10**6, SizeConfig(tokens_per_sample=1024))
    assert "--optimizer adafactor" in caught.value.hint
    assert "--tokens-per-sample 1024" in caught.value.hint


def test_a_device_too_small_for_any_setting_is_told_so():
    with pytest.raises(CapacityError) as caught:
        sizing.largest_that_trains(10**7, SizeConfig())
    assert caught.value.where == "--memory 10.0 MB"
    assert caught.value.hint == "train on a device with more memory"


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        *((f"3{unit}", 3 * 1000**i) for i, unit in enumerate(["B", "KB", "MB", "GB", "TB"])),
        *((f"3{unit}", 3 * 1024**i) for i, unit in enumerate(["b", "KiB", "MiB", "GiB", "TiB"])),
        *((f"3{unit}", 3 * 1000**i) for i, unit in enumerate("kmgt", start=1)),
        *((" 1.5 gb ", 15 * 10**8), ("0.5GIB", 2**29), (".5k", 500)),
    ],
)
def test_every_byte_unit_is_read(text, amount):
    assert sizing.parse_memory(text) == amount


@pytest.mark.parametrize(
    "text", ["", "24", "GB", "much", "-5GB", "0GB", "0.4B", "1e3GB", "24XB", "1.2.3GB", "24GB!"]
)
def test_what_is_no_amount_of_memory_is_refused_with_an_example(text):
    with pytest.raises(UsageError) as caught:
        sizing.parse_memory(text)
    assert caught.value.what == f"{text!r} is not an amount of memory"
    assert caught.value.where == "--memory"
    assert "--memory 24GB" in caught.value.hint


@pytest.mark.parametrize(
    ("amount", "in_bytes", "count"),
    [
        (999, "999 B", "999"),
        (24 * 10**9, "24.0 GB", "24.0B"),
        (408_445_440, "408.4 MB", "408.4M"),
        (999_960_000, "1.0 GB", "1.0B"),
        (25 * 10**14, "2500.0 TB", "2500.0T"),
    ],
)
def test_amounts_are_shortened_to_one_decimal(amount, in_bytes, count):
    assert sizing.format_bytes(amount) == in_bytes
    assert sizing.format_count(amount) == count


def test_importing_sizing_imports_neither_torch_nor_numpy():
    code = "import sys, nope_gpt.sizing; print({'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
