"""The verb `tune`: a base model and conversations, or pairs of answers, to an assistant."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from nope_gpt.adaptation import adapters, lora
from nope_gpt.adaptation.adapters import Adapter
from nope_gpt.config import TuneConfig
from nope_gpt.data.batches import Batches
from nope_gpt.data.chats import ChatBatches
from nope_gpt.data.documents import CHAT, PREFERENCE
from nope_gpt.data.finding import find_dataset
from nope_gpt.data.shards import Dataset
from nope_gpt.device import resolve_precision
from nope_gpt.errors import UsageError
from nope_gpt.hub import storage
from nope_gpt.hub.history import stages_of
from nope_gpt.hub.locating import locate
from nope_gpt.hub.published_layout import TIED
from nope_gpt.hub.storage import SavedModel
from nope_gpt.model import NoPEGPT
from nope_gpt.tokenization import BaseTokenizer, ChatTokenizer
from nope_gpt.training.distribution import shared
from nope_gpt.training.execution import execute
from nope_gpt.training.loop import Job
from nope_gpt.training.objectives import CrossEntropy, Objective, Preference
from nope_gpt.training.planning import explaining_memory, fitted
from nope_gpt.training.reporting import Listener
from nope_gpt.training.runs import Resume, begun, launched
from nope_gpt.training.sampler import Sampler


def tune(config: TuneConfig, listeners: list[Listener], *, resume: Resume = False) -> Path:
    """Train adapters, or all weights, on the answers of conversations or on pairs of them.

    A checkpoint holds the model with its adapters folded in, and the adapters beside it.

    Args:
        config: Every setting.
        listeners: Told what happens; on the first rank only.
        resume: Go on from the run's newest valid checkpoint, or from this one.

    Returns:
        The run's directory.

    Raises:
        NopeError: The model, the data, the settings or the machine do not allow it.
        Interrupted: A signal ended the run, after a checkpoint.
    """
    with launched(config) as (config, launch):
        task = Tuning.of(config, launch.device, launch.ranks.world_size)
        config = task.config
        precision = resolve_precision(config.precision, launch.device)
        model = task.model(precision)
        with (
            begun(config, task.facts, task.origin, resume, launch.ranks, task.num_steps) as run,
            explaining_memory(config, model.config, launch),
        ):
            job = task.job(model.to(launch.device), precision)
            told = task.told | {"trained": f"{task.method}: {trained_in_words(model)}"}
            execute(job, config, run, launch, listeners, told)
    return run.path


@dataclass(frozen=True)
class OnABase:
    """What changes a model that is there.

    Attributes:
        config: The settings.
        base: Directory of the model.
        saved: That model.
        tokenizer: Its own.
        dataset: What to train on.
        batches: The same in order.
    """

    config: TuneConfig
    base: Path
    saved: SavedModel
    tokenizer: BaseTokenizer
    dataset: Dataset
    batches: Batches

    @cached_property
    def base_sha256(self) -> str:
        """Of the weights of the base."""
        return storage.digest(self.base)

    @property
    def origin(self) -> dict[str, Any]:
        """What the model is made from."""
        return {"data": self.dataset.origin, "before": stages_of(self.base)}

    @property
    def num_steps(self) -> int:
        """Updates in all."""
        every = self.config.num_epochs * self.batches.steps_per_epoch
        return min(every, self.config.max_steps or every)


@dataclass(frozen=True)
class Tuning(OnABase):
    """What a config asks for, with its base and its data at hand.

    Attributes:
        config: With its objective settled.
        saved: With room for the control tokens.
    """

    tokenizer: ChatTokenizer
    batches: ChatBatches

    @classmethod
    def of(cls, config: TuneConfig, device: torch.device, ranks: int = 1) -> Self:
        """Find the base and the data that a config means, and the batch that fits on the devices.

        Raises:
            NopeError: One is not there, or they do not belong together.
        """
        if config.model is None:
            raise UsageError(
                "there is no base model to tune",
                hint="nope tune --model runs/pretrain, or --model andrewdalpino/NoPE-GPT-400M-Base",
            )
        if config.compile == "on":
            raise UsageError(
                "--compile is on, and no two batches of conversations have the same length",
                hint="leave it out: the blocks are not compiled while tuning",
            )
        base = locate(config.model)
        tokenizer = ChatTokenizer.load(base)
        root = Path(config.dataset_path).expanduser()
        dataset = Dataset.open(find_dataset(root, config.dataset, content=CHAT))
        if dataset.content != PREFERENCE:
            dataset.require(CHAT)
        config = config.changed(objective=objective_of(config, dataset))
        dataset.require_tokenizer(tokenizer.name, tokenizer.fingerprint, str(base))
        saved = saved_with_room(base, tokenizer, config)
        config = shared(fitted(config, saved.config, device, ranks))
        batches = make_batches(dataset, tokenizer, config)
        return cls(config, base, saved, tokenizer, dataset, batches)

    @property
    def facts(self) -> dict[str, Any]:
        """What must not change while the run goes on."""
        config = self.config
        adapter = {"rank": config.rank, "alpha": config.alpha, "dropout": config.dropout}
        return {
            "base model": self.base_sha256,
            "tokenizer": self.dataset.tokenizer,
            "data set": self.dataset.fingerprint,
            "subsets": config.dataset_subset,
            "objective": config.objective,
            "adapter": None if config.full else adapter,
            "embeddings": config.embeddings,
            "samples per step": self.batches.samples_per_step,
            "samples": self.batches.num_samples,
            "tokens of a sample, at most": config.max_tokens_per_sample,
            "optimizer": config.optimizer,
            "seed": config.seed,
        }

    @property
    def told(self) -> dict[str, str]:
        """What people want to know before it begins."""
        batches = self.batches
        what = "pairs" if self.config.objective == "dpo" else "conversations"
        return {
            "base": str(self.base),
            "data": f"{self.dataset.path} ({batches.num_samples:,} {what}, {batches.num_cut:,} "
            f"cut, {len(batches.refused):,} left out; {len(batches.held_out):,} held out)",
            "learns": {"sft": "the answers", "dpo": "to prefer the better answers"}[
                self.config.objective
            ],
        }

    @property
    def method(self) -> str:
        """What is trained, for people."""
        config = self.config
        return "all weights" if config.full else f"adapters of rank {config.rank}"

    def model(self, precision: torch.dtype) -> NoPEGPT:
        """The base with what is to be trained beside it.

        Weights that stay as they are, are kept in the precision that they are multiplied in.
        """
        config = self.config
        assert config.seed is not None
        torch.manual_seed(config.seed)
        model = NoPEGPT.from_saved(self.saved).float()
        model.loss_chunk = config.loss_chunk
        if config.full:
            model.requires_grad_(True)
            model.set_dropout(config.dropout)
        else:
            lora.adapt(
                model,
                config.rank,
                alpha=config.alpha,
                dropout=config.dropout,
                precision=precision,
                new_rows=len(self.tokenizer.control_tokens),
                embeddings=config.embeddings,
            )
        if config.activation_checkpointing:
            model.decoder.enable_activation_checkpointing(config.checkpointed_fraction)
        return model

    def job(self, model: NoPEGPT, precision: torch.dtype) -> Job:
        """What the loop is to do; intervals are in passes over the data."""
        config, every = self.config, self.batches.steps_per_epoch
        assert config.seed is not None
        objective: Objective = CrossEntropy()
        if config.objective == "dpo":
            objective = Preference(model, config.beta, config.length_normalized)
        return Job(
            model=model,
            batches=self.batches,
            num_steps=self.num_steps,
            eval_interval=config.eval_interval * every,
            checkpoint_interval=config.checkpoint_interval * every,
            precision=precision,
            seed=config.seed,
            write_model=self.write_whole if config.full else self.write_adapted,
            read_model=read_whole if config.full else read_adapter,
            objective=objective,
            sampler=Sampler.of_chats(self.batches, self.tokenizer, config.seed),
            sample_interval=config.eval_interval * every,
            looks_before=True,
        )

    def write_whole(self, directory: Path, weights: dict[str, Tensor]) -> None:
        """Write a model that was trained in all its weights into a checkpoint."""
        storage.save(directory, replace(self.saved, state=weights))
        self.tokenizer.save(directory)

    def write_adapted(self, directory: Path, weights: dict[str, Tensor]) -> None:
        """Write the base with its adapter folded in, and the adapter beside it."""
        config = self.config
        state = lora.merged(self.saved.state, weights, config.alpha)
        storage.save(directory, replace(self.saved, state=state))
        self.tokenizer.save(directory)
        adapter = Adapter(
            tensors=weights,
            alpha=config.alpha,
            dropout=config.dropout,
            base=str(config.model),
            base_sha256=self.base_sha256,
            makes_sha256=storage.digest(directory),
            vocabulary_size=self.saved.config.vocabulary_size,
        )
        adapters.save(directory, adapter)


def read_whole(checkpoint: Path) -> dict[str, Tensor]:
    """All weights of a checkpoint."""
    return storage.load(checkpoint).state


def read_adapter(checkpoint: Path) -> dict[str, Tensor]:
    """The trained weights of a checkpoint."""
    return adapters.load(checkpoint).tensors


def objective_of(config: TuneConfig, dataset: Dataset) -> str:
    """What to train for, by the data if nobody says.

    Raises:
        UsageError: The data, or the method, do not allow it.
    """
    has_pairs = dataset.content == PREFERENCE
    objective = config.objective
    if objective == "auto":
        objective = "dpo" if has_pairs else "sft"
    if objective == "dpo" and not has_pairs:
        raise UsageError(
            "--objective dpo needs pairs of answers, and this data set has none",
            where=str(dataset.path),
            hint="nope prepare ultrafeedback, or FILE with `chosen` and `rejected`",
        )
    if objective == "dpo" and config.full:
        raise UsageError(
            "--full leaves no untuned model to compare with, which dpo needs",
            hint="leave --full out, or tune on the better answers: --objective sft",
        )
    return objective


def make_batches(dataset: Dataset, tokenizer: ChatTokenizer, config: TuneConfig) -> ChatBatches:
    """The conversations in the order of the run's seed."""
    assert config.seed is not None
    return ChatBatches(
        dataset,
        subsets=config.dataset_subset,
        max_tokens_per_sample=config.max_tokens_per_sample,
        filter_long_samples=config.filter_long_samples,
        message_start=tokenizer.im_start_index,
        batch_size=config.batch_size,
        micro_batches_per_step=config.gradient_accumulation_steps,
        seed=config.seed,
        packed=config.packing,
        in_pairs=config.objective == "dpo",
    )


