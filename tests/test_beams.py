"""Beam search finds what trying everything finds."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import small_model

from nope_gpt.config import SamplingConfig
from nope_gpt.generation.beams import Hypothesis, beam_search
from nope_gpt.model import NoPEGPT

V = 5


def sharp_model(seed: int) -> NoPEGPT:
    """With opinions, so that the likeliest path is not that of the likeliest first token."""
    model = small_model(seed, vocabulary_size=V)
    with torch.no_grad():
        model.norm.weight.mul_(3.0)
    return model


def exhaustive(
    model: NoPEGPT, prompt: list[int], length: int, penalty: float, stop: int | None
) -> list[Hypothesis]:
    """Every continuation, the best first."""
    found = []
    for size in range(1, length + 1):
        for tokens in itertools.product(range(V), repeat=size):
            ends = tokens[-1] == stop
            if stop in tokens[:-1] or not (ends or size == length):
                continue
            logits = model(torch.tensor([prompt + list(tokens)]))[0, len(prompt) - 1 : -1]
            every = torch.log_softmax(logits.detach().double(), dim=-1)
            total = sum(float(every[i, token]) for i, token in enumerate(tokens))
            found.append(Hypothesis(list(tokens), total, total / size**penalty, ends))
    return sorted(found, key=lambda item: -item.score)


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 99),
    penalty=st.sampled_from([0.0, 0.7, 1.0, 2.0]),
    stop=st.sampled_from([None, 2]),
)
def test_with_beams_for_all_it_finds_what_trying_everything_finds(
    seed: int, penalty: float, stop: int | None
) -> None:
    model, prompt = sharp_model(seed), [1, 3]
    best = exhaustive(model, prompt, 4, penalty, stop)
    found = beam_search(
        model,
        prompt,
        SamplingConfig(max_tokens=4),
        num_beams=V**3,
        length_penalty=penalty,
        stop_tokens=[] if stop is None else [stop],
    )
    for ours, theirs in zip(found[:10], best, strict=False):
        assert ours.score == pytest.approx(theirs.score, rel=1e-5)
    assert found[0].tokens == best[0].tokens
    assert found[0].is_finished == best[0].is_finished


def test_one_beam_is_greedy() -> None:
    model, prompt = small_model(), [3, 1, 4]
    (found,) = beam_search(model, prompt, SamplingConfig(max_tokens=9), num_beams=1)
    greedy = model.generate(
        torch.tensor(prompt), max_tokens=9, temperature=0, repeat_penalty=0, compile="off"
    )
    assert found.tokens == [int(token) for token, _ in greedy]


def test_more_beams_find_nothing_less_likely() -> None:
    better = 0
    for seed in range(12):
        model = sharp_model(seed)
        scores = [
            beam_search(model, [1], SamplingConfig(max_tokens=6), num_beams=count)[0].score
            for count in (1, V**5)
        ]
        assert scores[1] >= scores[0] - 1e-6
        better += scores[1] > scores[0] + 1e-6
    assert better, "greedy is not always the likeliest"


@pytest.mark.slow
def test_the_search_goes_on_while_a_longer_text_could_still_be_better() -> None:
    """With a length penalty a finished text may yet lose to one that is not."""
    for seed in range(20):
        model = sharp_model(seed)
        best = exhaustive(model, [2], 4, 2.0, 0)[0]
        found = beam_search(
            model,
            [2],
            SamplingConfig(max_tokens=4),
            num_beams=V**3,
            length_penalty=2.0,
            stop_tokens=[0],
        )
        assert found[0].tokens == best.tokens


def searched_to_the_end(
    model: NoPEGPT, prompt: list[int], length: int, penalty: float, stop: int, beams: int
) -> list[list[int]]:
    """The best texts of a search that never ends early, every prefix read anew."""
    live: list[tuple[float, list[int]]] = [(0.0, [])]
    found: list[tuple[float, list[int]]] = []
    for size in range(1, length + 1):
        grown = []
        for total, tokens in live:
            logits = model(torch.tensor([prompt + tokens]))[0, -1].detach()
            every = torch.log_softmax(logits.double(), dim=-1).tolist()
            grown += [(total + value, [*tokens, token]) for token, value in enumerate(every)]
        grown = sorted(grown, reverse=True)[: 2 * beams]
        found += [(total / size**penalty, each) for total, each in grown if each[-1] == stop]
        live = [(total, each) for total, each in grown if each[-1] != stop][:beams]
    found += [(total / length**penalty, each) for total, each in live]
    return [tokens for _, tokens in sorted(found, reverse=True)[:beams]]


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
def test_a_search_that_ends_early_finds_what_one_to_the_end_finds(penalty: float) -> None:
    for seed in range(10):
        model = sharp_model(seed)
        found = beam_search(
            model,
            [2],
            SamplingConfig(max_tokens=5),
            num_beams=2,
            length_penalty=penalty,
            stop_tokens=[0],
        )
        expected = searched_to_the_end(model, [2], 5, penalty, 0, 2)
        assert [item.tokens for item in found] == expected
