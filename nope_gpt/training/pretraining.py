"""The verb `pretrain`: a data set of text to a base model."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import torch

from nope_gpt import hub
from nope_gpt.config import ModelConfig, ModelShape, PretrainConfig
from nope_gpt.data.batches import TextBatches
from nope_gpt.data.finding import find_dataset
from nope_gpt.data.shards import Dataset
from nope_gpt.device import resolve_precision
from nope_gpt.model import NoPEGPT
from nope_gpt.tokenization import BaseTokenizer
from nope_gpt.training.loop import Job, Trainer
from nope_gpt.training.reporting import Listener
from nope_gpt.training.runs import Run, begin, launched, tell_plan


def pretrain(config: PretrainConfig, listeners: list[Listener], *, resume: bool = False) -> Path:
    """Train a base model from nothing, or go on with a run.

    Args:
        config: Every setting.
        listeners: Told what happens; on the first rank only.
        resume: Go on from the run's newest valid checkpoint.

    Returns:
        The run's directory.

    Raises:
        NopeError: The data, the settings or the machine do not allow it.
        Interrupted: A signal ended the run, after a checkpoint.
    """
    with launched(config) as (config, ranks, device):
        path = find_dataset(
            Path(config.dataset_path).expanduser(),
            config.dataset,
            (config.dataset_subset, config.token_encoding),
        )
        dataset = Dataset.open(path).require("text")
        tokenizer = BaseTokenizer.load(path)
        assert config.seed is not None
        batches = TextBatches(
            dataset,
            tokens_per_sample=config.tokens_per_sample,
            batch_size=config.batch_size,
            micro_batches_per_step=config.gradient_accumulation_steps,
            seed=config.seed,
        )
        shape = {field.name: getattr(config, field.name) for field in fields(ModelShape)}
        model_config = ModelConfig(**shape, vocabulary_size=tokenizer.vocabulary_size)
        facts = {
            "model": model_config.as_dict(),
            "tokenizer": dataset.tokenizer,
            "data set": dataset.fingerprint,
            "tokens per sample": config.tokens_per_sample,
            "samples per step": batches.samples_per_step,
            "optimizer": config.optimizer,
            "seed": config.seed,
        }
        run = begin(config, facts, resume, ranks)
        model = make_model(model_config, config, run).to(device)

        def write_model(directory: Path) -> None:
            hub.save(directory, model.saved())
            tokenizer.save(directory)

        job = Job(
            model=model,
            batches=batches,
            num_steps=config.max_steps,
            eval_interval=config.eval_interval,
            checkpoint_interval=config.checkpoint_interval,
            precision=resolve_precision(config.precision, device),
            seed=config.seed,
            write_model=write_model,
        )
        passes = config.max_steps / batches.steps_per_epoch
        told = {
            "data": f"{path} ({len(batches.train):,} tokens, {passes:.1f} passes)",
            "step": f"{batches.samples_per_step} samples of {config.tokens_per_sample} tokens",
        }
        with tell_plan(job, config, run, ranks, listeners, told) as hearing:
            Trainer(job, config, run, ranks, hearing).train()
    return run.path


def make_model(model_config: ModelConfig, config: PretrainConfig, run: Run) -> NoPEGPT:
    """A fresh model, or the one of the checkpoint to go on from."""
    if run.resumed_from:
        model = NoPEGPT.from_saved(hub.load(run.resumed_from))
        model.set_dropout(model_config.dropout)
    else:
        assert config.seed is not None
        torch.manual_seed(config.seed)
        model = NoPEGPT.from_config(model_config)
        if config.initialization == "seed":
            model.initialize_as_seed()
    model.trained_context_length = config.tokens_per_sample
    if config.activation_checkpointing:
        model.decoder.enable_activation_checkpointing()
    return model
