"""What sizing promises: exact counts, bytes near those of a real step, plans that fit."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import shlex
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small import byte_dataset, small_model
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nope_gpt.amounts import format_bytes, format_count, parse_memory
from nope_gpt.cli.size import text
from nope_gpt.cli.workloads import section_of_plan
from nope_gpt.config import SHAPE_400M, SHAPE_TINY, ModelConfig, PretrainConfig, SizeConfig
from nope_gpt.config.knobs import flag_of, kind_of, resolve
from nope_gpt.errors import CapacityError, UsageError
from nope_gpt.sizing.arithmetic import (
    compute_optimal_tokens,
    count_parameters,
    forward_flops,
    training_flops_per_token,
)
from nope_gpt.sizing.hardware import GPUS, known_gpu
from nope_gpt.sizing.holdings import Holdings
from nope_gpt.sizing.memory import inference_memory, snapshot, training_memory, usable_memory
from nope_gpt.sizing.plans import WIDTHS, Plan, Planner, shape_of
from nope_gpt.sizing.time import Machine
from nope_gpt.training import compilation, planning
from nope_gpt.training.measuring import learner_of, rehearsed_peak, train_step

BASE_400M = ModelConfig(**SHAPE_400M)

CPU = torch.device("cpu")

SMALL = SizeConfig(**SHAPE_TINY, tokens_per_sample=64, device="cpu", rank=4)


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

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.embedding.weight)


def variants(**choices: list[object]) -> list[SizeConfig]:
    """The small config with every combination of the choices."""
    combinations = itertools.product(*choices.values())
    return [SMALL.changed(**dict(zip(choices, each, strict=True))) for each in combinations]


def allocated_peak(work: SizeConfig) -> int:
    """The most that torch's allocator ever gave out, by its profiler, in the same two steps."""

    def run() -> None:
        learner = learner_of(work, CPU)
        for _ in range(2):
            train_step(learner, work)

    run()  # Whatever is made once only.
    gc.collect()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    events = profile.profiler.kineto_results.events()
    allocations = [event for event in events if event.name() == "[memory]"]
    allocations.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in allocations))


def parsed(command: str) -> PretrainConfig:
    program, verb, *words = shlex.split(command)
    assert (program, verb) == ("nope", "pretrain")
    fields = {flag_of(field): field.name for field in dataclasses.fields(PretrainConfig)}
    values, rest = {}, iter(words)
    for flag in rest:
        if flag == "--gpus":
            next(rest)
            continue
        kind, _ = kind_of(PretrainConfig, fields[flag])
        values[flag[2:]] = True if kind is bool else kind(next(rest))
    return resolve(PretrainConfig, [(command, values)])


@st.composite
def shapes(draw: st.DrawFn, heads: st.SearchStrategy[int] = st.integers(1, 24)) -> ModelConfig:  # noqa: B008
    num_kv_heads = draw(st.integers(1, 4))
    num_q_heads = num_kv_heads * draw(st.integers(1, 4))
    return ModelConfig(
        embedding_dimensions=num_q_heads * draw(heads),
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        num_decoder_layers=draw(st.integers(1, 5)),
        hidden_ratio=draw(st.integers(1, 4)),
        vocabulary_size=draw(st.integers(1, 1000)),
    )


@st.composite
def workloads(draw: st.DrawFn) -> SizeConfig:
    """Shapes that one would train, small; what the smallest ones take is small change."""
    shape = draw(shapes(heads=st.sampled_from([32, 40])))
    others = {
        "vocabulary_size": draw(st.sampled_from([200, 5000, 20_000])),
        "hidden_ratio": draw(st.integers(2, 4)),
    }
    return SizeConfig(
        **shape.as_dict() | others,
        method=draw(st.sampled_from(["pretrain", "pretrain", "full", "lora", "dpo"])),
        rank=draw(st.integers(1, min(4, shape.kv_dimensions))),
        embeddings=draw(st.sampled_from(["new", "all", "none"])),
        batch_size=draw(st.integers(1, 4)),
        gradient_accumulation_steps=draw(st.integers(1, 2)),
        tokens_per_sample=draw(st.integers(128, 300)),
        optimizer=draw(st.sampled_from(["adamw", "adafactor", "muon"])),
        precision=draw(st.sampled_from(["float32", "bfloat16"])),
        activation_checkpointing=draw(st.booleans()),
        checkpointed_fraction=draw(st.sampled_from([0.5, 1.0])),
        loss_chunk=draw(st.sampled_from([16, 128, 1024])),
        recall=draw(st.sampled_from([0.0, 0.5])),
        device="cpu",
    )


