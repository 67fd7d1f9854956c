"""What is said of a model's reach is what it computes, counted by hand."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from reference import SETTINGS, forward, write_published
from small import RECIPE, byte_dataset, small_model
from torch.nn import functional as F

from nope_gpt.adaptation.reach import prepare_for_context, scale_attention, sharpen, sharpened
from nope_gpt.config import PretrainConfig
from nope_gpt.errors import NopeError, UsageError
from nope_gpt.evaluation.calibration import CANDIDATES, calibrate, certain
from nope_gpt.evaluation.entropy import attention_entropies
from nope_gpt.evaluation.lengths import (
    bits_per_byte,
    bucket_edges,
    by_length,
    sliding_losses,
    spans_of,
    windowed_losses,
)
from nope_gpt.evaluation.passkey import finds, found_by_depth, probe
from nope_gpt.evaluation.scorers import OwnScorer
from nope_gpt.hub import storage
from nope_gpt.hub.locating import locate
from nope_gpt.model import NoPEGPT
from nope_gpt.network.sharpening import NONE, Growth, Sharpening
from nope_gpt.tokenization import BaseTokenizer
from nope_gpt.training.pretraining import pretrain

BYTES = BaseTokenizer.of_bytes()

TEXT = torch.randint(0, 61, (200,), generator=torch.Generator().manual_seed(3))


def loss_after(model, context, target) -> float:
    """Of one token, from the model's logits and nothing else."""
    with torch.no_grad():
        logits = model(context[None])[0, -1]
    return float(F.cross_entropy(logits, target))


@pytest.mark.parametrize("length", [8, 16, 32])
def test_every_token_is_predicted_once_at_every_length(length):
    model = small_model()
    spans = spans_of(TEXT, 32, 3)
    losses = windowed_losses(OwnScorer(model), spans, length)
    assert losses.shape == (3, 32)
    for span, own in zip(spans, losses, strict=True):
        for place in range(32):
            begin = place // length * length
            by_hand = loss_after(model, span[begin : place + 1], span[place + 1])
            assert float(own[place]) == pytest.approx(by_hand, abs=1e-5)


@pytest.mark.parametrize("stride", [1, 3, 5, 8])
def test_a_sliding_window_sees_all_but_a_stride(stride):
    model, length = small_model(), 8
    spans = spans_of(TEXT, 32, 2)
    losses = sliding_losses(OwnScorer(model), spans, length, stride)
    for span, own in zip(spans, losses, strict=True):
        for place in range(32):
            end = length + max(math.ceil((place + 1 - length) / stride), 0) * stride
            begin = max(min(end, 32) - length, 0)
            by_hand = loss_after(model, span[begin : place + 1], span[place + 1])
            assert float(own[place]) == pytest.approx(by_hand, abs=1e-5)


def test_a_window_as_long_as_its_stride_is_no_sliding_one():
    scorer, spans = OwnScorer(small_model()), spans_of(TEXT, 32, 2)
    slid = sliding_losses(scorer, spans, 8, 8)
    torch.testing.assert_close(slid, windowed_losses(scorer, spans, 8))


def test_sums_errors_and_buckets_are_those_of_the_tokens():
    generator = torch.Generator().manual_seed(0)
    losses = {length: torch.rand(4, 32, generator=generator) for length in (8, 32)}
    short, long = by_length(losses)
    assert (short.length, long.length) == (8, 32)
    assert short.added == (0.0, 0.0)
    differences = [float((losses[32][i] - losses[8][i]).mean()) for i in range(4)]
    mean = sum(differences) / 4
    spread = math.sqrt(sum((x - mean) ** 2 for x in differences) / 3)
    assert long.added.mean == pytest.approx(mean, abs=1e-6)
    assert long.added.error == pytest.approx(spread / 2, abs=1e-6)
    assert long.ratio == pytest.approx(long.perplexity / short.perplexity, rel=1e-5)
    for each in (short, long):
        assert [bucket.first for bucket in each.buckets[1:]] == [b.end for b in each.buckets[:-1]]
        assert (each.buckets[0].first, each.buckets[-1].end) == (0, each.length)
        total = sum((bucket.end - bucket.first) * bucket.loss for bucket in each.buckets)
        assert total / each.length == pytest.approx(each.loss.mean, rel=1e-5)
    last = long.buckets[-1]
    assert last.loss == pytest.approx(float(losses[32][:, last.first :].mean()), rel=1e-5)


