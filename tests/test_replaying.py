"""A step with all that changes in tensors is what the modules compute; `test_gpu.py` replays it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import small_model

from nope_gpt.errors import NopeError
from nope_gpt.network.caching import BLOCK
from nope_gpt.network.replaying import ReplayingReader, Step
from nope_gpt.network.sharpening import Growth


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 99),
    capacity=st.sampled_from([3, 7, 12, 64, 65, 150]),
    pinned=st.integers(0, 2),
    lengths=st.lists(st.integers(1, 20) | st.integers(60, 200), min_size=1, max_size=3),
    grows=st.booleans(),
    kind=st.sampled_from(["float32", "int8"]),
)
def test_a_step_reads_as_the_modules_do(
    seed: int, capacity: int, pinned: int, lengths: list[int], grows: bool, kind: str
) -> None:
    """Rows of any length, some of which have gone round, in one piece or several."""
    model = small_model(seed)
    model = model.quantize() if kind == "int8" else model
    model.decoder.set_growth(Growth(0.3, 2) if grows else None)
    generator = torch.Generator().manual_seed(seed)
    caches = [model.new_cache(capacity, len(lengths), pinned=pinned) for _ in range(2)]
    for row, length in enumerate(lengths):
        prompt = torch.randint(0, 61, (1, length), generator=generator)
        for cache in caches:
            model.predict(prompt, cache, [row])
    for _ in range(3):
        tokens = torch.randint(0, 61, (len(lengths), 1), generator=generator)
        expected = model.predict(tokens, caches[0])
        step = Step(model, caches[1])
        step.prepare(caches[1], tokens)
        with torch.inference_mode():
            found = step.run()
        caches[1].remember(range(len(lengths)), tokens)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(caches[1].memory, caches[0].memory)


def test_a_reader_replays_one_token_of_every_row() -> None:
    model = small_model()
    cache, reader = model.new_cache(BLOCK, 3), ReplayingReader(model)
    assert reader.can_read(cache, [0, 1, 2], 1)
    assert not reader.can_read(cache, [0, 1, 2], 2)
    assert not reader.can_read(cache, [0, 2], 1)


def test_what_cannot_be_recorded_is_told_with_what_does_without() -> None:
    """As by this torch, which knows no GPU, or on this CPU."""
    model = small_model()
    cache = model.new_cache(BLOCK)
    with pytest.raises(NopeError, match="cannot be recorded on cpu: ") as caught:
        ReplayingReader(model).read(cache, [0], torch.tensor([[3]]), every=False)
    assert caught.value.hint == "--compile off does without"