memories = st.integers(10**8, 2 * 10**11)

size_configs = st.builds(
    SizeConfig,
    tokens_per_sample=st.sampled_from([128, 1024, 4096]),
    optimizer=st.sampled_from(["adamw", "adafactor", "muon"]),
    precision=st.sampled_from(["float32", "bfloat16"]),
    activation_checkpointing=st.booleans(),
    gpus=st.sampled_from([1, 2, 6, 8]),
    ddp_sharding_level=st.sampled_from([None, 0, 3]),
    days=st.sampled_from([None, 1.0, 7.0]),
)

RTX_4090 = Machine(flops=165e12, watts=450)


def plans_for(memory: int, config: SizeConfig) -> dict[str, Plan]:
    """The plans by each of their names; none if nothing fits."""
    machine = dataclasses.replace(RTX_4090, count=config.gpus)
    try:
        found = Planner(config, memory, machine).plans()
    except CapacityError:
        return {}
    return {name: plan for plan in found for name in plan.names}


def merit(plan: Plan | None) -> tuple[int, bool, int, int]:
    """How good a plan is: larger, then without recomputation, then large chunks and batches."""
    if plan is None:
        return (0, False, 0, 0)
    work = plan.work
    size = count_parameters(work).total
    return (size, not work.activation_checkpointing, work.loss_chunk, work.batch_size)


def test_published_models_have_the_parameters_that_were_published():
    chat = BASE_400M.changed(vocabulary_size=50261)
    totals = [count_parameters(config).total for config in (ModelConfig(), BASE_400M, chat)]
    assert totals == [227_657_728, 408_445_440, 408_450_560]


@given(shapes())
@settings(max_examples=40, deadline=None)
def test_parameters_equal_those_of_a_network(config):
    with torch.device("meta"):
        network = Network(config)
    count = count_parameters(config)
    assert count.total == sum(parameter.numel() for parameter in network.parameters())
    assert count.embedding == network.embedding.weight.numel()
    assert count.norms == sum(each.numel() for each in network.parameters() if each.dim() == 1)


@given(shapes(), st.integers(1, 40))
@settings(max_examples=20, deadline=None)
def test_forward_flops_equal_those_that_torch_counts(config, tokens):
    network = Network(config)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, tokens, dtype=torch.long))
    assert forward_flops(config, tokens).total == counter.get_total_flops()


def test_training_flops_follow_the_causal_and_the_palm_convention():
    assert training_flops_per_token(BASE_400M, 4096, causal=True) == 3_079_818_240
    assert training_flops_per_token(BASE_400M, 4096, causal=False) == 3_708_963_840


def test_a_compute_optimal_run_sees_twenty_tokens_per_parameter_unless_told():
    assert compute_optimal_tokens(BASE_400M, SizeConfig.tokens_per_parameter) == 20 * 408_445_440
    assert compute_optimal_tokens(BASE_400M, 12) == 12 * 408_445_440


def test_inference_holds_the_weights_and_a_cache_of_the_key_and_value_heads():
    memory = inference_memory(BASE_400M, context_length=8192, bytes_per_value=2)
    assert memory.as_dict() == {
        "weights": 2 * 408_445_440,
        "cache": 8192 * 20 * 5 * 64 * 2 * 2,
        "logits": 4 * 50257,
    }