def test_buckets_are_eighths_and_then_halves_of_what_was_trained():
    assert bucket_edges(64, 64) == [0, 8, 16, 24, 32, 40, 48, 56, 64]
    assert bucket_edges(128, 64)[8:] == [64, 96, 128]
    assert bucket_edges(3, 3) == [0, 1, 2, 3]


def test_spans_are_spread_over_a_text_and_overlap_in_nothing_that_is_predicted():
    spans = spans_of(torch.arange(101), 10, 5)
    assert spans[:, 0].tolist() == [0, 20, 40, 60, 80]
    assert (spans[:, 1:] - spans[:, :-1] == 1).all()
    assert len(spans_of(torch.arange(101), 10, 99)) == 10
    with pytest.raises(
        UsageError, match="10 tokens, and a stretch that all contexts divide has 10"
    ):
        spans_of(torch.arange(10), 10, 5)


def test_bits_are_of_bytes():
    assert bits_per_byte(8 * math.log(2), 4) == pytest.approx(2.0)


def test_entropies_are_those_of_the_probabilities():
    model = small_model()
    positions = torch.tensor([0, 1, 5, 19])
    tokens = TEXT[:40].view(2, 20)
    found = attention_entropies(model, tokens, positions)
    assert found.shape == (2, 4, 4)
    assert found[..., 0].abs().max() == 0, "the first token sees itself alone"
    assert (found <= torch.log(positions + 1.0) + 1e-5).all()
    hidden = model.token_embeddings(tokens)
    for layer, own in zip(model.decoder.layers, found, strict=True):
        normed = layer.attention_norm(hidden)
        attention = layer.attention
        for head in range(4):
            by_hand = torch.zeros(4)
            for row in range(2):
                q = attention.q_proj(normed[row]).view(20, 4, 8)[:, head]
                k = attention.k_proj(normed[row]).view(20, 2, 8)[:, head // 2]
                for index, place in enumerate(positions.tolist()):
                    p = torch.softmax(k[: place + 1] @ q[place] / math.sqrt(8), dim=0)
                    by_hand[index] += -(p * p.log()).sum() / 2
            torch.testing.assert_close(own[head], by_hand.detach(), atol=1e-5, rtol=1e-5)
        hidden = layer(hidden)


class Copier:
    """Looks for what stood before a number the last time, and copies what followed."""

    device = torch.device("cpu")

    def __init__(self, reach: int) -> None:
        self.reach = reach

    def planned(self, length):  # noqa: ARG002
        return contextlib.nullcontext(NONE)

    def last_logits(self, tokens, count):
        text = tokens[0, -self.reach :].tolist()
        logits = torch.zeros(1, count, 257)
        for place in range(count):
            seen = text[: len(text) - count + place + 1]
            tail = seen[-8:]
            for at in range(len(seen) - 9, -1, -1):
                if seen[at : at + 8] == tail:
                    logits[0, place, seen[at + 8]] = 1.0
                    break
        return logits


def test_a_number_is_found_by_what_copies_and_where_it_reaches():
    filler = BYTES.tokenize("The grass is green. The sky is blue. ")
    found = found_by_depth(Copier(10**6), BYTES, filler, [200, 400], num_depths=3, num_keys=4)
    assert [(each.length, each.depth) for each in found] == [
        (length, depth) for length in (200, 400) for depth in (0.0, 0.5, 1.0)
    ]
    assert all(each.share == 1.0 for each in found)
    near = found_by_depth(Copier(150), BYTES, filler, [400], num_depths=3, num_keys=4)
    assert [each.share for each in near] == [0.0, 0.0, 1.0]


def test_a_probe_has_its_length_its_number_at_its_depth_and_its_question_at_the_end():
    filler = BYTES.tokenize("abc")
    for depth in (0.0, 0.5, 1.0):
        asked = probe(BYTES, filler, 300, depth, "1")
        assert len(asked.tokens) + len(asked.answer) - 1 == 300, "all that is read"
        text = BYTES.decode_tokens(asked.tokens)
        key = BYTES.decode_tokens(asked.answer).strip()
        assert key.isdecimal()
        assert len(key) == 5
        assert text.count(key) == 2
        assert text.endswith("What is the pass key? The pass key is")
    with pytest.raises(UsageError, match="take 103 tokens, and the context has 50"):
        probe(BYTES, filler, 50, 0.5, "1")


def test_found_means_that_greedy_decoding_writes_it():
    model = small_model(vocabulary_size=257)
    scorer = OwnScorer(model)
    asked = probe(BYTES, BYTES.tokenize("abc"), 120, 0.5, "1")
    greedy = {"max_tokens": len(asked.answer), "temperature": 0, "repeat_penalty": 0}
    written = model.generate(torch.tensor(asked.tokens), **greedy)
    answer = [int(token) for token, _ in written]
    assert finds(scorer, asked._replace(answer=answer))
    assert not finds(scorer, asked._replace(answer=[*answer[:-1], (answer[-1] + 1) % 257]))
    assert not finds(scorer, asked)


HEADS = {name: SETTINGS[name] for name in ("num_q_heads", "num_kv_heads")}


@pytest.mark.parametrize("per_head", [False, True])
def test_scales_folded_into_the_queries_are_those_of_the_scores(tmp_path, per_head):
    tensors = write_published(tmp_path / "model")
    model = NoPEGPT.from_pretrained(tmp_path / "model")
    generator = torch.Generator().manual_seed(0)
    scales = 1 + torch.rand(3, 6, generator=generator) if per_head else torch.full((3, 6), 1.37)
    scale_attention(model, scales if per_head else 1.37)
    tokens = TEXT[:40]
    by_hand = forward(tensors, tokens, scales=scales, **HEADS)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens[None])[0], by_hand, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path / "scaled")
    again = NoPEGPT.from_pretrained(tmp_path / "scaled")
    with torch.no_grad():
        assert torch.equal(again(tokens[None]), model(tokens[None]))


