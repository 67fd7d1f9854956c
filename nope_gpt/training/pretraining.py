"""The verb `pretrain`: a data set of text to a base model."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch

from nope_gpt.config import ModelConfig, ModelShape, PretrainConfig, SizeConfig
from nope_gpt.data.batches import TextBatches
from nope_gpt.data.finding import find_dataset
from nope_gpt.data.shards import Dataset
from nope_gpt.device import Ranks, peak_flops, resolve_device, resolve_precision
from nope_gpt.files.writing import write_tensors
from nope_gpt.hub import storage
from nope_gpt.model import NoPEGPT
from nope_gpt.network import initialization
from nope_gpt.network.recall import Recall
from nope_gpt.sizing.arithmetic import count_parameters, training_flops_per_token
from nope_gpt.sizing.memory import training_memory
from nope_gpt.tokenization import BaseTokenizer
from nope_gpt.training.checkpoints import read_tensors
from nope_gpt.training.compilation import compile_network
from nope_gpt.training.distribution import refuse_impossible, shared
from nope_gpt.training.execution import execute
from nope_gpt.training.loop import Job
from nope_gpt.training.objectives import CrossEntropy, Recalling
from nope_gpt.training.planning import DryRun, explaining_memory, fitted, workload
from nope_gpt.training.reporting import Listener
from nope_gpt.training.runs import Resume, begun, launched
from nope_gpt.training.sampler import Sampler


def pretrain(config: PretrainConfig, listeners: list[Listener], *, resume: Resume = False) -> Path:
    """Train a base model from nothing, or go on with a run.

    Args:
        config: Every setting.
        listeners: Told what happens; on the first rank only.
        resume: Go on from the run's newest valid checkpoint, or from this one.

    Returns:
        The run's directory.

    Raises:
        NopeError: The data, the settings or the machine do not allow it.
        Interrupted: A signal ended the run, after a checkpoint.
    """
    with launched(config) as (config, launch):
        task = Pretraining.of(config, launch.device, launch.ranks.world_size)
        config = task.config
        with (
            begun(config, task.facts, task.origin, resume, launch.ranks, config.max_steps) as run,
            explaining_memory(config, task.model_config, launch),
        ):
            job = task.job(launch.device)
            execute(job, config, run, launch, listeners, task.told)
    return run.path


def dry_run(config: PretrainConfig, ranks: int = 1) -> DryRun:
    """What `pretrain` would do with a config, without a model.

    Raises:
        NopeError: The data, the settings or the machine do not allow it.
    """
    refuse_impossible(config, Ranks(rank=0, local_rank=0, world_size=ranks))
    device = resolve_device(config.device)
    precision = resolve_precision(config.precision, device)
    task = Pretraining.of(config, device, ranks)
    config = task.config
    peak = peak_flops(device, precision)
    flops = task.flops_per_token * task.tokens_per_step * config.max_steps
    memory = training_memory(workload(config, task.model_config, device, ranks))
    return DryRun(
        parameters=count_parameters(task.model_config).total,
        tokens_per_step=task.tokens_per_step,
        tokens=task.tokens_per_step * config.max_steps,
        flops=flops,
        memory=memory.as_dict() | {"peak": memory.peak},
        seconds=flops / (peak * ranks * SizeConfig.utilization) if peak else None,
        told=task.told,
    )


RECALL = "recall.safetensors"
"""What resuming needs of a scaffold that is no part of the model."""


@dataclass(frozen=True)
class Pretraining:
    """What a config asks for, with its data at hand."""

    config: PretrainConfig
    dataset: Dataset
    tokenizer: BaseTokenizer
    batches: TextBatches
    model_config: ModelConfig

    @classmethod
    def of(cls, config: PretrainConfig, device: torch.device, ranks: int = 1) -> Self:
        """Find the data set that a config means, and the batch that fits on some ranks' devices.

        Raises:
            NopeError: There is none, or it is not one to pretrain on.
        """
        path = find_dataset(
            Path(config.dataset_path).expanduser(),
            config.dataset,
            (config.dataset_subset, config.token_encoding),
        )
        dataset = Dataset.open(path).require("text")
        tokenizer = BaseTokenizer.load(path)
        shape = {field.name: getattr(config, field.name) for field in fields(ModelShape)}
        model_config = ModelConfig(**shape, vocabulary_size=tokenizer.vocabulary_size)
        config = shared(fitted(config, model_config, device, ranks))
        batches = TextBatches(
            dataset,
            tokens_per_sample=config.tokens_per_sample,
            batch_size=config.batch_size,
            micro_batches_per_step=config.gradient_accumulation_steps,
            seed=config.seed or 0,
            separate_documents=config.document_masking,
        )
        return cls(config, dataset, tokenizer, batches, model_config)

    @property
    def facts(self) -> dict[str, Any]:
        """What must not change while the run goes on."""
        return {
            "model": self.model_config.as_dict(),
            "tokenizer": self.dataset.tokenizer,
            "data set": self.dataset.fingerprint,
            "tokens per sample": self.config.tokens_per_sample,
            "samples per step": self.batches.samples_per_step,
            "optimizer": self.config.optimizer,
            "document masking": self.config.document_masking,
            "seed": self.config.seed,
            "recall": True if self.config.recall else None,  # None: older runs say nothing.
            "anchor": True if self.config.anchor else None,
        }

    @property
    def origin(self) -> dict[str, Any]:
        """What the model is made from."""
        return {"data": self.dataset.origin, "before": []}

    @property
    def tokens_per_step(self) -> int:
        return self.batches.samples_per_step * self.config.tokens_per_sample

    @property
    def flops_per_token(self) -> int:
        """Operations to train on one token, in PaLM's convention."""
        return training_flops_per_token(
            self.model_config, self.config.tokens_per_sample, causal=False
        )

    @property
    def told(self) -> dict[str, str]:
        """What people want to know before it begins."""
        passes = self.config.max_steps / self.batches.steps_per_epoch
        return {
            "data": f"{self.dataset.path} ({len(self.batches.train):,} tokens, "
            f"{passes:.1f} passes)",
            "step": f"{self.batches.samples_per_step} samples of "
            f"{self.config.tokens_per_sample} tokens",
        }

    def job(self, device: torch.device) -> Job:
        """What the loop is to do, with a fresh model."""
        config = self.config
        assert config.seed is not None
        model = self.fresh_model().to(device)
        precision = resolve_precision(config.precision, device)

        def write_model(directory: Path, weights: dict[str, torch.Tensor]) -> None:
            storage.save(directory, model.saved(weights))
            self.tokenizer.save(directory)
            if model.recall:
                own = {name: x for name, x in weights.items() if name.startswith("recall.")}
                write_tensors(directory / RECALL, own)

        def read_model(checkpoint: Path) -> dict[str, torch.Tensor]:
            weights = storage.load(checkpoint, rotary=True).state
            return weights | read_tensors(checkpoint / RECALL) if model.recall else weights

        return Job(
            model=model,
            batches=self.batches,
            num_steps=config.max_steps,
            eval_interval=config.eval_interval,
            checkpoint_interval=config.checkpoint_interval,
            precision=precision,
            seed=config.seed,
            write_model=write_model,
            read_model=read_model,
            flops_per_token=self.flops_per_token,
            execution=compile_network(
                model,
                config,
                precision=precision,
                shape=(config.batch_size, config.tokens_per_sample),
                flops=self.flops_per_token * self.tokens_per_step * config.max_steps,
            ),
            sampler=Sampler.of_text(self.batches, self.tokenizer, config.seed, model.first_token),
            sample_interval=config.sample_interval,
            objective=Recalling(config.recall) if model.recall else CrossEntropy(),
            first_token=model.first_token,
            length_growth=config.length_growth or 0.0,
            rotary_steps=int(config.rotary_until * config.max_steps),
        )

    def fresh_model(self) -> NoPEGPT:
        """The model that the seed draws."""
        config = self.config
        assert config.seed is not None
        torch.manual_seed(config.seed)
        model = NoPEGPT.from_config(self.model_config)
        initialization.CHANGES[config.initialization](model)
        if config.recall:
            model.recall = Recall(model.embedding_dimensions)
        model.trained_context_length = config.tokens_per_sample
        model.first_token = self.tokenizer.end_of_text if config.anchor else None
        model.loss_chunk = config.loss_chunk
        if config.activation_checkpointing:
            model.decoder.enable_activation_checkpointing(config.checkpointed_fraction)
        return model