@pytest.mark.parametrize("method", ["pretrain", "lora"])
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "muon"])
def test_optimizer_state_is_what_the_optimizers_keep(optimizer, method):
    work = SMALL.changed(optimizer=optimizer, method=method)
    learner = learner_of(work, CPU)
    train_step(learner, work)
    states = [state for each in learner.optimizers for state in each.state.values()]
    kept = [value for state in states for value in state.values()]
    kept_bytes = sum(value.nbytes for value in kept if value.dim() > 0)  # steps are scalars
    assert training_memory(work).optimizer == kept_bytes


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["pretrain", "full", "lora"])
def test_weights_are_what_the_parameters_are_kept_in(precision, method):
    work = SMALL.changed(precision=precision, method=method)
    network = learner_of(work, CPU).network
    held = [*network.parameters(), *network.buffers()]
    assert training_memory(work).weights == sum(tensor.nbytes for tensor in held)


@pytest.mark.parametrize(("layers", "together"), [(20, 8), (3, 3)])
def test_on_a_gpu_muon_moves_eight_matrices_of_a_shape_at_a_time(layers, together):
    work = SizeConfig(precision="bfloat16", device="cuda", num_decoder_layers=layers)
    numbers = work.hidden_dimensions * work.embedding_dimensions + work.embedding_dimensions**2
    assert Holdings(work).update() == 2 * 2 * together * numbers


GRID = variants(
    precision=["float32", "bfloat16"],
    activation_checkpointing=[False, True],
    optimizer=["adamw", "adafactor", "muon"],
    batch_size=[3],
    vocabulary_size=[128, 9000],
    loss_chunk=[32, 1024],
)