@pytest.mark.slow
@pytest.mark.parametrize("compile", ["off", "on"])
@pytest.mark.parametrize(("capacity", "pinned"), [(64, 0), (20, 0), (20, 3)])
def test_a_scale_that_grows_is_that_of_the_tokens_that_are_seen(
    tmp_path, compile, capacity, pinned
):
    """Read whole, in pieces, one by one, and beyond what the cache holds."""
    tensors = write_published(tmp_path / "model")
    model = NoPEGPT.from_pretrained(tmp_path / "model")
    model.trained_context_length = 8
    sharpen(model, Sharpening(growth=0.7))
    tokens = TEXT[:40]
    expected = forward(tensors, tokens, growth=(0.7, 8), **HEADS)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens[None])[0], expected, atol=1e-5, rtol=1e-5)
    window = forward(tensors, tokens, growth=(0.7, 8), window=capacity, pinned=pinned, **HEADS)
    for size in (1, 5, 13, 40):
        cache = model.new_cache(capacity, pinned=pinned, compile=compile)
        pieces = [model.predict(p[None], cache, every=True)[0] for p in tokens.split(size)]
        torch.testing.assert_close(torch.cat(pieces), window, atol=1e-5, rtol=1e-5)


def test_rows_of_unequal_length_have_each_its_own_scale(tmp_path):
    write_published(tmp_path / "model")
    model = NoPEGPT.from_pretrained(tmp_path / "model")
    model.trained_context_length = 4
    sharpen(model, Sharpening(growth=0.7))
    cache = model.new_cache(64, 2, compile="off")
    model.predict(TEXT[None, :5], cache, [0])
    model.predict(TEXT[None, 50:70], cache, [1])
    found = model.predict(TEXT[[5, 70]][:, None], cache)
    with torch.no_grad():
        for row, own in enumerate((TEXT[:6], TEXT[50:71])):
            expected = model(own[None])[0, -1]
            torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=1e-5)


def test_losses_of_integers_are_those_of_their_logits():
    model = small_model().quantize(torch.float32)
    spans = spans_of(TEXT, 32, 2)
    losses = windowed_losses(OwnScorer(model), spans, 32)
    logits = model(spans[:, :-1])
    by_hand = F.cross_entropy(logits.mT, spans[:, 1:], reduction="none")
    torch.testing.assert_close(losses, by_hand, atol=1e-4, rtol=1e-4)


def test_integers_are_scaled_as_what_they_stand_for():
    model, half = small_model(), small_model()
    scale_attention(model, 1.5)
    scale_attention(half.quantize(torch.float32), 1.5)
    with torch.no_grad():
        expected = model.quantize(torch.float32)(TEXT[None, :30])
        torch.testing.assert_close(half(TEXT[None, :30]), expected, atol=1e-5, rtol=1e-5)


