"""On an NVIDIA GPU everything is what it is on a CPU: `make test-gpu`."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small import HELPED, byte_dataset, small_model, small_run
from small_chats import dataset_of, preferences, questions, tuned
from test_attention import compare_pieces, drawn, error, plain, with_gradients
from torch.nn import functional as F

from nope_gpt.config import SHAPE_TINY, SamplingConfig, SizeConfig
from nope_gpt.data.batches import Batch
from nope_gpt.generation.batching import Request, answers
from nope_gpt.model import NoPEGPT
from nope_gpt.network.attention import Documents, causal_attention
from nope_gpt.network.caching import BLOCK
from nope_gpt.network.cross_entropy import IGNORED, cross_entropies, summed_cross_entropy
from nope_gpt.network.replaying import ReplayingReader
from nope_gpt.sizing.memory import training_memory
from nope_gpt.sizing.plans import Planner
from nope_gpt.sizing.time import Machine
from nope_gpt.tokenization import BaseTokenizer
from nope_gpt.training.measuring import allocated_peak, rehearsed_peak

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)

BYTES = BaseTokenizer.of_bytes()

Nope = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(autouse=True)
def gpu() -> Iterator[None]:
    """What is asked of a machine without a GPU is an error, not a skip."""
    assert torch.cuda.is_available(), "these tests need an NVIDIA GPU"
    yield
    gc.collect()
    torch.cuda.empty_cache()


# Kernels


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-3), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize(("groups", "repeats", "length"), [(2, 3, 200), (4, 1, 64), (1, 2, 2)])
def test_attention_and_its_gradients_are_those_of_an_explicit_mask(
    apart: bool, dtype: torch.dtype, tolerance: float, groups: int, repeats: int, length: int
) -> None:
    tensors = drawn(0, 3, groups, repeats, length, 64, dtype)
    generator = torch.Generator().manual_seed(1)
    numbers = (torch.rand(3, length, generator=generator) < 0.05).cumsum(1) if apart else None
    truth = with_gradients(plain, [tensor.double() for tensor in tensors], numbers)
    documents = None if numbers is None else Documents.of(numbers.int().to(CUDA))
    ours = with_gradients(causal_attention, [tensor.to(CUDA) for tensor in tensors], documents)
    for one, other in zip(ours, truth, strict=True):
        assert error(one.cpu(), other) < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("visible", [1, 64, 65, 1000, 4096])
def test_attention_of_which_each_part_does_a_piece_is_that_of_one(
    dtype: torch.dtype, tolerance: float, visible: int
) -> None:
    compare_pieces(visible, dtype, tolerance, CUDA)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_heads_and_numbers_that_no_kernel_knows_in_pieces_are_replayed_too(
    dtype: torch.dtype,
) -> None:
    model = small_model(embedding_dimensions=36, num_q_heads=6, num_kv_heads=3).to(dtype)
    tokens = torch.randint(0, 61, (1, 70), generator=torch.Generator().manual_seed(0))
    on_cpu, there = model.new_cache(100), model.to(CUDA)
    with torch.inference_mode():
        truth = small_model(embedding_dimensions=36, num_q_heads=6, num_kv_heads=3).double()(tokens)
    cache = there.new_cache(100, compile="on")
    assert on_cpu.num_allocated == cache.num_allocated == 128
    for place, token in enumerate(tokens[0]):
        logits = there.predict(token[None, None], cache)
        assert error(logits[0].cpu(), truth[0, place]) < (3e-2 if dtype == torch.bfloat16 else 1e-3)


def test_attention_keeps_no_scores() -> None:
    """Of 16,384 tokens they would take 2 GB in bfloat16, and 4 in float32."""
    for dtype in (torch.float32, torch.bfloat16):
        tensors = [x.to(CUDA) for x in drawn(0, 1, 2, 2, 16384, 32, dtype)]
        leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
        torch.cuda.reset_peak_memory_stats()
        causal_attention(*leaves).sum().backward()
        assert torch.cuda.max_memory_allocated() < 5e8


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_loss_by_chunks_and_its_gradients_are_those_of_all_logits(
    dtype: torch.dtype, tolerance: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 64, generator=generator).to(dtype)
    head = torch.randn(9000, 64, generator=generator)
    targets = torch.randint(0, 9000, (300,), generator=generator)
    targets[::7] = IGNORED
    ours = [x.to(CUDA).requires_grad_() for x in (hidden, head)]
    theirs = [x.double().requires_grad_() for x in (hidden, head.to(dtype))]
    logits = theirs[0] @ theirs[1].T
    truth = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    each = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")
    loss = summed_cross_entropy(ours[0], [ours[1]], targets.to(CUDA), 128)
    of_each = cross_entropies(ours[0], [ours[1]], targets.to(CUDA), 128)
    assert error(loss.detach().cpu(), truth.detach()) < tolerance
    assert error(of_each.detach().cpu(), each.detach()) < tolerance
    for one, other in zip(
        torch.autograd.grad(loss, ours), torch.autograd.grad(truth, theirs), strict=True
    ):
        assert error(one.cpu(), other) < tolerance


# Training


def test_a_batch_is_copied_without_waiting_whatever_it_begins_with() -> None:
    tokens = torch.arange(12).view(3, 4)
    batch = Batch(tokens, tokens).pinned()
    for each in (batch, batch.in_pieces(2), batch.beginning_with(7)):
        assert each.tokens.is_pinned() and each.targets.is_pinned()
    assert batch.beginning_with(7).tokens.tolist()[1] == [7, 5, 6, 7]


@pytest.fixture
def dataset(corpus: Path, tmp_path: Path) -> Path:
    return byte_dataset(corpus, tmp_path / "datasets")


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "muon"])
def test_a_run_is_that_of_a_cpu(dataset: Path, tmp_path: Path, optimizer: str) -> None:
    settings: dict[str, Any] = HELPED | {"optimizer": optimizer}
    on_cpu = small_run(dataset, tmp_path / "cpu", **settings)
    on_gpu = small_run(dataset, tmp_path / "gpu", **settings | {"device": "cuda"})
    assert on_gpu.losses == pytest.approx(on_cpu.losses, rel=1e-3)


@pytest.mark.parametrize("compile", ["off", "on"])
def test_a_run_in_bfloat16_follows_that_in_float32(
    dataset: Path, tmp_path: Path, compile: str
) -> None:
    settings: dict[str, Any] = HELPED | {"device": "cuda", "embedding_dimensions": 64}
    exact = small_run(dataset, tmp_path / "float32", **settings)
    settings |= {"precision": "bfloat16", "compile": compile}
    narrow = small_run(dataset, tmp_path / "bfloat16", **settings)
    assert narrow.losses == pytest.approx(exact.losses, rel=1e-2)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("compile", ["off", "on"])
def test_a_resumed_run_is_the_uninterrupted_one(
    dataset: Path, tmp_path: Path, precision: str, compile: str
) -> None:
    settings: dict[str, Any] = {"device": "cuda", "precision": precision, "compile": compile}
    settings |= {"dropout": 0.1, "optimizer": "muon"}
    whole = small_run(dataset, tmp_path / "whole", **settings)
    small_run(dataset, tmp_path / "part", **settings)
    (tmp_path / "part" / "pretrain" / "checkpoints" / "step-6").rename(tmp_path / "step-6")
    rest = small_run(dataset, tmp_path / "part", resume=True, **settings)
    assert rest.losses == pytest.approx(whole.losses[3:], rel=1e-3)


@pytest.mark.parametrize(("objective", "full"), [("sft", False), ("sft", True), ("dpo", False)])
def test_a_tuning_is_that_of_a_cpu(base: Path, tmp_path: Path, objective: str, full: bool) -> None:
    rows = questions(20) if objective == "sft" else preferences(20)
    dataset = dataset_of(rows, base, tmp_path)
    settings: dict[str, Any] = {"objective": objective, "full": full}
    _, on_cpu = tuned(base, dataset, tmp_path / "cpu", **settings)
    _, on_gpu = tuned(base, dataset, tmp_path / "gpu", **settings, device="cuda")
    assert on_gpu.losses == pytest.approx(on_cpu.losses, rel=1e-3)
    narrow = settings | {"device": "cuda", "precision": "bfloat16"}
    _, in_bfloat16 = tuned(base, dataset, tmp_path / "bfloat16", **narrow)
    assert in_bfloat16.losses == pytest.approx(on_cpu.losses, rel=2e-2)


def test_a_rank_of_torchrun_trains_as_one_process_does(dataset: Path, tmp_path: Path) -> None:
    alone = small_run(dataset, tmp_path / "alone", device="cuda")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    words = ["-m", "nope_gpt.cli", "pretrain", "--dataset-path", str(dataset), "--seed", "0"]
    words += (
        "--embedding-dimensions 32 --num-q-heads 4 --num-kv-heads 2 --num-hidden-layers 2".split()
    )
    words += "--feed-forward-ratio 2 --tokens-per-sample 16 --batch-size 4 --max-steps 6".split()
    words += "--gradient-accumulation-steps 2 --learning-rate 0.01 --precision float32".split()
    words += "--initialization scaled --length-growth 0 --recall 0 --no-anchor".split()
    words += ["--run-dir-path", str(tmp_path / "ranks")]
    done = subprocess.run(
        [*command, *words, "--eval-interval=3"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    rows = (tmp_path / "ranks" / "pretrain" / "metrics.jsonl").read_text().splitlines()
    losses = [row["loss"] for row in map(json.loads, rows) if "gradient_norm" in row]
    assert losses == pytest.approx(alone.losses, rel=1e-3)


# Generating


def on_gpu(dtype: torch.dtype = torch.float32, **shape: Any) -> NoPEGPT:
    return small_model(**shape).to(CUDA, dtype)


def test_tokens_from_a_cache_are_those_without_one_and_those_of_a_cpu() -> None:
    prompt = torch.tensor([3, 1, 4, 1, 5])
    own, tokens = on_gpu(), prompt.tolist()
    settings = {"max_tokens": 30, "temperature": 0, "repeat_penalty": 0}
    generated = [int(token) for token, _ in own.generate(prompt, **settings)]
    on_cpu = [int(token) for token, _ in small_model().generate(prompt, **settings)]
    for token in generated:
        with torch.no_grad():
            logits = own(torch.tensor([tokens], device=CUDA))[0, -1]
        assert int(logits.argmax()) == token
        tokens.append(token)
    assert generated == on_cpu


@pytest.mark.parametrize("size", [7, 1])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(("capacity", "length"), [(20, 50), (2 * BLOCK, 2 * BLOCK - 1)])
def test_logits_of_a_ring_and_of_a_cache_that_grows_are_those_of_a_cpu(
    kind: str, capacity: int, length: int, size: int
) -> None:
    """By the modules, and replayed where it is one token."""
    tokens = torch.randint(0, 61, (2, length), generator=torch.Generator().manual_seed(0))
    found = []
    for device in (torch.device("cpu"), CUDA):
        model = small_model()
        model = model.quantize() if kind == "int8" else model.to(getattr(torch, kind))
        model = model.to(device)
        cache = model.new_cache(capacity, 2, pinned=2, compile="auto")
        parts = tokens.split(size, dim=1)
        ours = [model.predict(part.to(device), cache) for part in parts]
        assert isinstance(cache.reader, ReplayingReader) == (device == CUDA)
        found.append(torch.stack(ours).float().cpu())
    assert error(found[1], found[0].double()) < (3e-2 if kind == "bfloat16" else 1e-3)


def test_what_is_replayed_is_what_the_modules_write() -> None:
    """Past the first entries that are allocated, and around the ring."""
    texts = []
    for compile in ("auto", "off"):
        generated = on_gpu().generate(
            torch.tensor([3, 1, 4]),
            max_tokens=2 * BLOCK,
            context_length=BLOCK + 100,
            temperature=0,
            repeat_penalty=0.5,
            compile=compile,
        )
        texts.append([int(token) for token, _ in generated])
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 5


def test_a_seed_draws_what_it_draws_on_a_cpu() -> None:
    texts = []
    for model in (on_gpu(), small_model()):
        generator = torch.Generator().manual_seed(3)
        drawn = model.generate(torch.tensor([3, 1, 4]), max_tokens=60, generator=generator)
        texts.append([int(token) for token, _ in drawn])
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 20


def test_a_generator_of_the_gpu_draws_the_same_again() -> None:
    texts = []
    for seed in (3, 3, 4):
        generator = torch.Generator(CUDA).manual_seed(seed)
        drawn = on_gpu().generate(torch.tensor([3, 1, 4]), max_tokens=20, generator=generator)
        texts.append([int(token) for token, _ in drawn])
    assert texts[0] == texts[1] != texts[2]


def test_many_prompts_together_are_each_alone() -> None:
    model = on_gpu(vocabulary_size=257)
    sampling = SamplingConfig(max_tokens=12, context_length=20, pin_tokens=2)
    requests = [Request(list(range(1, 3 + 4 * number)), seed=number) for number in range(7)]
    alone, together = (list(answers(model, BYTES, requests, sampling, size)) for size in (1, 3))
    assert alone == together


def test_a_seed_gives_the_same_text_again(nope: Nope, dataset: Path, tmp_path: Path) -> None:
    small_run(dataset, tmp_path / "runs", device="cuda", max_steps=3)
    words = ["generate", "The ", "--model", tmp_path / "runs" / "pretrain", "--max-tokens", 20]
    for extra in (["--num-samples", 3], ["--dtype", "int8"]):
        first, second = (nope(*words, "--seed", 5, "--device", "cuda", *extra) for _ in range(2))
        assert first.returncode == 0, first.stderr
        assert first.stdout == second.stdout != ""


# Memory

WORK = SizeConfig(
    **SHAPE_TINY
    | {"embedding_dimensions": 512, "num_q_heads": 8, "num_kv_heads": 2, "num_decoder_layers": 4},
    tokens_per_sample=1024,
    batch_size=4,
    gradient_accumulation_steps=2,
    vocabulary_size=9000,
    device="cuda",
    precision="bfloat16",
)

WORKS: dict[str, dict[str, Any]] = {
    "bfloat16": {},
    "float32": {"precision": "float32"},
    "one batch": {"gradient_accumulation_steps": 1},
    "recomputed": {"activation_checkpointing": True, "batch_size": 16},
    "half recomputed": {"activation_checkpointing": True, "checkpointed_fraction": 0.5},
    "adamw": {"optimizer": "adamw", "recall": 0.0},
    "adafactor": {"optimizer": "adafactor"},
    "large vocabulary": {"vocabulary_size": 50257, "gradient_accumulation_steps": 1},
    "small chunk": {"vocabulary_size": 50257, "loss_chunk": 256},
    "key for each head": {"num_kv_heads": 8, "hidden_ratio": 2},
    "full": {"method": "full"},
    "lora": {"method": "lora", "rank": 8},
    "lora, float32": {"method": "lora", "rank": 8, "precision": "float32"},
    "all rows": {"method": "lora", "embeddings": "all", "activation_checkpointing": True},
    "dpo": {"method": "dpo", "rank": 8},
}


def real_peak(work: SizeConfig) -> int:
    """Of the second time, when libraries have what they keep."""
    allocated_peak(work, CUDA)
    gc.collect()
    torch.cuda.empty_cache()
    return allocated_peak(work, CUDA)


@pytest.mark.parametrize("name", WORKS)
def test_the_plan_is_what_the_allocator_gives_out(name: str) -> None:
    work = WORK.changed(**WORKS[name])
    peak, rehearsed, plan = real_peak(work), rehearsed_peak(work, CUDA), training_memory(work)
    print(name, peak, rehearsed, plan.peak, plan.as_dict())
    assert rehearsed == pytest.approx(peak, rel=0.05)
    assert plan.peak == pytest.approx(peak, rel=0.05)


@pytest.mark.parametrize("memory", [8, 24, 80])
def test_large_plans_are_those_of_a_rehearsal(memory: int) -> None:
    for plan in Planner(SizeConfig(), memory * 10**9, Machine()).plans():
        assert plan.memory.peak == pytest.approx(rehearsed_peak(plan.work, CUDA), rel=0.03)


@pytest.mark.parametrize("name", ["bfloat16", "float32", "one batch", "recomputed"])
def test_compiled_steps_take_what_is_said_or_up_to_a_tenth_less(name: str) -> None:
    torch._dynamo.reset()  # It compiles a function for a few networks, and no more.
    work = WORK.changed(**WORKS[name], compile="on")
    peak, plan = real_peak(work), training_memory(work).peak
    print(name, peak, plan)
    assert peak <= plan <= 1.1 * peak


def test_a_step_is_measured_and_later_answers_know_the_gpu(nope: Nope, tmp_path: Path) -> None:
    env = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    shape = ["--embedding-dimensions", 512, "--num-q-heads", 8, "--num-kv-heads", 2]
    small = [*shape, "--num-hidden-layers", 4, "--tokens-per-sample", 1024]
    done = nope("size", *small, "--verify", "--measure", "--json", env=env)
    assert done.returncode == 0, done.stderr
    compared = json.loads(done.stdout)["comparison"]
    assert compared["measured"]["peak"] == pytest.approx(compared["calculated"], rel=0.05)
    name = torch.cuda.get_device_name()
    assert f"as measured on {name}" in nope("size", *small, "--gpu", name, env=env).stdout


def test_what_does_not_fit_is_told_with_the_plan_and_a_lever(nope: Nope, dataset: Path) -> None:
    words = ["pretrain", "--dataset-path", dataset, "--embedding-dimensions", 2048, "--seed", 0]
    words += ["--num-q-heads", 32, "--num-hidden-layers", 16, "--tokens-per-sample", 64]
    words += ["--gradient-accumulation-steps", 1]
    done = nope(*words, "--max-steps", 1, "--batch-size", 1 << 13, "--length-growth", 0)
    assert done.returncode == 4, done.stderr
    assert "the memory is too small for this step: by plan it takes" in done.stderr
    assert "next:" in done.stderr


def test_the_batch_that_fits_trains(nope: Nope, dataset: Path) -> None:
    words = ["pretrain", "--dataset-path", dataset, "--embedding-dimensions", 1024, "--seed", 0]
    words += ["--num-q-heads", 16, "--num-kv-heads", 4, "--num-hidden-layers", 8]
    words += ["--tokens-per-sample", 64, "--batch-size", "auto", "--max-steps", 2, "--json"]
    done = nope(*words)
    assert done.returncode == 0, done.stderr


def test_the_doctor_finds_the_gpu_well(nope: Nope) -> None:
    done = nope("doctor", "--json", env={"HF_HUB_OFFLINE": "1"})
    found = {each["name"]: each for each in json.loads(done.stdout)["findings"]}
    assert torch.cuda.get_device_name() in found["device"]["told"]
    for name in ("device", "bfloat16", "torch.compile", "flash attention", "memory", "speed"):
        assert found[name]["state"] == "good", found[name]
    assert "of what matrix products reach" in found["speed"]["told"]


def test_an_export_of_what_was_trained_here_is_equal(
    nope: Nope, dataset: Path, tmp_path: Path
) -> None:
    small_run(dataset, tmp_path / "runs", device="cuda", precision="bfloat16", max_steps=3)
    run = tmp_path / "runs" / "pretrain"
    done = nope("export", "--model", run, "--format", "hub,transformers,gguf", "--output", "out")
    assert done.returncode == 0, done.stderr
    words = ["eval", "--model", run, "--dataset-path", dataset, "--json", "--passkey-keys", 0]
    done, other = (nope(*words, "--device", device) for device in ("cuda", "cpu"))
    assert done.returncode == 0, done.stderr
    ours, theirs = (json.loads(each.stdout) for each in (done, other))
    for one, other in zip(ours["lengths"], theirs["lengths"], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)
