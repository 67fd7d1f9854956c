"""Sampling follows the published program, with its defects mended."""

from __future__ import annotations

import math
from collections import Counter, deque
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import sample
from small import small_model

from nope_gpt.config import SamplingConfig
from nope_gpt.errors import NopeError, UsageError
from nope_gpt.generation.continuation import continuation
from nope_gpt.generation.sampling import Draws, add_bias, candidates, draw, penalize_repeats

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


@pytest.mark.parametrize(
    "filters",
    [
        {"top_k": 0, "temperature": 1.0, "top_p": 1.0, "min_p": 0.0},
        {"top_k": 7, "temperature": 0.7, "top_p": 0.8, "min_p": 0.0},
        {"top_k": 0, "temperature": 1.4, "top_p": 1.0, "min_p": 0.2},
    ],
)
def test_draws_follow_the_distribution_that_is_specified(filters: dict[str, Any]) -> None:
    """Chi-square over 20,000 draws, against the definition written out in float64."""
    logits = torch.randn(25, generator=torch.Generator().manual_seed(1))
    expected = specified(logits.double().tolist(), **filters)
    sampling = SamplingConfig(**filters, repeat_penalty=0.0)
    draws = Draws(sampling, torch.Generator().manual_seed(0))
    counts = Counter(int(draws.next(logits).token) for _ in range(20_000))
    assert counts.keys() <= expected.keys(), "nothing that was filtered out"
    statistic = sum(
        (counts[token] - 20_000 * p) ** 2 / (20_000 * p) for token, p in expected.items()
    )
    assert len(expected) > 2
    freedom = len(expected) - 1
    # Wilson and Hilferty, 1931: the cube root of a chi-square is nearly normal.
    z = ((statistic / freedom) ** (1 / 3) - 1 + 2 / (9 * freedom)) / (2 / (9 * freedom)) ** 0.5
    assert abs(z) < 4


def specified(
    logits: list[float], *, top_k: int, temperature: float, top_p: float, min_p: float
) -> dict[int, float]:
    """The probabilities as the flags define them."""
    kept = sorted(range(len(logits)), key=lambda i: -logits[i])[: top_k or None]
    weights = {i: math.exp(logits[i] / temperature) for i in kept}

    def normalized() -> dict[int, float]:
        total = sum(weights.values())
        return {i: weight / total for i, weight in weights.items()}

    below = 0.0
    for place, (i, p) in enumerate(normalized().items()):
        below += p
        if place and below > top_p and top_p < 1.0:
            weights.pop(i)
    best = max(normalized().values())
    for i, p in normalized().items():
        if p < min_p * best:
            weights.pop(i)
    return normalized()


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 9999),
    size=st.integers(2, 400),
    spread=st.sampled_from([0.1, 1.0, 6.0]),
    top_k=st.sampled_from([0, 7, 1000]),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    top_p=st.sampled_from([0.013, 0.611, 0.957, 1.0]),
    min_p=st.sampled_from([0.0, 0.0137, 0.313]),
)
def test_candidates_are_those_that_the_flags_define(
    seed: int, size: int, spread: float, top_k: int, temperature: float, top_p: float, min_p: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(size, generator=generator, dtype=torch.float64).float()
    how: dict[str, Any] = {"top_k": top_k, "temperature": temperature}
    how |= {"top_p": top_p, "min_p": min_p}
    tokens, probabilities = candidates(logits, **how)
    expected = specified(logits.tolist(), **how)
    assert tokens.tolist() == list(expected)
    assert probabilities.tolist() == pytest.approx(list(expected.values()), rel=1e-4)


def test_a_bias_is_added_to_its_tokens_alone() -> None:
    logits = torch.zeros(6)
    changed = add_bias(logits, {2: 1.5, 5: -100.0})
    assert changed.tolist() == [0, 0, 1.5, 0, 0, -100]
    assert logits.tolist() == [0] * 6
    with pytest.raises(UsageError, match="--logit-bias names token 6, and the vocabulary ends"):
        add_bias(logits, {6: 1.0})
    forced = SamplingConfig(logit_bias="4:1000", max_tokens=5)
    tokens = [int(c.token) for c in continuation(small_model(), [1, 2], forced)]
    assert tokens == [4] * 5


@pytest.mark.parametrize("bias", ["4", "4:", "x:1", "4:nan", "-1:3", "4:1;5:2", "4:inf"])
def test_a_bias_that_cannot_be_meant_is_refused(bias: str) -> None:
    with pytest.raises(UsageError, match="must be ID:BIAS pairs"):
        SamplingConfig(logit_bias=bias)


def test_a_seed_gives_the_same_tokens_again_and_another_seed_others() -> None:
    model = small_model()

    def drawn(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return [int(t) for t, _ in model.generate(PROMPT, max_tokens=20, generator=generator)]

    assert drawn(0) == drawn(0) != drawn(1)


def test_over_two_thousand_tokens_a_full_cache_stays_as_it_is() -> None:
    model, cache = small_model(), small_model().new_cache(64)
    places = set()
    for _ in model.generate(PROMPT, max_tokens=2000, context_length=64, cache=cache, compile="off"):
        places.add(cache.memory.data_ptr())
    assert len(places) == 1
    assert cache.memory.size(4) == 64


def test_a_cache_grows_with_what_it_holds_up_to_its_capacity() -> None:
    model = small_model()
    cache = model.new_cache(5000)
    sizes = []
    for length in (1, 511, 600, 2000, 3000, 4000):
        model.predict(torch.zeros(1, length, dtype=torch.long), cache)
        sizes.append(cache.num_allocated)
    assert sizes == [512, 512, 1152, 3136, 5056, 5056]


def test_a_cache_that_has_grown_has_what_it_held() -> None:
    model = small_model()
    cache = model.new_cache(5000)
    tokens = torch.randint(0, 61, (1, 520), generator=torch.Generator().manual_seed(0))
    model.predict(tokens[:, :510], cache)
    logits = model.predict(tokens[:, 510:], cache)
    assert cache.num_allocated > 512
    torch.testing.assert_close(logits, model(tokens)[:, -1].detach(), rtol=0, atol=1e-5)


def test_a_bias_is_added_to_what_the_logit_is() -> None:
    found = add_bias(torch.tensor([1.0, 2.0, 3.0]), {1: 0.5, 2: -4.0})
    assert found.tolist() == [1.0, 2.5, -1.0]


@pytest.mark.parametrize("logit", [math.inf, math.nan])
def test_a_logit_that_is_no_finite_number_is_not_drawn_from(logit: float) -> None:
    with pytest.raises(NopeError, match="the model's largest logit is"):
        candidates(torch.tensor([logit, 1.0]), top_k=0, temperature=1.0, top_p=1.0)