def test_a_scale_grows_beyond_its_length_alone():
    factors = Growth(0.5, 8).factors(torch.tensor([1, 4, 8, 16, 32]))
    assert factors.tolist() == pytest.approx(
        [1, 1, 1, 1 + 0.5 * math.log(2), 1 + 0.5 * math.log(4)]
    )


def test_weights_and_growth_come_back_as_they_were():
    model = small_model()
    growth = Growth(0.3, 16)
    model.decoder.set_growth(growth)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with sharpened(model, Sharpening(scale=1.3), 64):
        changed = [name for name, v in model.state_dict().items() if not v.equal(before[name])]
        assert all("q_proj" in name for name in changed)
        assert len(changed) == 2
        assert model.decoder.growth is None
    assert model.decoder.growth == growth
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("found", [Sharpening(scale=1.3), Sharpening(growth=0.7)])
def test_a_longer_context_is_evaluated_as_it_would_be_planned(found, dtype):
    """And the trained one, before and after it, as always."""
    model = small_model()
    model = model.quantize(torch.float32) if dtype == torch.int8 else model
    model.trained_context_length = 8
    spans = spans_of(TEXT, 32, 2)
    plain = {length: windowed_losses(OwnScorer(model), spans, length) for length in (8, 16, 32)}
    model.sharpenings = {16: found}
    scorer = OwnScorer(model)
    seen = {}
    for length in (8, 32, 16, 8):
        with scorer.planned(length) as used:
            seen[length] = windowed_losses(scorer, spans, length)
        assert used == (NONE if length == 8 else found)
    assert torch.equal(seen[8], plain[8])
    prepare_for_context(model, 16)
    for length in (16, 32):
        expected = windowed_losses(OwnScorer(model), spans, length)
        torch.testing.assert_close(seen[length], expected)
        assert not torch.allclose(seen[length], plain[length])


def self_written(sharpness: float) -> tuple[NoPEGPT, torch.Tensor]:
    """A model whose attention is sharp, and spans of text that it wrote itself."""
    torch.manual_seed(0)
    model = small_model()
    for layer in model.decoder.layers:
        layer.attention.out_proj.weight.data *= 4
    model.token_embeddings.weight.data *= 3
    scale_attention(model, sharpness)
    tokens = torch.randint(0, 61, (64, 1))
    with torch.inference_mode():
        for _ in range(64):
            drawn = torch.multinomial(model(tokens)[:, -1].softmax(-1), 1)
            tokens = torch.cat([tokens, drawn], dim=1)
    return model, tokens


def test_the_scale_that_was_taken_away_is_found_again():
    model, spans = self_written(sharpness=6.0)
    scale_attention(model, 1 / 1.3)
    (choice,) = calibrate(model, spans, 32, [64])
    assert choice.best.scale in (1.2, 1.25, 1.3, 1.4)
    assert choice.helps
    assert choice.gain.mean > 0.0
    assert choice.searched.keys() == set(CANDIDATES)
    assert choice.searched[choice.best] == min(choice.searched.values())


def test_a_gain_has_to_be_larger_where_fewer_spans_judge_it():
    """Student's t at 97.5%, from its tables."""
    for num_spans, expected in ((4, 3.182), (5, 2.776), (9, 2.306), (31, 2.042), (10**6, 1.960)):
        assert certain(num_spans) == pytest.approx(expected, rel=0.04)


def test_there_is_no_gain_where_there_is_nothing_to_gain():
    model, spans = self_written(sharpness=6.0)
    (choice,) = calibrate(model, spans, 32, [64])
    assert choice.best.scale in (1.0, 1.03)
    assert choice.best.growth <= 0.1
    assert not choice.helps
    with pytest.raises(UsageError, match="3 stretches as long as the longest context, and 8 are"):
        calibrate(model, spans[:3], 32, [64])


def test_a_planned_context_takes_the_scale_of_the_next_length_and_keeps_it(tmp_path):
    model = small_model()
    model.trained_context_length = 64
    model.sharpenings = {128: Sharpening(scale=1.1), 256: Sharpening(scale=1.25)}
    model.save_pretrained(tmp_path / "model")
    stated = json.loads((tmp_path / "model" / "config.json").read_text())
    assert stated["attention_scales"] == {"128": {"scale": 1.1}, "256": {"scale": 1.25}}
    for planned, scale in ((64, 1.0), (65, 1.1), (128, 1.1), (200, 1.25), (9999, 1.25)):
        own = NoPEGPT.from_pretrained(tmp_path / "model")
        assert prepare_for_context(own, planned) == Sharpening(scale=scale)
        for layer, before in zip(own.decoder.layers, model.decoder.layers, strict=True):
            expected = before.attention.q_proj.weight * scale
            torch.testing.assert_close(layer.attention.q_proj.weight, expected)
        if scale != 1.0:
            assert prepare_for_context(own, 9999) == NONE, "scaled once, for good"