def saved_with_room(base: Path, tokenizer: ChatTokenizer, config: TuneConfig) -> SavedModel:
    """The base model, with rows for the control tokens drawn by the seed if it has none.

    Conversations begin with a control token: it takes the place of the first token that the base
    was trained to find there, and begins with its row. Scales were calibrated for other weights.

    Raises:
        UsageError: Its vocabulary is not its tokenizer's.
    """
    found = storage.load(base)
    saved = replace(found, first_token=None, sharpenings={})
    if saved.config.vocabulary_size == tokenizer.encoding.n_vocab:
        assert config.seed is not None
        torch.manual_seed(config.seed)
        model = NoPEGPT.from_saved(saved)
        model.resize_token_embeddings(tokenizer.vocabulary_size)
        embedding = model.token_embeddings.weight.detach()
        if found.first_token is not None:
            embedding[tokenizer.im_start_index] = embedding[found.first_token]
        saved = replace(saved, config=model.config, state=saved.state | {TIED: embedding})
    if saved.config.vocabulary_size != tokenizer.vocabulary_size:
        raise UsageError(
            f"the model has {saved.config.vocabulary_size} tokens, and its tokenizer "
            f"{tokenizer.vocabulary_size}",
            where=str(base),
        )
    return saved


def trained_in_words(model: NoPEGPT) -> str:
    """How many numbers are trained of which kind of weight, for people."""
    kinds: dict[str, int] = {}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            kind = "embedding" if "embeddings" in name else name.split(".")[-2]
            kinds[kind] = kinds.get(kind, 0) + weight.numel()
    count = sum(kinds.values())
    whole = sum(weight.numel() for weight in model.parameters())
    listing = ", ".join(f"{kind} {number:,}" for kind, number in kinds.items())
    return f"{count:,} of {whole:,} numbers ({count / whole:.2%}): {listing}"