WAYS = [
    *variants(
        method=["lora", "dpo"],
        precision=["float32", "bfloat16"],
        activation_checkpointing=[False, True],
        embeddings=["new", "all", "none"],
    ),
    *variants(recall=[0.0], precision=["float32", "bfloat16"], vocabulary_size=[128, 9000]),
    *variants(method=["full"], precision=["float32", "bfloat16"], checkpointed_fraction=[0.5]),
    *variants(activation_checkpointing=[True], checkpointed_fraction=[0.25, 0.5]),
    *variants(num_kv_heads=[1, 4], hidden_ratio=[2], gradient_accumulation_steps=[4]),
    *variants(
        gradient_accumulation_steps=[1],
        precision=["float32", "bfloat16"],
        activation_checkpointing=[False, True],
        vocabulary_size=[128, 9000],
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("work", [*GRID, *WAYS], ids=str)
def test_the_closed_form_is_that_of_a_rehearsal_without_numbers(work):
    assert training_memory(work).peak == pytest.approx(rehearsed_peak(work, CPU), rel=0.03)


@pytest.mark.slow
@given(workloads())
@settings(max_examples=25, deadline=None)
def test_the_closed_form_is_that_of_a_rehearsal_for_any_shape(work):
    rehearsed, slack = rehearsed_peak(work, CPU), 1 << 16
    assert training_memory(work).peak == pytest.approx(rehearsed, rel=0.03, abs=slack)


@pytest.mark.slow
@pytest.mark.parametrize("work", GRID[::5] + WAYS[::5], ids=str)
def test_a_rehearsal_without_numbers_counts_what_the_allocator_gives_to_a_real_step(work):
    assert rehearsed_peak(work, CPU) == pytest.approx(allocated_peak(work), rel=0.05)


@given(memories, memories)
def test_more_memory_never_leaves_less_usable(one, other):
    assert usable_memory(min(one, other)) <= usable_memory(max(one, other))


def test_usable_memory_holds_back_slack_and_a_reserve():
    usable = [usable_memory(gigabytes * 10**9) for gigabytes in (2, 4, 24)]
    assert usable == [1_700_000_000, 3_400_000_000, 21_800_000_000]
    assert usable_memory(10**9, "cpu") == 488_000_000
    assert usable_memory(10**8, "cpu") == 0


@given(memories, memories, size_configs)
@settings(max_examples=40, deadline=None)
def test_more_memory_never_gives_a_worse_plan(one, other, config):
    less, more = (plans_for(memory, config) for memory in sorted((one, other)))
    for name, plan in less.items():
        assert merit(plan) <= merit(more.get(name)), name


@given(st.integers(10**9, 2 * 10**11), size_configs)
@settings(max_examples=30, deadline=None)
def test_every_plan_fits_in_memory_and_time_and_is_the_whole_of_a_run(memory, config):
    for name, plan in plans_for(memory, config).items():
        work = plan.work
        assert training_memory(work).peak <= plan.usable == usable_memory(memory)
        assert work.batch_size * work.gradient_accumulation_steps % work.gpus == 0
        assert work.tokens_per_step * (plan.steps - 1) < plan.tokens
        assert plan.tokens <= work.tokens_per_step * plan.steps
        assert plan.tokens == 20 * count_parameters(work).total
        if name == "best in the time":
            assert plan.seconds <= config.days * 86400
        if name == "fastest":
            assert work.activation_checkpointing == config.activation_checkpointing


@given(st.integers(10**9, 2 * 10**11), size_configs)
@settings(max_examples=30, deadline=None)
def test_the_command_of_a_plan_parses_back_to_it(memory, config):
    for plan in plans_for(memory, config).values():
        typed = parsed(plan.command)
        assert typed.max_steps == plan.steps
        for name, value in plan.work.as_dict().items():
            if hasattr(typed, name) and name not in ("device", "compile"):
                assert getattr(typed, name) == value, name
        assert (f"--gpus {config.gpus}" in plan.command) == (config.gpus > 1)


@given(st.integers(10**9, 2 * 10**11), size_configs)
@settings(max_examples=10, deadline=None)
def test_the_largest_is_the_largest_of_all_that_fit(memory, config):
    planner = Planner(config, memory, dataclasses.replace(RTX_4090, count=config.gpus))
    for wishes in ({}, {"at_full_speed": True}, {"in_time": True}):
        each = (
            planner.fastest(planner.shaped(shape_of(width, config)), **wishes)
            for width in reversed(WIDTHS)
        )
        assert planner.largest(**wishes) == next((plan for plan in each if plan), None)


def test_a_plan_says_all_that_people_ask():
    config = SizeConfig(memory="24GB", gpu="rtx4090", days=7.0, price=0.4)
    found = plans_for(24 * 10**9, config)
    assert list(found) == ["fastest", "best in the time", "NoPE-GPT-400M", "largest"]
    published = found["NoPE-GPT-400M"]
    assert published.command == (
        "nope pretrain --embedding-dimensions 1280 --num-q-heads 20 --num-kv-heads 5 "
        "--num-hidden-layers 20 --batch-size 4 --gradient-accumulation-steps 64 "
        "--precision bfloat16 --max-steps 7791"
    )
    # 8.17e9 tokens of 3.709e9 operations each, at 40% of 165e12 a second.
    assert published.seconds == pytest.approx(8.1689e9 * 3.70896e9 / 66e12, rel=1e-4)
    said = text([section_of_plan(published, config)])
    assert "time         5.3 days at 40% of the peak" in said
    assert "energy       57.4 kWh for the boards" in said
    assert "cost         51.01" in said
    assert "free         907.4 MB" in said


def test_what_fits_no_shape_is_refused_with_the_largest_part_and_a_command_that_fits():
    config = SizeConfig(memory="100MB")
    with pytest.raises(CapacityError) as caught:
        Planner(config, 10**8, Machine()).plans()
    error = caught.value
    assert error.exit_code == 4
    assert error.what == (
        "the smallest shape, 3,413,632 parameters, needs 112.8 MB even with activation "
        "checkpointing and a small loss chunk, and 85.0 MB are usable; the largest part is "
        "logits, 32.2 MB"
    )
    assert error.where == "--memory 100MB"


def test_on_a_cpu_a_checkpoint_that_is_being_written_has_to_fit_too():
    for plan in Planner(SizeConfig(device="cpu"), 8 * 10**9, Machine()).plans():
        weights_and_an_average = 2 * 4 * count_parameters(plan.work).matrices
        assert plan.memory.peak + weights_and_an_average <= plan.needed <= plan.usable


def test_the_least_change_that_fits_is_offered():
    def hint(memory: int) -> str:
        with pytest.raises(CapacityError) as caught:
            Planner(SizeConfig(), memory, Machine()).plans()
        return caught.value.hint

    assert hint(10**6) == "train on a device with more memory"
    levers = {memory: hint(memory * 10**6) for memory in (95, 110)}
    for memory, line in levers.items():
        typed = parsed(line)
        known = SizeConfig.__dataclass_fields__
        values = {name: value for name, value in typed.as_dict().items() if name in known}
        work = SizeConfig(**values | {"device": "cuda", "precision": "bfloat16", "compile": "auto"})
        assert training_memory(work).peak <= usable_memory(memory * 10**6)


@pytest.mark.parametrize(
    ("changes", "what", "hint"),
    [
        ({"gpu": "rtx9090"}, "--gpu is 'rtx9090', which is not known", "--peak-tflops N"),
        ({"days": 7.0}, "--days needs to know how fast the device is", "--gpu rtx4090"),
        ({"price": 1.0}, "--price needs to know how fast the device is", "--gpu rtx4090"),
    ],
)
def test_a_device_that_nobody_knows_is_refused_with_those_that_are_known(changes, what, hint):
    with pytest.raises(UsageError) as caught:
        Machine.of(SizeConfig(**changes))
    assert caught.value.what == what
    assert hint in caught.value.hint
    if "gpu" in changes:
        assert "RTX 4090" in caught.value.where
        assert Machine.of(SizeConfig(**changes, peak_tflops=100.0)).flops == 1e14


@pytest.mark.parametrize("name", ["rtx4090", "RTX 4090", "4090", "NVIDIA GeForce RTX 4090"])
def test_a_gpu_is_known_by_any_of_its_names(name):
    assert known_gpu(name) == GPUS["RTX 4090"]


def test_similar_names_are_other_gpus():
    assert known_gpu("h100 pcie") != known_gpu("h100-sxm5") == GPUS["H100"]
    assert known_gpu("NVIDIA L40S") == GPUS["L40S"]
    assert known_gpu("4090 laptop") is None
    assert known_gpu("") is None


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
    assert parse_memory(text) == amount


@pytest.mark.parametrize(
    "text", ["", "24", "GB", "much", "-5GB", "0GB", "0.4B", "1e3GB", "24XB", "1.2.3GB", "24GB!"]
)
def test_what_is_no_amount_of_memory_is_refused_with_an_example(text):
    with pytest.raises(UsageError) as caught:
        parse_memory(text)
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
    assert format_bytes(amount) == in_bytes
    assert format_count(amount) == count


def test_importing_sizing_imports_neither_torch_nor_numpy():
    code = "import sys, nope_gpt.sizing; print({'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# The command


def test_any_workload_is_sized_in_words_numbers_and_markdown(nope):
    said = nope("size", "--gpu", "a100", "--price", 2, "--tokens-per-parameter", 12)
    assert said.returncode == 0, said.stderr
    done = nope("size", "--json")
    found = json.loads(done.stdout)
    assert found["parameters"]["total"] == 227_657_728
    assert found["forward_flops_per_sample"]["total"] == 2_964_206_911_488
    plain = nope("size").stdout
    assert "total      227,657,728" in plain
    assert "mlp        134,217,728  ██████████████" in plain
    assert "dimensions per layer  64\n" in plain
    document = nope("size", "--format", "markdown").stdout
    assert "| mlp | 134,217,728 (59%) |" in document
    odd = nope("size", "--embedding-dimensions", 4096, "--num-hidden-layers", 4).stdout
    assert "dimensions per layer  1024   (usual are 32 to 128)" in odd


@pytest.mark.slow
def test_a_model_that_is_there_is_sized_for_tuning_and_generating(nope, tmp_path):
    small_model(vocabulary_size=61).save_pretrained(tmp_path / "model")
    found = json.loads(nope("size", "--model", "model", "--method", "dpo", "--json").stdout)
    assert found["settings"]["vocabulary_size"] == 61
    assert found["settings"]["num_decoder_layers"] == 2
    assert "compute_optimal" not in found
    planned = nope("size", "--model", "model", "--method", "lora", "--memory", "2GB", "--json")
    (plan,) = json.loads(planned.stdout)["plans"]
    assert plan["command"].startswith("nope tune --model model --batch-size 128 ")
    missing = nope("size", "--model", "nowhere")
    assert missing.returncode == 3


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--memory", "0GB"], 2, "'0GB' is not an amount of memory"),
        (["--memory=-4GB"], 2, "'-4GB' is not an amount of memory"),
        (["--memory", "9999999TB"], 2, "'9999999TB' is more memory than there is"),
        (["--memory", "1MB"], 4, "the largest part is logits"),
        (["--embedding-dimensions", "100", "--num-q-heads", "3"], 2, "must be a multiple"),
        (["--gpu", "rtx9090"], 2, "--gpu is 'rtx9090', which is not known"),
        (["--days", "3"], 2, "--days needs to know how fast the device is"),
        (["--format", "xml"], 2, "--format is 'xml', and must be text or markdown"),
        (["--plot", "chart.doc"], 2, "--plot is 'chart.doc', and must end in one of .png"),
        (["--method", "lora", "--memory", "8GB"], 2, "--method lora needs a model to tune"),
    ],
)
def test_what_cannot_be_meant_is_refused(nope, words, code, said):
    done = nope("size", *words)
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr


