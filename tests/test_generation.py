"""Sampling follows the published program, with its defects mended."""

from __future__ import annotations

from collections import Counter, deque

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import sample
from small import small_model

from nope_gpt.errors import UsageError
from nope_gpt.generation import candidates, draw, penalize_repeats

PROMPT = torch.tensor([3, 1, 4, 1, 5])


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    temperature=st.sampled_from([0.3, 0.7, 1.0, 1.7]),
    top_k=st.integers(1, 61),
    top_p=st.sampled_from([0.05, 0.5, 0.9]),
    repeat_penalty=st.sampled_from([0.0, 0.1, 1.0]),
)
def test_equal_inputs_give_the_published_programs_draws(
    seed: int, temperature: float, top_k: int, top_p: float, repeat_penalty: float
) -> None:
    model = small_model()
    options = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "repeat_penalty": repeat_penalty,
    }
    torch.manual_seed(seed)
    ours = [
        (int(token), float(probability))
        for token, probability in model.generate(PROMPT, max_tokens=6, repeat_window=3, **options)
    ]
    torch.manual_seed(seed)
    tokens, theirs = PROMPT.tolist(), []
    for _ in range(6):
        logits = model(torch.tensor([tokens]))[0, -1].detach()
        theirs.append(sample(logits, [token for token, _ in theirs][-3:], **options))
        tokens.append(theirs[-1][0])
    assert [token for token, _ in ours] == [token for token, _ in theirs]
    assert [p for _, p in ours] == pytest.approx([p for _, p in theirs], rel=1e-4)


def test_temperature_zero_is_greedy() -> None:
    model = small_model()
    generated = list(model.generate(PROMPT, max_tokens=8, temperature=0, repeat_penalty=0))
    tokens = PROMPT.tolist()
    for token, probability in generated:
        assert int(token) == int(model(torch.tensor([tokens]))[0, -1].argmax())
        assert float(probability) == 1.0
        tokens.append(int(token))


def test_a_temperature_near_zero_or_huge_neither_crashes_nor_leaves_the_vocabulary() -> None:
    model = small_model()
    for temperature in (1e-9, 1e-38, 1e30):
        for token, probability in model.generate(PROMPT, max_tokens=3, temperature=temperature):
            assert 0 <= int(token) < 61
            assert 0 < float(probability) <= 1


def test_top_p_one_keeps_every_token() -> None:
    for seed in range(200):
        logits = 5 * torch.randn(61, generator=torch.Generator().manual_seed(seed))
        tokens, probabilities = candidates(logits, top_k=0, temperature=1.0, top_p=1.0)
        assert sorted(tokens.tolist()) == list(range(61))
        assert float(probabilities.sum()) == pytest.approx(1.0)


def test_top_p_keeps_the_likeliest_even_if_it_is_over() -> None:
    tokens, probabilities = candidates(
        torch.tensor([0.0, 9.0, 1.0]), top_k=0, temperature=1.0, top_p=0.01
    )
    assert (tokens.tolist(), probabilities.tolist()) == ([1], [1.0])


def test_top_k_beyond_the_vocabulary_and_zero_mean_all() -> None:
    for top_k in (0, 61, 500, 10**9):
        tokens, _ = candidates(torch.zeros(61), top_k=top_k, temperature=1.0, top_p=1.0)
        assert len(tokens) == 61


def test_the_penalty_counts_every_recent_use() -> None:
    logits = torch.tensor([2.0, -2.0, 3.0])
    penalized = penalize_repeats(logits, deque([0, 0, 1]), 0.5)
    assert penalized.tolist() == [0.5, -3.0, 3.0]
    assert logits.tolist() == [2.0, -2.0, 3.0]


def test_the_drawn_distribution_is_the_specified_one() -> None:
    logits = torch.tensor([1.0, 0.5, 0.0, -0.5, -1.0, -8.0])
    tokens, probabilities = candidates(logits, top_k=5, temperature=0.8, top_p=0.99)
    generator = torch.Generator().manual_seed(0)
    count = 20_000
    drawn = Counter(int(draw(tokens, probabilities, generator)[0]) for _ in range(count))
    expected = {int(t): float(p) * count for t, p in zip(tokens, probabilities, strict=True)}
    assert set(drawn) == set(expected)
    chi_square = sum((drawn[t] - e) ** 2 / e for t, e in expected.items())
    assert chi_square < 18.5  # 4 degrees of freedom: passed by chance alone 999 times in 1000


def test_the_same_seed_gives_the_same_stream() -> None:
    model = small_model()
    streams = []
    for seed in (0, 0, 1):
        generator = torch.Generator().manual_seed(seed)
        stream = model.generate(PROMPT, max_tokens=20, temperature=2.0, generator=generator)
        streams.append([int(token) for token, _ in stream])
    assert streams[0] == streams[1] != streams[2]


def test_only_the_last_tokens_of_a_long_prompt_are_read() -> None:
    model = small_model()
    long = torch.arange(60)
    options = {"max_tokens": 4, "context_length": 7, "temperature": 0}
    one = [int(token) for token, _ in model.generate(long, **options)]
    other = [int(token) for token, _ in model.generate(long[-7:], **options)]
    assert one == other


def test_generating_says_how_many_tokens_it_made() -> None:
    stream = small_model().generate(PROMPT, max_tokens=3)
    with pytest.raises(StopIteration) as end:
        while True:
            next(stream)
    assert end.value.value == 3


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (torch.tensor([], dtype=torch.int64), {}, "must be at least one token"),
        (torch.tensor([[1, 2]]), {}, "must be at least one token"),
        (torch.tensor([1, 61]), {}, "holds token 61, and the vocabulary ends at 60"),
        (torch.tensor([-1]), {}, "the vocabulary ends at 60"),
        (PROMPT, {"max_tokens": 0}, "--max-tokens is 0, and must be at least 1"),
        (PROMPT, {"context_length": 0}, "--context-length is 0"),
        (PROMPT, {"temperature": -1}, "--temperature is -1.0, and must be at least 0"),
        (PROMPT, {"temperature": float("nan")}, "--temperature is nan, and must be a finite"),
        (PROMPT, {"temperature": float("inf")}, "--temperature is inf, and must be a finite"),
        (PROMPT, {"top_k": -1}, "--top-k is -1"),
        (PROMPT, {"top_p": 0}, "--top-p is 0.0, and must be above 0"),
        (PROMPT, {"top_p": 1.1}, "--top-p is 1.1, and must be at most 1"),
        (PROMPT, {"repeat_penalty": 1.1}, "--repeat-penalty is 1.1"),
        (PROMPT, {"repeat_window": 0}, "--repeat-window is 0"),
    ],
)
def test_what_cannot_be_generated_is_refused_at_once(
    prompt: torch.Tensor, options: dict[str, float], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        small_model().generate(prompt, **options)
