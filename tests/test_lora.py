"""An adapter adds what it says, and folds into the weights exactly."""

from __future__ import annotations

import pytest
import torch
from small import small_model

from nope_gpt.adaptation import lora
from nope_gpt.adaptation.lora import LoRALinear
from nope_gpt.errors import UsageError
from nope_gpt.model import NoPEGPT

TOKENS = torch.arange(30).unsqueeze(0)


def randomized(model: NoPEGPT, rank: int = 3, alpha: float = 0.7) -> NoPEGPT:
    """Adapters as after some training: B is no longer zero."""
    lora.attach(model, rank=rank, alpha=alpha)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LoRALinear):
                module.lora_b.normal_()
    return model


def merged_state(model: NoPEGPT, alpha: float = 0.7) -> dict[str, torch.Tensor]:
    """The weights of a model with what is trained in it folded in."""
    trained = {name: x.detach() for name, x in model.named_parameters() if x.requires_grad}
    frozen = {name: x.detach() for name, x in model.named_parameters() if not x.requires_grad}
    return lora.merged(frozen, trained, alpha)


def test_fresh_adapters_change_nothing() -> None:
    model = small_model()
    before = model(TOKENS)
    lora.attach(model, rank=4, alpha=1.0)
    assert torch.equal(model(TOKENS), before)


def test_merged_weights_compute_what_the_adapters_compute() -> None:
    model = randomized(small_model())
    merged = NoPEGPT.from_saved(small_model().saved(merged_state(model)))
    difference = (merged(TOKENS) - model(TOKENS)).abs().max()
    assert difference < 1e-5 * model(TOKENS).abs().max()
    assert (merged(TOKENS) - small_model()(TOKENS)).abs().max() > 0.1


def test_merged_weights_keep_the_dtype_they_had() -> None:
    model = randomized(small_model())
    base = small_model().to(torch.bfloat16).state_dict()
    trained = {name: x for name, x in model.state_dict().items() if "lora" in name}
    merged = lora.merged(base, trained, alpha=0.7)
    assert {name: x.dtype for name, x in merged.items()} == dict.fromkeys(base, torch.bfloat16)


def test_an_adapter_adds_alpha_times_b_times_a() -> None:
    model = small_model()
    weight = model.decoder.layers[0].attention.q_proj.weight.clone()
    randomized(model, rank=2, alpha=0.5)
    adapted = model.decoder.layers[0].attention.q_proj
    expected = weight + 0.5 * adapted.lora_b @ adapted.lora_a
    state = merged_state(model, alpha=0.5)
    torch.testing.assert_close(state["decoder.layers.0.attention.q_proj.weight"], expected)


def test_the_six_matrices_of_every_layer_are_adapted_and_nothing_else_is_trained() -> None:
    model = small_model()
    lora.attach(model, rank=2, alpha=1.0)
    adapted = [name for name, module in model.named_modules() if isinstance(module, LoRALinear)]
    assert len(adapted) == 6 * 2
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained == {f"{name}.lora_{part}" for name in adapted for part in "ab"}


def test_adapters_are_attached_once() -> None:
    model = small_model()
    lora.attach(model, rank=2, alpha=1.0)
    with pytest.raises(UsageError, match="has adapters already"):
        lora.attach(model, rank=2, alpha=1.0)


def test_a_rank_above_the_matrix_is_refused() -> None:
    with pytest.raises(UsageError, match="--rank is 17, and the smallest matrix has rank 16"):
        lora.attach(small_model(), rank=17, alpha=1.0)


def test_left_out_adapters_and_rows_leave_the_model_as_it_was() -> None:
    """The reference of preference tuning, without a second copy."""
    model = small_model()
    before = model(TOKENS + 31)
    randomized(model)
    lora.train_last_rows(model, 4)
    with torch.no_grad():
        model.token_embeddings.rows.add_(1.0)
    assert (model(TOKENS + 31) - before).abs().max() > 0.1
    with lora.adapters_off(model):
        torch.testing.assert_close(model(TOKENS + 31), before, rtol=0, atol=1e-6)
    assert (model(TOKENS + 31) - before).abs().max() > 0.1


def test_rows_that_are_trained_apart_compute_what_they_compute_in_the_matrix() -> None:
    model = randomized(small_model())
    lora.train_last_rows(model, 4)
    with torch.no_grad():
        model.token_embeddings.rows.normal_()
    tokens = torch.tensor([[3, 60, 57, 56, 58, 0]])
    merged = NoPEGPT.from_saved(small_model().saved(merged_state(model)))
    torch.testing.assert_close(model(tokens), merged(tokens), rtol=0, atol=1e-4)
    targets = tokens.roll(1)
    torch.testing.assert_close(model(tokens, targets), merged(tokens, targets))
    assert (merged(tokens) - small_model()(tokens)).abs().max() > 0.1


def test_dropout_of_adapters_silences_their_inputs_in_training_alone() -> None:
    model = small_model()
    lora.attach(model, rank=3, alpha=1.0, dropout=0.5)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            torch.nn.init.normal_(module.lora_b)
    assert torch.equal(model(TOKENS), model(TOKENS))
    model.train()
    assert not torch.equal(model(TOKENS), model(TOKENS))
