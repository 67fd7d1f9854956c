"""Scales that are learned for longer contexts, and a model that is an ordinary one after."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import forward
from safetensors.torch import load_file
from small import RECIPE, SHAPE, Recorder, byte_dataset, small_model, small_run

from nope_gpt.adaptation.reach import scale_attention
from nope_gpt.config import TuneConfig
from nope_gpt.data.batches import TextBatches
from nope_gpt.data.shards import Dataset
from nope_gpt.errors import UsageError
from nope_gpt.hub.locating import locate
from nope_gpt.model import NoPEGPT
from nope_gpt.training import state
from nope_gpt.training.extending import extend, folded, scale_heads

HEADS = {name: SHAPE[name] for name in ("num_q_heads", "num_kv_heads")}

SETTINGS: dict[str, Any] = {
    "extend": "2x",
    "gradient_accumulation_steps": 2,
    "max_steps": 6,
    "learning_rate": 5e-2,
    "run_name": "extend",
    "device": "cpu",
    "precision": "float32",
    "seed": 0,
}


@pytest.fixture
def dataset(corpus: Path, tmp_path: Path) -> Path:
    return byte_dataset(corpus, tmp_path / "datasets")


@pytest.fixture
def base(dataset: Path, tmp_path: Path) -> Path:
    small_run(dataset, tmp_path / "runs")
    return tmp_path / "runs" / "pretrain"


def extended(base: Path, dataset: Path, **changes: Any) -> Recorder:
    recorder = Recorder()
    resume = changes.pop("resume", False)
    places = {"model": str(base), "dataset_path": str(dataset), "run_dir_path": str(base.parent)}
    extend(TuneConfig(**SETTINGS | places | changes), [recorder], resume=resume)
    return recorder


def test_scales_that_are_folded_in_are_those_that_were_learned() -> None:
    model = small_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tokens = torch.arange(30)[None]
    scale_heads(model, 1.0)
    scales = {
        name: weight.data.copy_(0.9 + torch.rand(4, generator=torch.Generator().manual_seed(i)))
        for i, (name, weight) in enumerate(model.named_parameters())
        if weight.requires_grad
    }
    assert len(scales) == 2
    assert min(float(own.min()) for own in scales.values()) < 1.0
    whole = NoPEGPT(**model.config.as_dict())
    whole.load_state_dict(folded(before, scales))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), whole(tokens), atol=1e-5, rtol=1e-5)
        assert (whole(tokens) - small_model()(tokens)).abs().max() > 1e-3


def test_what_comes_out_is_an_ordinary_model_with_other_queries_alone(
    base: Path, dataset: Path
) -> None:
    told = extended(base, dataset)
    assert len(told.losses) == 6
    run = base.parent / "extend"
    before, after = (load_file(locate(str(p)) / "model.safetensors") for p in (base, run))
    assert before.keys() == after.keys()
    scales = load_file(locate(str(run)) / "head_scales.safetensors")
    assert sum(own.numel() for own in scales.values()) == 8
    for name, weight in before.items():
        if ".q_proj." in name:
            ratio = (after[name] / weight).view(4, -1)
            torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), atol=1e-4, rtol=1e-4)
            assert ratio.min() >= 1.0 - 1e-6
        else:
            assert torch.equal(weight, after[name])
    old, new = (json.loads((locate(str(p)) / "config.json").read_text()) for p in (base, run))
    assert new == old | {"trained_context_length": 32}
    tokens = torch.randint(0, 256, (32,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = NoPEGPT.from_pretrained(run)(tokens[None])[0]
    torch.testing.assert_close(found, forward(after, tokens, **HEADS), atol=1e-5, rtol=1e-5)


def test_the_losses_are_those_of_samples_of_the_new_length(base: Path, dataset: Path) -> None:
    """The first one, by hand: with the scale that was told."""
    told = extended(base, dataset, max_steps=1)
    scales = load_file(locate(str(base.parent / "extend")) / "head_scales.safetensors")
    batches = TextBatches(
        Dataset.open(dataset), tokens_per_sample=32, batch_size=2, micro_batches_per_step=2, seed=0
    )
    parts = batches.micro_batches(0, 0, 1)
    losses = {}
    for scale in (1.0, 1.03, 1.06, 1.1, 1.15, 1.2, 1.25, 1.3, 1.4, 1.5, 1.65, 1.8):
        model = NoPEGPT.from_pretrained(base)
        scale_attention(model, scale)
        with torch.no_grad():
            losses[scale] = sum(float(model(b.tokens, b.targets)) for b in parts) / 128
    best = min(losses, key=lambda scale: losses[scale])
    assert told.losses[0] == pytest.approx(losses[best], rel=1e-5)
    moved = torch.cat(list(scales.values())) - best
    assert 0.0 < moved.abs().max() <= 0.05 + 1e-6, "one step of AdamW at its rate"


def test_a_resumed_extension_is_bitwise_the_uninterrupted_one(
    base: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nope_gpt.training.extending.EXTENSION_INTERVAL", 2)
    extended(base, dataset, keep_checkpoints=9)
    run = base.parent / "extend"
    whole = load_file(run / "checkpoints" / "step-6" / "model.safetensors")
    for later in (4, 6):
        shutil.rmtree(run / "checkpoints" / f"step-{later}")
    extended(base, dataset, keep_checkpoints=9, resume=True)
    again = load_file(run / "checkpoints" / "step-6" / "model.safetensors")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_scales_that_were_taken_away_are_learned_again_and_none_falls_below_one() -> None:
    """Half of the heads are too dull, the others too sharp for a scale to mend."""
    torch.manual_seed(0)
    model = small_model()
    for layer in model.decoder.layers:
        layer.attention.out_proj.weight.data *= 4
    model.token_embeddings.weight.data *= 3
    scale_attention(model, 4.0)
    tokens = torch.randint(0, 61, (64, 1))
    with torch.inference_mode():
        for _ in range(48):
            drawn = torch.multinomial(model(tokens)[:, -1].softmax(-1), 1)
            tokens = torch.cat([tokens, drawn], dim=1)
    tokens = tokens.clone()
    scale_attention(model, torch.tensor([1 / 1.5, 1.3, 1 / 1.5, 1.3]).expand(2, 4))
    scale_heads(model, 1.0)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-2, weight_decay=0.0)
    losses = []
    for _ in range(60):
        loss = model(tokens[:, :-1], tokens[:, 1:]) / tokens[:, 1:].numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.01
    found = folded({"a.weight": torch.ones(4, 1)}, {"a.scales": trained[0].detach()})["a.weight"]
    assert found.min() == 1.0
    assert 1.2 < float(found[[0, 2]].mean()) < 2.0
    assert float(found[[1, 3]].mean()) < 1.2


def test_nothing_but_the_scales_is_trained(base: Path) -> None:
    model = NoPEGPT.from_pretrained(base)
    scale_heads(model, 1.2)
    weights, _ = state.gathered(model, [torch.optim.AdamW(model.parameters())])
    assert {name.rpartition(".")[2] for name in weights} == {"scales"}


@pytest.mark.slow
def test_the_command_line_knows_what_extending_implies(base: Path, dataset: Path, nope) -> None:
    words = ["--model", str(base), "--dataset-path", str(dataset), "--device", "cpu"]
    words += ["--run-dir-path", str(base.parent), "--max-steps", "3", "--precision", "float32"]
    done = nope("tune", "--extend", "4x", *words, "--json")
    assert done.returncode == 0, done.stderr
    assert "8 scales, for contexts of 64 tokens; trained on 16" in done.stderr
    stored = json.loads((base.parent / "extend" / "run.json").read_text())["config"]
    assert (stored["gradient_accumulation_steps"], stored["max_steps"]) == (8, 3)
    assert (stored["learning_rate"], stored["schedule"]) == (5e-2, "cosine")
    again = nope("tune", "--extend", "4x", *words)
    assert again.returncode == 2
    assert "this run already exists" in again.stderr
    assert nope("tune", "--resume", str(base.parent / "extend"), "--max-steps=5").returncode == 0


def test_what_cannot_be_extended_is_told(base: Path, dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no model to extend"):
        extend(TuneConfig(**SETTINGS), [])
    for more in ({"full": True}, {"objective": "dpo"}):
        with pytest.raises(UsageError, match="asks for something else"):
            extended(base, dataset, **more)
    unknown = tmp_path / "unknown"
    shutil.copytree(locate(str(base)), unknown)
    (unknown / "manifest.json").unlink()
    config = json.loads((unknown / "config.json").read_text())
    del config["trained_context_length"]
    (unknown / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="it is not known on how long contexts") as told:
        extended(unknown, dataset)
    assert '"trained_context_length": 4096' in str(told.value.hint)
    assert RECIPE["tokens_per_sample"] == 16