def test_a_model_without_scales_is_left_alone(tmp_path):
    write_published(tmp_path / "model")
    model = NoPEGPT.from_pretrained(tmp_path / "model")
    before = [layer.attention.q_proj.weight.clone() for layer in model.decoder.layers]
    assert prepare_for_context(model, 10**6) == NONE
    model.trained_context_length = 8
    assert prepare_for_context(model, 10**6) == NONE
    for layer, own in zip(model.decoder.layers, before, strict=True):
        assert torch.equal(layer.attention.q_proj.weight, own)


@pytest.mark.parametrize(
    "stated",
    [
        [1],
        "x",
        {"a": {"scale": 1.1}},
        {"128": 1.1},
        {"128": {"scale": "x"}},
        {"128": {"scale": 0}},
        {"128": {"scale": 1e9}},
        {"128": {"growth": -1}},
        {"128": {"shift": 1.1}},
        {"0": {"scale": 1.1}},
        {"9": None},
    ],
)
def test_scales_that_are_none_are_refused(tmp_path, stated):
    write_published(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attention_scales": stated}))
    with pytest.raises(NopeError, match="attention_scales"):
        NoPEGPT.from_pretrained(tmp_path / "model")


# The command


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Path:
    """A text, a data set and a run on it."""
    root = tmp_path_factory.mktemp("workshop")
    words = "the list holds a value and the function sets its name if an error was raised "
    with contextlib.chdir(root):
        Path("corpus").mkdir()
        for number in range(40):
            Path("corpus", f"{number}.txt").write_text(words * (number + 2))
        Path("held-out.txt").write_text("Der Wert wäre 1. " + words * 20)
        Path("bytes.bin").write_bytes(b"text \xff")
        byte_dataset(Path("corpus"), Path("datasets"))
        pretrain(PretrainConfig(**RECIPE | {"tokens_per_sample": 64, "max_steps": 4}), [])
    return root


MODEL = ["--model", "runs/pretrain", "--device", "cpu"]


@pytest.fixture
def here(workshop, tmp_path, monkeypatch) -> None:
    """The workshop, for the test and for the commands it runs."""
    for path in workshop.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_what_is_printed_is_what_was_computed(nope):
    words = ["--lengths", "1,2", "--num-tokens", "256", "--passkey-keys", "0"]
    done = nope("eval", *MODEL, *words, "--text", "held-out.txt", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    model = NoPEGPT.from_pretrained("runs/pretrain")
    text = torch.tensor(BYTES.tokenize(Path("held-out.txt").read_text()))
    spans = spans_of(text, 128, 2)
    with torch.no_grad():
        by_hand = model(spans[:, :-1], spans[:, 1:], each=True)
    assert [each["length"] for each in found["lengths"]] == [64, 128]
    assert found["lengths"][1]["loss"] == pytest.approx(float(by_hand.mean()), rel=1e-5)
    assert found["tokens"] == found["bytes"] == 256
    bits = found["lengths"][1]["loss"] / math.log(2)
    assert found["lengths"][1]["bits_per_byte"] == pytest.approx(bits, rel=1e-6)
    shown = nope("eval", *MODEL, *words, "--text", "held-out.txt").stdout
    assert "256 tokens, the same at every length" in shown
    for each in found["lengths"]:
        assert f"{each['loss']:.4f} ± {each['loss_error']:.4f}" in shown
        assert f"{each['perplexity']:.3f}" in shown
        for bucket in each["buckets"]:
            assert f"{bucket['loss']:.4f}" in shown


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_the_hold_out_is_read_and_all_of_it_drawn(nope, tmp_path):
    pytest.importorskip("matplotlib")
    words = ["--lengths", "1,2,4", "--passkey-depths", "3", "--passkey-keys", "1"]
    done = nope("eval", *MODEL, *words, "--context-length", 128, "--plot", tmp_path / "a.svg")
    assert done.returncode == 0, done.stderr
    assert "hidden numbers found, by depth" in done.stdout
    assert "Entropy of attention" in (tmp_path / "a.svg").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "there is no model"),
        ([*MODEL, "--lengths", "1,x"], "--lengths is '1,x', and must be whole numbers from 1 to"),
        ([*MODEL, "--lengths", "0"], "--lengths is '0'"),
        ([*MODEL, "--text", "none.txt"], "there is no such file"),
        ([*MODEL, "--text", "bytes.bin"], "byte 5 is not UTF-8"),
        ([*MODEL, "--dataset", "none"], "there is no data set 'none'"),
        ([*MODEL, "--lengths", "1024"], "and a stretch that all contexts divide has 65,536"),
        ([*MODEL, "--stride", "65"], "--stride is 65, and the window has 64 tokens"),
        ([*MODEL, "--lengths", "1"], "what is asked of it take 103 tokens, and the context has 64"),
        ([*MODEL, "--plot", "a.txt"], "--plot is 'a.txt', and must end in one of .png"),
    ],
)
@pytest.mark.usefixtures("here")
def test_mistakes_are_named(nope, words, said):
    done = nope("eval", *words)
    assert done.returncode in (1, 2, 3), done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--calibrate", "--plot", "a.svg"], "--plot is of what is measured"),
        (["--calibrate", "--record"], "--record is of what is measured"),
        (["--record", "--adapter", "runs/pretrain"], "--adapter changes them"),
        (["--calibrate", "--dtype", "int8"], "--dtype int8 changes them"),
    ],
)
@pytest.mark.usefixtures("here")
def test_what_is_kept_is_of_the_weights_that_are_stored(nope, words, said):
    done = nope("eval", *MODEL, "--text", "held-out.txt", *words)
    assert done.returncode == 2
    assert said in " ".join(done.stderr.split())