@pytest.mark.slow
def test_a_step_is_rehearsed_and_measured_and_later_answers_know_the_machine(nope, tmp_path):
    shape = ["--embedding-dimensions", 64, "--num-q-heads", 2, "--num-kv-heads", 1]
    small = [*shape, "--num-hidden-layers", 2, "--tokens-per-sample", 128, "--device", "cpu"]
    env = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = nope("size", *small, "--verify", "--measure", "--json", env=env)
    assert done.returncode == 0, done.stderr
    compared = json.loads(done.stdout)["comparison"]
    assert compared["rehearsed"] == pytest.approx(compared["calculated"], rel=0.03)
    assert compared["measured"]["peak"] == pytest.approx(compared["rehearsed"], rel=0.05)
    speed = compared["measured"]["flops"]
    later = nope("size", *small, env=env).stdout
    assert f"as measured on {compared['measured']['device']}" in later
    plans = json.loads(nope("size", "--memory=2GB", *small, "--json", env=env).stdout)["plans"]
    plan = plans[0]
    per_token = training_flops_per_token(
        SizeConfig(**plan["settings"]), plan["settings"]["tokens_per_sample"], causal=False
    )
    assert plan["seconds"] == pytest.approx(plan["tokens"] * per_token / speed, rel=0.01)
    (tmp_path / "cache" / "nope-gpt" / "calibrations.json").write_text("[broken")
    assert "n/a: name the device with --gpu" in nope("size", *small, env=env).stdout


