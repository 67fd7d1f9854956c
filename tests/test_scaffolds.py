"""What helps a model to learn: recall, growing samples, an anchor, blocks that begin at zero."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from reference import forward
from safetensors.torch import load_file
from small import (
    HELPED,
    SHAPE,
    assert_resumed_is_uninterrupted,
    byte_dataset,
    small_model,
    small_run,
)
from small_chats import dataset_of, questions, tuned, tuning
from torch.nn import functional as F
from transformers import AutoTokenizer

from nope_gpt.adaptation import adapters
from nope_gpt.config import ExportConfig, PretrainConfig, SamplingConfig
from nope_gpt.data.batches import Batch, TextBatches
from nope_gpt.data.shards import Dataset
from nope_gpt.errors import NopeError, UsageError
from nope_gpt.evaluation.lengths import windowed_losses
from nope_gpt.evaluation.scorers import OwnScorer
from nope_gpt.export.exporting import export
from nope_gpt.export.gguf_reader import GgufReader
from nope_gpt.generation.batching import Request, answers
from nope_gpt.generation.beams import beam_search
from nope_gpt.generation.streaming import TextStream
from nope_gpt.hub import storage
from nope_gpt.hub.history import logged
from nope_gpt.hub.published_layout import TIED
from nope_gpt.model import NoPEGPT
from nope_gpt.network import initialization
from nope_gpt.network.blocks import NORM_EPSILON
from nope_gpt.network.cross_entropy import IGNORED
from nope_gpt.network.recall import Recall, before_each
from nope_gpt.tokenization import BaseTokenizer
from nope_gpt.training.schedules import sample_length

HEADS = {name: SHAPE[name] for name in ("num_q_heads", "num_kv_heads")}

TOKENS = torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def dataset(corpus: Path, tmp_path: Path) -> Path:
    return byte_dataset(corpus, tmp_path / "datasets")


def checkpoint(root: Path, step: int) -> Path:
    return root / "pretrain" / "checkpoints" / f"step-{step}"


def recalling(layers: int) -> NoPEGPT:
    model = small_model(num_decoder_layers=layers)
    model.recall = Recall(32)
    return model


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_the_second_loss_is_that_of_the_token_before_after_the_third_block(layers: int) -> None:
    model = recalling(layers)
    targets = TOKENS.roll(-1, 1)
    with torch.no_grad():
        loss, again = model(TOKENS, targets, recalls=True)
        assert loss == model(TOKENS, targets)
        hidden = model.token_embeddings(TOKENS)
        for layer in list(model.decoder.layers)[:3]:
            hidden = layer(hidden)
        normed = hidden / (hidden.pow(2).mean(dim=-1, keepdim=True) + NORM_EPSILON).sqrt()
        logits = normed @ model.recall.weight.T @ model.token_embeddings.weight.T
        by_hand = sum(F.cross_entropy(logits[row, 1:], TOKENS[row, :-1]) * 11 for row in range(2))
    torch.testing.assert_close(again, by_hand, atol=1e-3, rtol=1e-5)


def test_no_token_is_asked_for_one_of_another_document() -> None:
    documents = torch.tensor([[0, 0, 0, 1, 1, 2]])
    tokens = torch.tensor([[5, 6, 7, 8, 9, 10]])
    expected = [[IGNORED, 5, 6, IGNORED, 8, IGNORED]]
    assert before_each(tokens, documents).tolist() == expected
    assert before_each(tokens, None).tolist() == [[IGNORED, 5, 6, 7, 8, 9]]


def test_the_head_is_not_moved_by_what_is_asked_of_an_early_block() -> None:
    model = recalling(2)
    _, again = model(TOKENS, TOKENS.roll(-1, 1), recalls=True)
    again.backward()
    assert model.recall.weight.grad.abs().max() > 0
    assert not model.norm.weight.grad.any()
    embedded = torch.zeros(61, dtype=torch.bool)
    embedded[TOKENS.flatten()] = True
    moved = model.token_embeddings.weight.grad.abs().amax(dim=1) > 0
    assert not moved[~embedded].any(), "as the head, all of its rows would move"


def test_recall_leaves_an_ordinary_model_and_its_loss_is_not_in_the_reported_one(
    dataset: Path, tmp_path: Path
) -> None:
    told = small_run(dataset, tmp_path / "with", recall=0.5)
    plain = small_run(dataset, tmp_path / "without")
    assert told.losses[0] == pytest.approx(plain.losses[0], abs=1e-6)
    assert told.losses[2] != plain.losses[2]
    again = [report.figures["Recall Loss"] for report in told.reports]
    assert all(0 < loss < 12 for loss in again)
    rows = [line.row for line in logged(tmp_path / "with" / "pretrain" / "metrics.jsonl")]
    assert [("recall_loss" in row, "eval_recall_loss" in row) for row in rows] == [
        ("loss" in row, "eval_loss" in row) for row in rows
    ]
    paths = [checkpoint(tmp_path / name, 6) for name in ("with", "without")]
    configs = [json.loads((path / "config.json").read_text()) for path in paths]
    assert configs[0] == configs[1]
    tensors, others = (load_file(path / "model.safetensors") for path in paths)
    assert tensors.keys() == others.keys()
    tokens = TOKENS[0]
    with torch.no_grad():
        found = NoPEGPT.from_pretrained(paths[0])(tokens[None])[0]
    torch.testing.assert_close(found, forward(tensors, tokens, **HEADS), atol=1e-5, rtol=1e-5)


def test_its_weight_falls_evenly_from_the_first_step_to_the_end(
    dataset: Path, tmp_path: Path
) -> None:
    """The gradient of each step, by hand, from the weights of the checkpoint before it."""
    settings = {"recall": 0.7, "checkpoint_interval": 1, "keep_checkpoints": 9}
    told = small_run(dataset, tmp_path / "run", **settings)
    batches = TextBatches(
        Dataset.open(dataset), tokens_per_sample=16, batch_size=4, micro_batches_per_step=2, seed=0
    )
    for step in (1, 3, 5):
        place = checkpoint(tmp_path / "run", step)
        model = NoPEGPT.from_saved(storage.load(place)).train()
        model.recall = Recall(32)
        model.recall.weight.data = load_file(place / "recall.safetensors")["recall.weight"]
        for batch in batches.micro_batches(step, 0, 1):
            loss, again = model(batch.tokens, batch.targets, recalls=True)
            ((loss + 0.7 * (1 - step / 6) * again) / 128).backward()
        norm = torch.stack([weight.grad.norm() for weight in model.parameters()]).norm()
        assert told.reports[step].gradient_norm == pytest.approx(float(norm), rel=1e-4)


@pytest.mark.parametrize(
    "settings", [{"recall": 0.5}, {"length_growth": 0.7}, {**HELPED, "length_growth": 0.8}]
)
def test_a_run_resumed_in_the_middle_is_bitwise_the_uninterrupted_one(
    dataset: Path, tmp_path: Path, settings: dict[str, float]
) -> None:
    assert_resumed_is_uninterrupted(dataset, tmp_path, 2, tokens_per_sample=64, **settings)


def test_recall_is_not_begun_in_the_middle_of_a_run(dataset: Path, tmp_path: Path) -> None:
    small_run(dataset, tmp_path)
    with pytest.raises(UsageError, match="the recall changed since the run began"):
        small_run(dataset, tmp_path, recall=0.5, max_steps=9, resume=True)


def test_lengths_double_in_equal_times_up_to_the_whole() -> None:
    lengths = [sample_length(step, 100, 256, 0.8) for step in range(100)]
    assert lengths == [16] * 20 + [32] * 20 + [64] * 20 + [128] * 20 + [256] * 20
    assert {sample_length(step, 100, 256, 0.0) for step in range(100)} == {256}
    assert {sample_length(step, 10, 30, 0.8) for step in range(10)} == {30}, "15 are too few"
    assert sorted({sample_length(step, 10, 1000, 1.0) for step in range(10)}) == [125, 250, 500]


def test_growing_samples_have_the_tokens_of_whole_ones_and_see_no_further_than_their_piece(
    dataset: Path, tmp_path: Path
) -> None:
    """Of the first step, by hand."""
    told = small_run(dataset, tmp_path / "run", tokens_per_sample=64, length_growth=0.7)
    batches = TextBatches(
        Dataset.open(dataset), tokens_per_sample=64, batch_size=4, micro_batches_per_step=2, seed=0
    )
    torch.manual_seed(0)
    model = NoPEGPT(vocabulary_size=257, **SHAPE)
    total, num_tokens = 0.0, 0
    with torch.no_grad():
        for batch in batches.micro_batches(0, 0, 1):
            for row, right in zip(batch.tokens, batch.targets, strict=True):
                for start in range(0, 64, 16):
                    piece = slice(start, start + 16)
                    total += float(model(row[None, piece], right[None, piece]))
                    num_tokens += 16
    assert told.losses[0] == pytest.approx(total / num_tokens, rel=1e-5)
    assert [report.tokens for report in told.reports] == [512 * (i + 1) for i in range(6)]


def test_what_cannot_grow_or_be_anchored_is_refused() -> None:
    with pytest.raises(UsageError, match="1023 tokens cannot be halved so"):
        PretrainConfig(length_growth=0.5, tokens_per_sample=1023)
    with pytest.raises(UsageError, match="the other documents in it would not see it"):
        PretrainConfig(anchor=True, document_masking=True)


def test_what_helps_is_on_by_default_wherever_it_can_be() -> None:
    config = PretrainConfig()
    assert (config.anchor, config.length_growth, config.recall) == (True, 0.8, 0.5)
    assert PretrainConfig(document_masking=True).anchor is False
    for tokens in (16, 1023):
        assert PretrainConfig(tokens_per_sample=tokens).length_growth == 0.0


def test_an_anchor_is_neither_begun_nor_dropped_in_the_middle_of_a_run(
    dataset: Path, tmp_path: Path
) -> None:
    for name, before in (("with", True), ("without", False)):
        small_run(dataset, tmp_path / name, anchor=before)
        with pytest.raises(UsageError, match="the anchor changed since the run began"):
            small_run(dataset, tmp_path / name, anchor=not before, max_steps=9, resume=True)


def test_pieces_keep_the_documents_of_their_tokens() -> None:
    tokens = torch.arange(24).view(2, 12)
    batch = Batch(tokens, tokens + 1, tokens // 5).in_pieces(4)
    assert batch.tokens.tolist() == torch.arange(24).view(6, 4).tolist()
    assert torch.equal(batch.targets, batch.tokens + 1)
    assert torch.equal(batch.documents, batch.tokens // 5)


def test_a_network_that_begins_at_zero_adds_nothing_and_learns_all_the_same(
    dataset: Path, tmp_path: Path
) -> None:
    model = small_model()
    initialization.zero(model)
    with torch.no_grad():
        hidden = model.token_embeddings(TOKENS)
        assert torch.equal(model.decoder(hidden), hidden)
    told = small_run(dataset, tmp_path, initialization="zero", max_steps=30)
    assert told.losses[-1] < told.losses[0] - 0.5
    for name, weight in load_file(checkpoint(tmp_path, 30) / "model.safetensors").items():
        assert weight.abs().max() > 0, name


# The anchor


def anchored_model() -> NoPEGPT:
    model = small_model()
    model.first_token = 60
    return model


PROMPT = TOKENS[0].tolist()

GREEDY = {"max_tokens": 12, "temperature": 0.0, "repeat_penalty": 0.0, "compile": "off"}


@pytest.mark.parametrize("growth", [0.0, 0.7])
def test_every_row_and_piece_begins_with_the_anchor_and_predicts_what_it_did(
    dataset: Path, tmp_path: Path, growth: float
) -> None:
    """The first step and the hold-out, by hand."""
    told = small_run(
        dataset,
        tmp_path / "run",
        tokens_per_sample=64,
        length_growth=growth,
        anchor=True,
        max_steps=1,
        num_eval_samples=4,
    )
    batches = TextBatches(
        Dataset.open(dataset), tokens_per_sample=64, batch_size=4, micro_batches_per_step=2, seed=0
    )

    def by_hand(model: NoPEGPT, parts: list[Batch], length: int) -> float:
        total = count = 0.0
        for batch in parts:
            for row, right in zip(batch.tokens, batch.targets, strict=True):
                for start in range(0, 64, length):
                    own = torch.cat([torch.tensor([256]), row[start + 1 : start + length]])
                    targets = right[None, start : start + length]
                    total += float(model(own[None], targets))
                    count += int((targets != IGNORED).sum())
        return total / count

    torch.manual_seed(0)
    model = NoPEGPT(vocabulary_size=257, **SHAPE)
    with torch.no_grad():
        first = by_hand(model, batches.micro_batches(0, 0, 1), 16 if growth else 64)
        assert told.losses[0] == pytest.approx(first, rel=1e-5)
        trained = NoPEGPT.from_pretrained(checkpoint(tmp_path / "run", 1))
        assert trained.first_token == 256
        last = by_hand(trained, list(batches.holdout(4, 0, 1)), 64)
    rows = (tmp_path / "run" / "pretrain" / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(row)["eval_loss"] for row in rows if "eval_loss" in row]
    assert found[-1] == pytest.approx(last, rel=1e-5)


def test_what_is_read_begins_with_the_anchor_once_however_it_is_read() -> None:
    plain, model = small_model(), anchored_model()
    tokenizer = BaseTokenizer.of_bytes()
    expected = [int(t) for t, _ in plain.generate(torch.tensor([60, *PROMPT]), **GREEDY)]
    for prompt in (PROMPT, [60, *PROMPT]):
        found = [int(t) for t, _ in model.generate(torch.tensor(prompt), **GREEDY)]
        assert found == expected
        sampling = SamplingConfig(**GREEDY)
        assert beam_search(model, prompt, sampling, num_beams=1)[0].tokens == expected
        stream = TextStream(model, tokenizer, prompt, sampling)
        assert "".join(piece.text for piece in stream) == bytes(expected).decode()
        assert stream.statistics.prompt_tokens == 13
        (answer,) = answers(model, tokenizer, [Request(prompt, 0)], sampling, 2)
        assert answer.text == bytes(expected).decode()
    assert [int(t) for t, _ in plain.generate(torch.tensor(PROMPT), **GREEDY)] != expected


@pytest.mark.parametrize("context_length", [1, 2, 9, 16])
def test_the_anchor_is_never_forgotten(context_length: int) -> None:
    plain, model = small_model(), anchored_model()
    settings = GREEDY | {"context_length": context_length, "max_tokens": 30}
    found = [int(t) for t, _ in model.generate(torch.tensor(PROMPT), **settings)]
    pinned = {"pin_tokens": 1} if context_length > 1 else {}
    expected = plain.generate(torch.tensor([60, *PROMPT]), **settings, **pinned)
    assert found == [int(t) for t, _ in expected]


def test_the_anchor_is_in_the_config_of_those_models_alone_and_refused_if_it_is_none(
    tmp_path: Path,
) -> None:
    small_model().save_pretrained(tmp_path / "plain")
    assert "first_token" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    anchored_model().save_pretrained(tmp_path / "own")
    path = tmp_path / "own" / "config.json"
    stated = json.loads(path.read_text())
    assert stated["first_token"] == 60
    assert NoPEGPT.from_pretrained(tmp_path / "own").first_token == 60
    for token in (61, -1, "60", True, 1.0):
        path.write_text(json.dumps(stated | {"first_token": token}))
        with pytest.raises(NopeError, match="first_token is .*, which is no token"):
            NoPEGPT.from_pretrained(tmp_path / "own")


def test_what_is_evaluated_begins_with_the_anchor(dataset: Path) -> None:
    plain, model = small_model(), anchored_model()
    spans = TOKENS.repeat(1, 3)[:, :33]
    with_it = spans.clone()
    for start in (0, 8, 16, 24):
        with_it[:, start] = 60
    found = windowed_losses(OwnScorer(model), spans, 8)
    rows, right = with_it[:, :-1].reshape(-1, 8), spans[:, 1:].reshape(-1, 8)
    with torch.no_grad():
        expected = plain(rows, right, each=True).view(2, 32)
    torch.testing.assert_close(found, expected)
    assert dataset.is_dir()


def test_a_tuned_model_has_the_control_token_for_an_anchor(tmp_path: Path) -> None:
    base = tmp_path / "base"
    model = small_model(vocabulary_size=257)
    model.first_token = 256
    model.save_pretrained(base)
    BaseTokenizer.of_bytes().save(base)
    chats = dataset_of(questions(12), base, tmp_path)
    begun = tuning(base, chats)
    rows, names = begun.saved.state[TIED], begun.tokenizer
    assert torch.equal(rows[names.im_start_index], rows[256])
    assert not torch.equal(rows[names.im_end_index], rows[256])
    run, _ = tuned(base, chats, tmp_path / "runs")
    assert NoPEGPT.from_pretrained(run).first_token is None
    folded = adapters.folded(storage.load(base), base, [adapters.place_of(str(run))])
    assert folded.first_token is None
    assert storage.load(base).first_token == 256


@pytest.mark.parametrize("format", ["hub", "transformers", "llama", "gguf"])
def test_an_exported_tokenizer_puts_the_anchor_before_every_text(
    tmp_path: Path, format: str
) -> None:
    model = small_model(vocabulary_size=257)
    model.first_token = 256
    model.save_pretrained(tmp_path / "model")
    BaseTokenizer.of_bytes().save(tmp_path / "model")
    settings = ExportConfig(
        model=str(tmp_path / "model"), format=format, output=str(tmp_path / format)
    )
    (made,) = export(settings)
    who = "nope" if format == "hub" else "its tokenizer"
    card = (made.path / "README.md").read_text()
    assert rf"| Begins with | <\|endoftext\|>, before every text: {who} puts it there |" in card
    if format == "gguf":
        (path,) = made.path.glob("*.gguf")
        reader = GgufReader(path, "f32")
        assert reader.model.first_token == 256
        assert reader.tokenize("a<|endoftext|>")[:2] == [256, 97]
        assert 256 not in reader.tokenize("a<|endoftext|>")[1:]
        return
    assert NoPEGPT.from_pretrained(made.path).first_token == 256
    if format != "hub":
        tokenizer = AutoTokenizer.from_pretrained(made.path)
        assert tokenizer.bos_token_id == 256
        assert tokenizer("ab")["input_ids"] == [256, 97, 98]
        assert tokenizer("ab", "c")["input_ids"] == [256, 97, 98, 99]
        assert tokenizer.decode([256, 97], skip_special_tokens=True) == "a"