WORDS = ["--lengths", "1,2", "--num-tokens", "512", "--context-length", "128"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.usefixtures("here")
def test_transformers_finds_the_same_of_the_same_model(nope, tmp_path, anchored):
    """An oracle that shares no code: the export in the real library, beside ours."""
    own, place = tmp_path / "ours", tmp_path / "theirs"
    run = locate("runs/pretrain")
    tokenizer, model = BaseTokenizer.load(run), NoPEGPT.from_pretrained(run)
    model.first_token = tokenizer.end_of_text if anchored else None
    model.save_pretrained(own)
    tokenizer.save(own)
    done = nope("export", "--model", own, "--format", "transformers", "--output", place)
    assert done.returncode == 0, done.stderr
    words = [*WORDS, "--text", "held-out.txt", "--device", "cpu", "--dtype", "float32", "--json"]
    ours = nope("eval", "--model", own, *words)
    theirs = nope("eval", "--model", place, "--library", "transformers", *words)
    assert theirs.returncode == 0, theirs.stderr
    one, other = (json.loads(done.stdout) for done in (ours, theirs))
    assert one["tokens"] == other["tokens"] == 512
    assert one["bytes"] == pytest.approx(other["bytes"], abs=4)
    for a, b in zip(one["lengths"], other["lengths"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        for x, y in zip(a["buckets"], b["buckets"], strict=True):
            assert x["loss"] == pytest.approx(y["loss"], rel=1e-5)
    assert one["sliding"]["loss"] == pytest.approx(other["sliding"]["loss"], rel=1e-5)
    assert one["passkeys"] == other["passkeys"]
    assert other["attention_entropy"] == []


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_what_is_recorded_is_in_the_run_its_tensorboard_and_the_card_of_its_export(nope):
    pytest.importorskip("matplotlib")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shutil.copytree("runs/pretrain", "own/pretrain")
    words = [*WORDS, "--text", "held-out.txt", "--device", "cpu", "--record", "--json"]
    done = nope("eval", "--model", "own/pretrain", *words)
    assert done.returncode == 0, done.stderr
    assert "kept in own/pretrain/evaluation.json" in done.stderr
    found, kept = (
        json.loads(done.stdout),
        json.loads(Path("own/pretrain/evaluation.json").read_text()),
    )
    assert kept["weights_sha256"] == storage.digest(locate("own/pretrain"))
    assert kept["lengths"] == found["lengths"]
    events = EventAccumulator("own/pretrain").Reload()
    assert events.Images("Reach")[0].step == 4
    for each in found["lengths"]:
        (scalar,) = events.Scalars(f"Perplexity at {each['length'] // 128}x")
        assert scalar.value == pytest.approx(each["perplexity"], rel=1e-5)
    assert nope("export", "--model", "own/pretrain", "--output", "out").returncode == 0
    card = Path("out/README.md").read_text()
    for each in found["lengths"]:
        row = f"| {each['length']} tokens | {each['length'] // 128}x | {each['perplexity']:.3f} | "
        assert row in card
    assert "![Loss by position and length](evaluation.png)" in card
    assert (
        Path("out/evaluation.png").read_bytes() == Path("own/pretrain/evaluation.png").read_bytes()
    )
    other = kept | {"weights_sha256": "0" * 64}
    Path("own/pretrain/evaluation.json").write_text(json.dumps(other))
    assert nope("export", "--model", "own/pretrain", "--output", "again").returncode == 0
    assert "How far it reaches" not in Path("again/README.md").read_text(), "of other weights"
    Path("own/pretrain/evaluation.json").write_text('{"lengths": 3}')
    done = nope("export", "--model", "own/pretrain", "--output", "third")
    assert done.returncode == 1
    assert "evaluation.json" in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--calibrate", "--text", "held-out.txt"], "--calibrate is for models of nope's own"),
        (["--record", "--text", "held-out.txt"], "--record is for models of nope's own"),
        (["--dtype", "int8", "--text", "held-out.txt"], "--dtype int8 is for models of nope's own"),
        ([], "a data set holds the tokens of one of nope's tokenizers"),
        (["--text", "held-out.txt", "--model", "nowhere"], "transformers does not read this model"),
    ],
)
@pytest.mark.usefixtures("here")
def test_what_is_not_for_models_of_another_library_is_told(nope, words, said):
    done = nope("eval", "--library", "transformers", "--model", "runs/pretrain", *words)
    assert done.returncode in (1, 2), done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_what_is_calibrated_is_written_where_it_helps_and_nowhere_else(nope, tmp_path):
    model, spans = self_written(sharpness=6.0)
    model.trained_context_length = 16
    tokenizer = BaseTokenizer.of_bytes()
    padded = small_model(vocabulary_size=257)
    padded.load_state_dict(
        model.state_dict()
        | {
            "token_embeddings.weight": torch.nn.functional.pad(
                model.token_embeddings.weight, (0, 0, ord("A"), 196 - ord("A"))
            )
        }
    )
    padded.trained_context_length = 16
    scale_attention(padded, 1 / 1.3)
    padded.save_pretrained(tmp_path / "dull")
    tokenizer.save(tmp_path / "dull")
    letters = spans[:, :64].flatten() + ord("A")  # No carriage return, which is left out.
    (tmp_path / "text.txt").write_bytes(bytes(letters.tolist()))
    words = ["--text", "text.txt", "--calibrate", "--device=cpu", "--passkey-keys=0", "--json"]
    done = nope("eval", "--model", "dull", *words, "--lengths", "2,4")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    helpful = {str(c["length"]): {"scale": c["scale"]} for c in found["calibration"] if c["helps"]}
    assert helpful == found["attention_scales"] != {}
    stated = json.loads((tmp_path / "dull" / "config.json").read_text())
    off = {str(c["length"]): {} for c in found["calibration"] if not c["helps"]}
    assert stated["attention_scales"] == off | helpful
    written = nope("generate", "the" * 13, "--model", "dull", "--max-tokens", "2", "--device=cpu")
    assert f"its attention is scaled by {helpful['64']['scale']:g}" in written.stderr
    scale_attention(padded, 1.3)
    padded.save_pretrained(tmp_path / "sharp")
    tokenizer.save(tmp_path / "sharp")
    path = tmp_path / "sharp" / "config.json"
    plain = path.read_text()
    nope("eval", "--model", "sharp", *words, "--lengths", "4")
    assert path.read_text() == plain, "there is no gain, and nothing was there"
    before = {"attention_scales": {"64": {"scale": 1.8}, "128": {"scale": 1.5}}}
    path.write_text(json.dumps(json.loads(plain) | before))
    nope("eval", "--model", "sharp", *words, "--lengths", "4")
    after = {"64": {}, "128": {"scale": 1.5}}
    assert json.loads(path.read_text())["attention_scales"] == after, "found, and found no gain"
    refused = nope("eval", *MODEL, *words, "--lengths", "2")
    assert refused.returncode == 2
    assert "this is a checkpoint, and its files stay as they are" in refused.stderr