@pytest.mark.parametrize("name", ["chart.png", "chart.svg"])
def test_parts_are_drawn(nope, tmp_path, name):
    assert nope("size", "--plot", name).returncode == 0
    content = (tmp_path / name).read_bytes()
    assert content.startswith(b"\x89PNG" if name.endswith("png") else b"<?xml")


# The trainer


@pytest.mark.slow
def test_the_batch_that_fits_is_found_and_each_update_stays_the_same(nope, corpus, tmp_path):
    byte_dataset(corpus, tmp_path / "datasets")
    words = ["pretrain", "--preset", "tiny", "--tokens-per-sample", 64, "--device", "cpu"]
    plain = json.loads(nope(*words, "--dry-run", "--json").stdout)
    auto = json.loads(nope(*words, "--batch_size=auto", "--dry-run", "--json").stdout)
    assert auto["tokens_per_step"] == plain["tokens_per_step"]
    done = nope(*words, "--batch-size", "auto", "--max-steps", 1, "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "runs" / "pretrain" / "run.json").read_text())["config"]
    assert record["batch_size"] * record["gradient_accumulation_steps"] == 8
    assert not record["auto_batch_size"]


@pytest.mark.parametrize("left", [430, 460, 600])
def test_a_batch_is_as_large_as_the_memory_allows(monkeypatch, left):
    monkeypatch.setattr(planning, "memory_of", lambda _: left * 10**6)
    config = PretrainConfig(**SHAPE_TINY, tokens_per_sample=512, auto_batch_size=True)
    model = ModelConfig(**SHAPE_TINY, vocabulary_size=256)
    found = planning.fitted(config, model, CPU)
    assert found.batch_size * found.gradient_accumulation_steps == 256

    def needed(batch: int) -> int:
        other = config.changed(batch_size=batch, gradient_accumulation_steps=256 // batch)
        work = planning.workload(other, model, CPU)
        return training_memory(work).peak + snapshot(work)

    usable = usable_memory(left * 10**6, "cpu")
    assert needed(found.batch_size) <= usable < needed(2 * found.batch_size)


def test_a_device_too_small_for_one_sample_is_refused_with_a_lever(monkeypatch):
    monkeypatch.setattr(planning, "memory_of", lambda _: 395 * 10**6)
    with pytest.raises(CapacityError, match=r"one sample at a time needs .* has 4.0 MB") as caught:
        planning.fitted(PretrainConfig(auto_batch_size=True), ModelConfig(), CPU)
    assert caught.value.hint == "add --activation-checkpointing"


# Budgets


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
@pytest.mark.parametrize("memory", ["0.5GB", "1GB", "2GB"])
def test_a_plan_trains_in_a_process_that_can_have_no_more(nope, corpus, tmp_path, memory):
    """Three steps, an evaluation and a checkpoint, of the printed line as it is but for its end."""
    byte_dataset(corpus, tmp_path / "datasets")
    data = ["--vocabulary-size", 256, "--tokens-per-sample", 256, "--device", "cpu"]
    found = json.loads(nope("size", "--memory", memory, *data, "--json").stdout)
    plan = next(plan for plan in found["plans"] if "largest" in plan["names"])
    _, *words = shlex.split(plan["command"])
    words += ["--gradient-accumulation-steps", "2", "--max-steps", "3", "--num-eval-samples", "4"]
    kilobytes = parse_memory(memory) // 1024
    done = nope(*words, shell=f'ulimit -d {kilobytes}; exec "$0" "$@"')
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "pretrain" / "checkpoints" / "step-3").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("memory", [8, 24, 80])
def test_large_plans_are_those_of_a_rehearsal(memory):
    for plan in Planner(SizeConfig(), memory * 10**9, Machine()).plans():
        work = plan.work.changed(device="cpu")
        assert training_memory(work).peak == pytest.approx(rehearsed_peak(work, CPU), rel=0.03)
        assert training_memory(plan.work).peak <= plan.usable


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_compiled_steps_take_what_is_said_or_up_to_a_tenth_less(
    precision, activation_checkpointing
):
    if compilation.obstacle(CPU):
        pytest.skip(compilation.obstacle(CPU))
    work = SMALL.changed(
        compile="on",
        precision=precision,
        activation_checkpointing=activation_checkpointing,
        batch_size=4,
        tokens_per_sample=256,
        vocabulary_size=500,
    )
    allocated_peak(work)  # Compiles.
    peak = allocated_peak(work)
    assert peak <= training_memory(work).peak <= 1.1 * peak
    eager = training_memory(work.changed(compile="auto")).peak
    assert peak <= eager
