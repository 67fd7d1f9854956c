"""The network computes what the published layout defines, on every path."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import SETTINGS, forward, write_published
from safetensors import safe_open
from small import small_model

from nope_gpt.errors import UsageError
from nope_gpt.hub.published_layout import published_names
from nope_gpt.model import NoPEGPT
from nope_gpt.network import initialization
from nope_gpt.network.cross_entropy import IGNORED

HEADS = {"num_q_heads": 6, "num_kv_heads": 2}


def test_a_published_directory_computes_what_plain_pytorch_computes(tmp_path: Path) -> None:
    tensors = write_published(tmp_path / "model")
    model = NoPEGPT.from_pretrained(tmp_path / "model")
    tokens = torch.randint(0, 61, (2, 40), generator=torch.Generator().manual_seed(1))
    logits = model(tokens)
    for row in range(2):
        expected = forward(tensors, tokens[row], **HEADS)
        torch.testing.assert_close(logits[row], expected, rtol=0, atol=1e-5)


def test_the_vocabulary_is_that_of_the_tensor_not_of_the_config(tmp_path: Path) -> None:
    write_published(tmp_path / "chat", stated_vocabulary=57)
    model = NoPEGPT.from_pretrained(tmp_path / "chat")
    assert model.vocabulary_size == model.config.vocabulary_size == 61


def test_loading_returns_eval_mode_and_the_stored_dtype(tmp_path: Path) -> None:
    small_model().to(torch.bfloat16).save_pretrained(tmp_path / "model")
    model = NoPEGPT.from_pretrained(tmp_path / "model")
    assert not model.training
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def test_saving_and_loading_is_bitwise_and_stores_the_tied_matrix_once(tmp_path: Path) -> None:
    model = small_model()
    model.trained_context_length = 77
    model.save_pretrained(tmp_path / "model")
    again = NoPEGPT.from_pretrained(tmp_path / "model")
    tokens = torch.arange(30).unsqueeze(0)
    assert torch.equal(model(tokens), again(tokens))
    assert again.trained_context_length == 77
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        names = list(file.keys())
    assert "token_classifier.linear.weight" in names
    assert "token_embeddings.weight" not in names


@pytest.mark.parametrize("width", [256, 512, 1024, 2048])
@pytest.mark.parametrize("vocabulary_size", [4096, 50257])
def test_the_first_loss_is_that_of_a_uniform_guess(width: int, vocabulary_size: int) -> None:
    torch.manual_seed(0)
    model = NoPEGPT(vocabulary_size, width, width // 64, max(width // 256, 1), 2, 4)
    tokens = torch.randint(0, vocabulary_size, (1, 129))
    with torch.no_grad():
        loss = model(tokens[:, :-1], tokens[:, 1:]).item() / 128
    assert loss == pytest.approx(math.log(vocabulary_size), rel=0.03)


def test_matrices_keep_the_spread_of_what_they_read_and_the_writers_share_one_unit() -> None:
    model = small_model(embedding_dimensions=128, num_decoder_layers=3, hidden_ratio=3)
    generator = torch.Generator().manual_seed(1)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            read = torch.randn(500, module.in_features, generator=generator)
            writes = name.endswith(("out_proj", "down"))
            expected = 1 / 6 if writes else 1.0
            assert module(read).var().item() == pytest.approx(expected, rel=0.1), name


def test_the_seeds_initialization_starts_far_from_a_uniform_guess() -> None:
    model = small_model(embedding_dimensions=256)
    initialization.seed(model)
    tokens = torch.arange(60).unsqueeze(0)
    with torch.no_grad():
        loss = model(tokens[:, :-1], tokens[:, 1:]).item() / 59
    assert model.token_embeddings.weight.std().item() == pytest.approx(1.0, rel=0.05)
    assert loss > 20 * math.log(61)


def test_the_loss_is_a_sum_over_the_tokens_that_are_not_ignored() -> None:
    model = small_model()
    tokens = torch.arange(20).unsqueeze(0)
    targets = tokens + 1
    targets[0, 5:] = IGNORED
    logits = model(tokens)[0, :5]
    expected = -torch.log_softmax(logits, dim=-1)[range(5), range(1, 6)].sum()
    torch.testing.assert_close(model(tokens, targets), expected)


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=8), seed=st.integers(0, 999))
def test_cached_logits_are_those_of_the_full_forward_for_every_chunking(
    sizes: list[int], seed: int
) -> None:
    model = small_model(seed)
    tokens = torch.randint(0, 61, (2, sum(sizes)), generator=torch.Generator().manual_seed(seed))
    full = model(tokens)
    cache = model.new_cache(sum(sizes), batch_size=2)
    end = 0
    for size in sizes:
        logits = model.predict(tokens[:, end : end + size], cache)
        end += size
        largest = full.abs().max().item()
        torch.testing.assert_close(logits, full[:, end - 1], rtol=0, atol=1e-5 * largest)


@settings(max_examples=20, deadline=None)
@given(
    capacity=st.integers(1, 12),
    pinned=st.integers(0, 4),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
)
def test_a_full_cache_is_sliding_window_attention_beside_the_pinned_tokens(
    capacity: int, pinned: int, sizes: list[int]
) -> None:
    pinned = min(pinned, capacity - 1)
    model = NoPEGPT(**SETTINGS).eval()
    state = model.state_dict()
    tensors = {published: state[ours] for ours, published in published_names(3).items()}
    tokens = torch.randint(0, 61, (sum(sizes),), generator=torch.Generator().manual_seed(0))
    cache = model.new_cache(capacity, pinned=pinned)
    expected = forward(tensors, tokens, window=capacity, pinned=pinned, **HEADS)
    end = 0
    for size in sizes:
        logits = model.predict(tokens[None, end : end + size], cache)[0]
        end += size
        torch.testing.assert_close(logits, expected[end - 1], rtol=0, atol=1e-5)


def test_rows_are_read_in_any_order_and_in_part() -> None:
    """Of unequal length, by the modules."""
    model = small_model()
    prompts = [torch.arange(length)[None] for length in (3, 7, 5)]
    newest = torch.tensor([[11], [12], [13]])
    alone = []
    for prompt, token in zip(prompts, newest, strict=True):
        alone.append(model(torch.cat([prompt, token[None]], dim=1))[0, -1].detach())
    for rows in ([0, 1, 2], [2, 0, 1], [1, 0, 2], [2, 1], [1]):
        cache = model.new_cache(16, 3)
        for row, prompt in enumerate(prompts):
            model.predict(prompt, cache, [row])
        logits = model.predict(newest[rows], cache, rows)
        expected = torch.stack([alone[row] for row in rows])
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_rows_that_were_selected_go_on_each_for_itself() -> None:
    model = small_model()
    cache = model.new_cache(16, 3)
    for row, length in enumerate((3, 7, 5)):
        model.predict(torch.arange(length)[None], cache, [row])
    cache.select([1, 1, 0])
    begun = [torch.arange(length) for length in (7, 7, 3)]
    for newest in (torch.tensor([[11], [12], [13]]), torch.tensor([[21], [22], [23]])):
        begun = [torch.cat(pair) for pair in zip(begun, newest, strict=True)]
        logits = model.predict(newest, cache)
        expected = torch.stack([model(tokens[None])[0, -1].detach() for tokens in begun])
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert cache.tokens == [tokens.tolist() for tokens in begun]


def test_several_tokens_of_rows_of_unequal_length_are_read_as_each_row_alone_reads_them() -> None:
    model = small_model()
    prompts = [torch.arange(length)[None] for length in (3, 7)]
    for count in (2, 3):
        newest = torch.arange(2 * count).view(2, count)
        cache = model.new_cache(16, 2)
        for row, prompt in enumerate(prompts):
            model.predict(prompt, cache, [row])
        logits = model.predict(newest, cache)
        for row, prompt in enumerate(prompts):
            expected = model(torch.cat([prompt, newest[row : row + 1]], dim=1))[0, -1].detach()
            torch.testing.assert_close(logits[row], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("fraction", "recomputed"),
    [(0.0, [0, 0, 0, 0]), (0.25, [0, 0, 0, 1]), (0.5, [0, 1, 0, 1]), (1.0, [1, 1, 1, 1])],
)
def test_the_share_of_blocks_that_is_recomputed_is_spread_evenly(
    fraction: float, recomputed: list[int]
) -> None:
    model = small_model(num_decoder_layers=4).train()
    model.decoder.enable_activation_checkpointing(fraction)
    calls = [0] * 4
    for index, layer in enumerate(model.decoder.layers):

        def count(*_: object, index: int = index) -> None:
            calls[index] += 1

        layer.register_forward_pre_hook(count)
    tokens = torch.arange(20).unsqueeze(0)
    model(tokens, tokens + 1).backward()
    assert [number - 1 for number in calls] == recomputed


def test_activation_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = small_model().train()
        if checkpointing:
            model.decoder.enable_activation_checkpointing()
        tokens = torch.arange(20).unsqueeze(0)
        model(tokens, tokens + 1).backward()
        gradients.append([weight.grad for weight in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_dropout_acts_in_training_alone() -> None:
    model = small_model(dropout=0.5)
    tokens = torch.arange(20).unsqueeze(0)
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_generate(dtype: torch.dtype) -> None:
    model = small_model().to(dtype)
    assert len(list(model.generate(torch.tensor([1, 2, 3]), max_tokens=5))) == 5


def test_resizing_keeps_rows_dtype_and_whether_they_are_trained() -> None:
    model = small_model().to(torch.bfloat16)
    model.freeze_model_parameters()
    before = model.token_embeddings.weight.clone()
    model.resize_token_embeddings(65)
    after = model.token_embeddings.weight
    assert torch.equal(after[:61], before)
    assert (after.dtype, after.requires_grad) == (torch.bfloat16, False)
    assert model(torch.tensor([[64]])).shape == (1, 1, 65)
    assert model.config.vocabulary_size == 65
    model.resize_token_embeddings(10)
    assert torch.equal(model.token_embeddings.weight, before[:10])


def test_freezing_freezes() -> None:
    model = small_model()
    model.freeze_model_parameters()
    assert model.num_trainable_params == 0
    model.unfreeze_token_embeddings()
    assert model.num_trainable_params == 61 * 32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_q_heads": 5}, "--embedding-dimensions is 32, and must be a multiple of --num-q"),
        ({"num_kv_heads": 3}, "--num-q-heads is 4, and must be a multiple of --num-kv-heads"),
        ({"hidden_ratio": 0}, "--feed-forward-ratio is 0, and must be at least 1"),
        ({"dropout": 1.0}, "--dropout is 1.0, and must be below 1"),
        ({"num_decoder_layers": True}, "--num-hidden-layers is True, and must be a whole number"),
    ],
)
def test_an_impossible_shape_is_refused_by_its_flag(
    changes: dict[str, float], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        small_model(**changes)
