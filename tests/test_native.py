"""Compiled reading is the network's own, bit for bit the same whatever is read beside it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import forward
from small import small_model

from nope_gpt.adaptation import lora
from nope_gpt.errors import NopeError
from nope_gpt.hub.published_layout import published_names
from nope_gpt.model import NoPEGPT
from nope_gpt.network import native
from nope_gpt.network.caching import KVCache

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="there is no C++ compiler"
)

DTYPES = [torch.float32, torch.bfloat16, torch.int8]


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def cached(shared_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile once for all tests of this file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(shared_cache))
    native.place.cache_clear()


def model_in(dtype: torch.dtype, **changes: int) -> NoPEGPT:
    model = small_model(embedding_dimensions=48, num_q_heads=6, num_kv_heads=2, **changes)
    return model.quantize() if dtype == torch.int8 else model.to(dtype)


def tokens_of(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 61, shape, generator=torch.Generator().manual_seed(seed))


def native_cache(model: NoPEGPT, capacity: int, rows: int = 1, pinned: int = 0) -> KVCache:
    cache = model.new_cache(capacity, rows, pinned=pinned, compile="on")
    assert cache.reader
    return cache


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags are of this processor")
@pytest.mark.parametrize("flags", [["-mno-avx512f"], ["-march=x86-64", "-mtune=generic"]])
@pytest.mark.parametrize("dtype", DTYPES)
def test_processors_with_narrower_vectors_compute_the_same(
    dtype: torch.dtype, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "FLAGS", [*native.FLAGS, *flags])
    native.place.cache_clear()
    test_it_computes_what_the_modules_compute(dtype)
    test_sizes_that_fill_no_vector_are_computed_too({})
    test_tokens_read_together_are_bit_for_bit_tokens_read_one_by_one.hypothesis.inner_test(
        [1, 5, 2, 8, 3], dtype
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_computes_what_the_modules_compute(dtype: torch.dtype) -> None:
    """In bfloat16 it rounds less often than torch does, so it is nearer to float32."""
    model, truth = model_in(dtype), model_in(torch.float32)
    if dtype == torch.int8:
        for module, source in zip(model.modules(), truth.modules(), strict=True):
            if hasattr(module, "scale"):
                source.weight.data = module.weight.float() * module.scale[:, None]
    tokens = tokens_of(1, 40)
    exact = truth(tokens)[0].detach()
    if dtype == torch.bfloat16:
        exact = truth.to(torch.bfloat16).float()(tokens)[0].detach()
    cache = native_cache(model, 64)
    logits = torch.cat([model.predict(tokens[:, i : i + 1], cache) for i in range(40)])
    largest = exact.abs().max().item()
    ours = (logits - exact).abs().max().item()
    theirs = (model(tokens)[0].detach().float() - exact).abs().max().item()
    assert ours <= max(1e-5 * largest, 1.5 * theirs if dtype == torch.bfloat16 else 0.0)


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.integers(1, 8), min_size=1, max_size=6), dtype=st.sampled_from(DTYPES))
def test_tokens_read_together_are_bit_for_bit_tokens_read_one_by_one(
    sizes: list[int], dtype: torch.dtype
) -> None:
    model, tokens = model_in(dtype), tokens_of(1, sum(sizes))
    one, other = native_cache(model, 64), native_cache(model, 64)
    begin = 0
    for size in sizes:
        piece = tokens[:, begin : begin + size]
        together = model.predict(piece, one, every=True)[0]
        alone = torch.cat([model.predict(piece[:, i : i + 1], other) for i in range(size)])
        assert torch.equal(together, alone)
        begin += size


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_row_is_bit_for_bit_the_row_alone_on_any_number_of_threads(
    dtype: torch.dtype, threads: int
) -> None:
    """Rows of unequal length, some of which have gone round their ring."""
    model, lengths = model_in(dtype), [3, 20, 1, 7, 15, 2, 9, 4, 11]
    prompts = [tokens_of(1, length, seed=length) for length in lengths]
    batch = native_cache(model, 12, len(lengths), pinned=2)
    torch.set_num_threads(1)
    alone = []
    for row, prompt in enumerate(prompts):
        model.predict(prompt, batch, [row])
        cache = native_cache(model, 12, pinned=2)
        model.predict(prompt, cache)
        alone.append([model.predict(tokens_of(1, 1, seed=i), cache) for i in range(6)])
    torch.set_num_threads(threads)
    rows = range(len(lengths))
    for i in range(6):
        logits = model.predict(tokens_of(1, 1, seed=i).expand(len(lengths), 1), batch, rows)
        for row in rows:
            assert torch.equal(logits[row], alone[row][i][0])


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 12), st.integers(0, 3), st.integers(1, 30))
def test_a_full_ring_with_pinned_tokens_is_attention_under_its_mask(
    capacity: int, pinned: int, length: int
) -> None:
    pinned = min(pinned, capacity - 1)
    model, tokens = model_in(torch.float32), tokens_of(length)
    state = model.state_dict()
    tensors = {published: state[ours] for ours, published in published_names(2).items()}
    expected = forward(
        tensors, tokens, num_q_heads=6, num_kv_heads=2, window=capacity, pinned=pinned
    )
    cache = native_cache(model, capacity, pinned=pinned)
    for i in range(length):
        logits = model.predict(tokens[None, i : i + 1], cache)[0]
        torch.testing.assert_close(logits, expected[i], rtol=0, atol=1e-5)


def test_long_contexts_are_attended_to_chunk_by_chunk() -> None:
    model, tokens = model_in(torch.float32), tokens_of(1, 700)
    cache = native_cache(model, 1000)
    model.predict(tokens[:, :690], cache)
    for i in range(690, 700):
        logits = model.predict(tokens[:, i : i + 1], cache)
    torch.testing.assert_close(logits[0], model(tokens)[0, -1].detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("changes", [{"embedding_dimensions": 30, "num_kv_heads": 1}, {}])
def test_sizes_that_fill_no_vector_are_computed_too(changes: dict[str, int]) -> None:
    model = small_model(
        **{"num_q_heads": 3, "num_kv_heads": 3, "embedding_dimensions": 33} | changes
    )
    tokens = tokens_of(1, 9)
    cache = native_cache(model, 16)
    logits = torch.cat([model.predict(tokens[:, i : i + 1], cache) for i in range(9)])
    torch.testing.assert_close(logits, model(tokens)[0].detach(), rtol=0, atol=1e-5)


def test_over_two_thousand_tokens_nothing_is_allocated_anew() -> None:
    """Once the ring is full, memory is constant."""
    model = model_in(torch.float32)
    cache = native_cache(model, 600)
    model.predict(tokens_of(1, 600), cache)
    place, statm = cache.memory.data_ptr(), Path("/proc/self/statm")
    newest = tokens_of(1, 1)
    sizes = []
    for _ in range(3):
        for _ in range(700):
            model.predict(newest, cache)
        sizes.append(int(statm.read_text().split()[1]) if statm.exists() else 0)
    assert cache.memory.data_ptr() == place
    assert cache.memory.size(4) == 640
    assert sizes[2] - sizes[0] < 64, "pages"


def test_what_it_is_not_for_is_decoded_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    half = small_model().to(torch.float16)
    adapted = small_model()
    lora.attach(adapted, rank=2, alpha=1.0)
    for model, reason in ((half, "float32, bfloat16 and int8"), (adapted, "has adapters")):
        with pytest.raises(NopeError, match=reason):
            model.new_cache(8, compile="on")
        assert model.new_cache(8, compile="auto").reader is None
    assert small_model().new_cache(8).reader is None
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("PATH", "")
    native.place.cache_clear()
    with pytest.raises(NopeError, match="there is no C\\+\\+ compiler"):
        small_model().new_cache(8, compile="on")
    native.place.cache_clear()


def test_a_compiler_that_fails_is_asked_once_and_what_it_said_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = tmp_path / "count"
    compiler = tmp_path / "broken-compiler"
    compiler.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exit\n'
        f"echo x >> {count}\necho 'fatal error: no <cmath> here' >&2\nexit 1\n"
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    native.place.cache_clear()
    for _ in range(2):
        with pytest.raises(NopeError, match="fatal error: no <cmath> here"):
            small_model().new_cache(8, compile="on")
    assert count.read_text() == "x\n"
    assert small_model().new_cache(8, compile="auto").reader is None
    native.place.cache_clear()


def test_a_library_that_was_cut_short_is_made_anew(shared_cache: Path) -> None:
    assert small_model().new_cache(8, compile="on").reader
    path = native.place()
    assert isinstance(path, Path)
    whole = path.read_bytes()
    broken = path.with_name("native-broken.so")
    broken.write_bytes(whole[: len(whole) // 2][:100])
    assert native.loaded(broken) is None
    assert not broken.exists()
    assert native.loaded(path)
    assert path.parent == shared_cache / "nope-gpt"


@pytest.mark.slow
def test_the_first_answer_does_not_wait_for_the_compiler_and_a_later_one_has_it(
    tmp_path: Path,
) -> None:
    """It compiles on after the process that began it has ended, and appears whole."""
    code = (
        "import time, torch, sys\nfrom nope_gpt.network import native\n"
        "native.WORTHWHILE_PARAMETERS = 0\n"
        "from nope_gpt.model import NoPEGPT\n"
        "model = NoPEGPT(61, 32, 4, 2, 2, 2).eval(); begun = time.monotonic()\n"
        "reader = model.new_cache(8, compile='auto').reader\n"
        "print(reader is not None, time.monotonic() - begun < 1.5)"
    )
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}

    def run() -> str:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
        )
        return done.stdout.strip()

    assert run() == "False True"
    directory = tmp_path / "cache" / "nope-gpt"
    for _ in range(600):
        if list(directory.glob("*.so")):
            break
        time.sleep(0.1)
    assert run() == "True True"
    assert len(list(directory.iterdir())) == 1, "nothing half-written is left"
