"""What streams is the text itself, up to what stops it, with what it took."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import small_model
from test_chat import TOKENIZER, speaker

from nope_gpt.config import SamplingConfig
from nope_gpt.errors import CapacityError, NopeError, UsageError
from nope_gpt.generation.streaming import StopText, TextStream, generate_text
from nope_gpt.model import NoPEGPT
from nope_gpt.network.caching import KVCache
from nope_gpt.tokenization import BaseTokenizer

BYTES = BaseTokenizer.of_bytes()


def stream(
    model: NoPEGPT, prompt: list[int], cache: KVCache | None = None, **more: Any
) -> TextStream:
    generator = torch.Generator().manual_seed(3)
    sampling = SamplingConfig(**{"max_tokens": 12, "compile": "off"} | more)
    return TextStream(model, BYTES, prompt, sampling, generator, cache)


def text_of(pieces: TextStream) -> str:
    return "".join(piece.text for piece in pieces)


@settings(max_examples=200, deadline=None)
@given(
    pieces=st.lists(st.text("ab\n", max_size=4), max_size=8),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
)
def test_text_is_passed_on_up_to_the_first_stop_however_it_comes_in(
    pieces: list[str], stops: list[str]
) -> None:
    cutter, shown = StopText(stops), ""
    for piece in pieces:
        shown += "".join(part.text for part in cutter.pass_on(piece, 0.5))
        sofar = "".join(pieces)
        assert not any(stop in shown for stop in stops)
        assert sofar.startswith(shown)
    shown += "".join(part.text for part in cutter.rest())
    whole = "".join(pieces)
    # The stop that is whole first ends it; of those whole at once, the one that begins first.
    ends = [whole.find(stop) + len(stop) for stop in stops if stop in whole]
    assert cutter.is_over == bool(ends)
    if not ends:
        assert shown == whole
    else:
        assert any(whole.startswith(shown + stop) for stop in stops)
        assert not any(stop in shown for stop in stops)


def test_without_a_stop_nothing_is_held_back() -> None:
    cutter = StopText(())
    assert [piece.text for piece in cutter.pass_on("any text", 0.1)] == ["any text"]
    waiting = StopText(["\n\n"])
    assert [piece.text for piece in waiting.pass_on("a\n", 0.1)] == ["a"]
    assert [piece.text for piece in waiting.pass_on("b", 0.2)] == ["\n", "b"]
    twice = StopText(["aab"])
    assert list(twice.pass_on("aa", 0.1)) == []
    assert list(twice.pass_on("b", 0.1)) == [] and twice.is_over


def test_a_stop_text_ends_the_answer_before_it() -> None:
    chat = speaker("a-b,c. def")
    prompt = TOKENIZER.tokenize("\n")
    sampling = SamplingConfig(stop=(". d", "zzz"), compile="off")
    pieces = TextStream(chat, TOKENIZER, prompt, sampling)
    assert text_of(pieces) == "a-b,c"
    assert pieces.statistics.reason == "stop"


def test_what_is_held_back_is_shown_when_the_text_ends_before_the_stop_is_whole() -> None:
    sampling = SamplingConfig(stop=("! And",), compile="off", temperature=0.0)
    pieces = TextStream(speaker("hé!"), TOKENIZER, TOKENIZER.tokenize("\n"), sampling)
    assert text_of(pieces) == "hé!"


def test_a_stream_is_a_text_for_programs() -> None:
    written = "".join(generate_text(speaker("hé!"), TOKENIZER, "\n", temperature=0, compile="off"))
    assert written == "hé!"
    with pytest.raises(UsageError, match="--top-p is 3"):
        next(generate_text(speaker("x"), TOKENIZER, "\n", top_p=3.0))


@pytest.mark.parametrize("setting", [{"seed": 3}, {"device": "cpu"}, {"dtype": "int8"}], ids=str)
def test_a_setting_that_a_stream_would_not_heed_is_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=next(iter(setting))):
        next(generate_text(speaker("x"), TOKENIZER, "\n", **setting))


@settings(max_examples=25, deadline=None)
@given(
    old=st.lists(st.integers(0, 60), min_size=1, max_size=30),
    new=st.lists(st.integers(0, 60), min_size=1, max_size=30),
    common=st.lists(st.integers(0, 60), max_size=20),
)
def test_what_a_prompt_shares_with_the_one_before_is_not_read_again_and_changes_nothing(
    old: list[int], new: list[int], common: list[int]
) -> None:
    model = small_model()
    cache = model.new_cache(200)
    text_of(stream(model, common + old, cache, max_tokens=5))
    again = stream(model, common + new, cache, max_tokens=5)
    assert again.statistics.reused_tokens >= min(len(common), len(common + new) - 1)
    reused = again.statistics.reused_tokens
    assert text_of(again) == text_of(stream(model, common + new, max_tokens=5))
    assert reused <= len(common + new) - 1


def test_a_ring_that_has_gone_round_is_read_anew() -> None:
    model, prompt = small_model(), list(range(20))
    cache = model.new_cache(16)
    text_of(stream(model, prompt[:10], cache, context_length=16))
    again = stream(model, prompt[:10], cache, context_length=16)
    assert again.statistics.reused_tokens == 0
    assert text_of(again) == text_of(stream(model, prompt[:10], context_length=16))


@pytest.mark.parametrize("draft_tokens", [1, 3, 7])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_guessing_ahead_changes_no_token(draft_tokens: int, temperature: float) -> None:
    """Guesses that are right and that are wrong, up to the end of the context."""
    for seed in range(4):
        model = small_model(seed)
        prompt = [5, 6, 7, 8] * 5 + [5, 6]
        plain, ahead = (
            stream(model, prompt, temperature=temperature, max_tokens=60, draft_tokens=count)
            for count in (0, draft_tokens)
        )
        assert text_of(plain) == text_of(ahead)
        assert plain.statistics.new_tokens == ahead.statistics.new_tokens


def test_guesses_that_are_right_save_readings(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = speaker("ha", stops=False)
    prompt = TOKENIZER.tokenize("\nhaaaaaaaaaa")
    readings = []
    real = NoPEGPT.predict

    def counting(self: NoPEGPT, *arguments: Any, **more: Any) -> torch.Tensor:
        readings.append(1)
        return real(self, *arguments, **more)

    monkeypatch.setattr(NoPEGPT, "predict", counting)
    more = {"temperature": 0.0, "repeat_penalty": 0.0, "max_tokens": 64, "compile": "off"}
    text = "".join(generate_text(chat, TOKENIZER, "\nhaaaaaaaaaa", draft_tokens=7, **more))
    assert text == "a" * 64
    assert len(readings) <= 2 + 64 // 8
    assert len(prompt) > 3


def test_statistics_tell_what_was_read_and_written() -> None:
    model = small_model()
    cache = model.new_cache(100)
    first = stream(model, list(range(30)), cache)
    text_of(first)
    second = stream(model, list(range(40)), cache)
    text_of(second)
    took = second.statistics
    assert (took.prompt_tokens, took.reused_tokens, took.new_tokens) == (40, 30, 12)
    assert took.prompt_tokens_per_second == pytest.approx(10 / took.first_seconds)
    assert took.memory
    assert "prompt 40 tokens, 30 reused at " in str(took)
    assert json.loads(json.dumps(took.as_dict()))["tokens_per_second"] > 0


def test_the_first_tokens_stay_when_a_long_prompt_is_cut() -> None:
    model = small_model()
    prompt = list(range(50))
    cut = stream(model, prompt, context_length=20, pin_tokens=4)
    assert cut.statistics.prompt_tokens == 20
    expected = prompt[:4] + prompt[-16:]
    assert text_of(cut) == text_of(stream(model, expected, context_length=20, pin_tokens=4))


def test_a_context_that_the_memory_cannot_hold_is_refused_with_the_figures() -> None:
    sampling = SamplingConfig(context_length=10**12, max_tokens=10**12)
    with pytest.raises(
        CapacityError, match=r"a cache of 1 x .* takes .* TB, and cpu has"
    ) as caught:
        TextStream(small_model(), BYTES, [1, 2], sampling)
    assert caught.value.exit_code == 4


def test_weights_that_are_no_numbers_are_named_at_the_first_token() -> None:
    model = small_model()
    with torch.no_grad():
        model.decoder.layers[1].feed_forward.down.weight[0, 0] = math.nan
    with pytest.raises(NopeError, match="largest logit is nan"):
        text_of(stream(model, [1, 2, 3]))


def test_log_probabilities_are_those_of_the_model_before_any_filter() -> None:
    model = small_model()
    sampling = SamplingConfig(max_tokens=5, top_k=3, temperature=0.5, compile="off")
    pieces = TextStream(model, BYTES, [1, 2, 3], sampling, log_probabilities=4)
    text_of(pieces)
    tokens = [1, 2, 3]
    for score in pieces.scores:
        expected = torch.log_softmax(model(torch.tensor([tokens]))[0, -1].detach(), dim=-1)
        assert score["log_probability"] == pytest.approx(float(expected[score["token"]]), rel=1e-4)
        best = torch.topk(expected, 4)
        assert list(score["likeliest"]) == [str(token) for token in best.indices.tolist()]
        assert list(score["likeliest"].values()) == pytest.approx(best.values.tolist(), rel=1e-4)
        tokens.append(score["token"])
    assert len(pieces.scores) == 5
