"""Preference tuning is the published loss, on the model that it began with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from small_chats import dataset_of, preferences, questions, tuned, tuning
from torch import Tensor
from torch.nn import functional as F

from nope_gpt.adaptation import lora
from nope_gpt.errors import UsageError
from nope_gpt.model import NoPEGPT
from nope_gpt.training.objectives import Preference


@pytest.fixture
def pairs(base: Path, tmp_path: Path) -> Path:
    return dataset_of(preferences(24), base, tmp_path, "pairs")


def answer_log_probability(model: NoPEGPT, tokens: Tensor, mask: Tensor, by_length: bool) -> Tensor:
    """One conversation at a time, from all logits."""
    logs = model(tokens[None, :-1])[0].double().log_softmax(-1)
    chosen = logs.gather(1, tokens[1:, None])[:, 0][mask[1:].bool()]
    return chosen.mean() if by_length else chosen.sum()


@pytest.mark.parametrize("by_length", [False, True])
def test_the_loss_and_its_gradients_are_those_of_the_formula(
    base: Path, pairs: Path, by_length: bool
) -> None:
    task = tuning(base, pairs)
    assert task.config.objective == "dpo"
    model = task.model(torch.float32)
    before = NoPEGPT.from_saved(task.saved)
    generator = torch.Generator().manual_seed(0)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    with torch.no_grad():
        for weight in weights:
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    samples = task.batches.train[:5]
    (batch,) = task.batches.batches(samples, 0, 1)
    objective = Preference(model, beta=0.3, by_length=by_length)
    assert objective.count(batch) == 5
    outcome = objective.outcome(model, batch)
    total = torch.zeros((), dtype=torch.float64)
    accuracy = margins = 0.0
    for sample in samples:
        rewards = []
        for side in sample:
            tokens, mask = torch.tensor(side.tokens), torch.tensor(side.mask)
            now, then = (
                answer_log_probability(one, tokens, mask, by_length) for one in (model, before)
            )
            rewards.append(0.3 * (now - then.detach()))
        margin = rewards[0] - rewards[1]
        total = total - F.logsigmoid(margin)
        accuracy += float(margin > 0)
        margins += margin.item()
    torch.testing.assert_close(outcome.loss.double(), total, rtol=1e-5, atol=1e-5)
    assert outcome.figures["Reward Accuracy"].item() == accuracy
    assert outcome.figures["Reward Margin"].item() == pytest.approx(margins, rel=1e-4, abs=1e-4)
    got = torch.autograd.grad(outcome.loss, weights)
    right = torch.autograd.grad(total, weights)
    for one, other in zip(got, right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_before_the_first_step_nothing_is_preferred(base: Path, pairs: Path) -> None:
    """The reference is the model itself, so the loss is ln 2 exactly."""
    task = tuning(base, pairs)
    model = task.model(torch.float32)
    (batch,) = task.batches.batches(task.batches.train[:5], 0, 1)
    loss = Preference(model, beta=0.1).outcome(model, batch).loss
    assert loss.item() / 5 == pytest.approx(0.6931472, abs=1e-6)


def test_what_fills_up_a_ranks_share_counts_nothing(base: Path, pairs: Path) -> None:
    task = tuning(base, pairs)
    model = task.model(torch.float32)
    (idle,) = task.batches.batches(task.batches.train[:1], 1, 2)
    objective = Preference(model, beta=0.1)
    assert objective.count(idle) == 0
    outcome = objective.outcome(model, idle)
    assert outcome.loss.item() == 0.0
    torch.autograd.backward(outcome.loss)
    assert all(not weight.grad.any() for weight in model.parameters() if weight.grad is not None)


def test_the_better_answers_are_learned_and_the_curves_say_so(
    base: Path, pairs: Path, tmp_path: Path
) -> None:
    run, recorder = tuned(base, pairs, tmp_path / "runs", num_epochs=6, learning_rate=3e-3)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert steps[0]["loss"] == pytest.approx(0.6931472, abs=1e-5)
    assert steps[-1]["loss"] < 0.4
    assert steps[-1]["reward_accuracy"] == 1.0
    assert steps[-1]["reward_margin"] > 0.5
    margin = steps[-1]["chosen_reward"] - steps[-1]["rejected_reward"]
    assert margin == pytest.approx(steps[-1]["reward_margin"], abs=1e-4)
    evaluated = [row for row in rows if "eval_loss" in row]
    assert evaluated[0]["eval_loss"] == pytest.approx(0.6931472, abs=1e-5)
    assert evaluated[-1]["eval_reward_accuracy"] == 1.0
    assert "perplexity" not in evaluated[-1]
    assert recorder.reports[-1].learning_rate < 3e-3


def test_the_better_answers_of_pairs_can_be_trained_on_alone(
    base: Path, pairs: Path, tmp_path: Path
) -> None:
    task = tuning(base, pairs, objective="sft")
    assert all(len(sample) == 1 for sample in task.batches.train)
    _, recorder = tuned(base, pairs, tmp_path / "runs", objective="sft", num_epochs=1)
    assert recorder.reports[0].objective == "Cross Entropy"


def test_pairs_are_found_where_there_are_no_conversations(
    base: Path, pairs: Path, tmp_path: Path
) -> None:
    assert tuning(base, pairs.parent).dataset.path == pairs
    chats = dataset_of(questions(9), base, tmp_path)
    assert tuning(base, pairs.parent).dataset.path == chats


def test_pairs_are_not_cut(base: Path, tmp_path: Path) -> None:
    rows = preferences(6)
    rows[2]["rejected"][1]["content"] *= 9
    data = dataset_of(rows, base, tmp_path, "pairs")
    task = tuning(base, data, max_tokens_per_sample=100)
    assert len(task.batches.refused) == 1
    assert task.batches.num_cut == 0


def test_what_has_no_reference_or_no_pairs_is_refused(
    base: Path, pairs: Path, tmp_path: Path
) -> None:
    chats = dataset_of(questions(9), base, tmp_path)
    with pytest.raises(UsageError, match="--objective dpo needs pairs of answers"):
        tuned(base, chats, tmp_path / "runs", objective="dpo")
    with pytest.raises(UsageError, match="--full leaves no untuned model to compare with") as no:
        tuned(base, pairs, tmp_path / "runs", full=True)
    assert "--objective sft" in str(no.value.hint)


def test_a_resumed_preference_tuning_goes_on_as_if_nothing_had_happened(
    base: Path, pairs: Path, tmp_path: Path
) -> None:
    """The reference is that of the beginning, and not that of the checkpoint."""
    changes = {"schedule": "constant", "warmup_fraction": 0.0, "num_epochs": 4}
    _, whole = tuned(base, pairs, tmp_path / "whole", **changes)
    tuned(base, pairs, tmp_path / "parts", **changes | {"max_steps": 5})
    _, rest = tuned(base, pairs, tmp_path / "parts", resume=True, **changes)
    assert len(rest.losses) == len(whole.losses) - 5
    assert rest.losses == whole.losses[5:]


def test_adapters_left_out_are_back_after_an_error(base: Path, pairs: Path) -> None:
    model = tuning(base, pairs).model(torch.float32)
    with pytest.raises(ZeroDivisionError), lora.adapters_off(model):
        1 / 0  # noqa: B018
    parts = [module for module in model.modules() if isinstance(module, lora.LoRALinear)]
    assert all(part.is_active for part in parts)
