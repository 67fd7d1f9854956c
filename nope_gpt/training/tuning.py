"""The verb `tune`: a base model and conversations to an assistant, by LoRA."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from nope_gpt import hub, lora
from nope_gpt.artifacts import describe, write_tensors
from nope_gpt.config import TuneConfig
from nope_gpt.data.batches import ChatBatches
from nope_gpt.data.finding import find_dataset
from nope_gpt.data.shards import Dataset
from nope_gpt.device import resolve_precision
from nope_gpt.errors import UsageError
from nope_gpt.locating import WEIGHTS, locate
from nope_gpt.model import NoPEGPT
from nope_gpt.tokenization import ChatTokenizer
from nope_gpt.training import checkpoints
from nope_gpt.training.execution import execute
from nope_gpt.training.loop import Job
from nope_gpt.training.planning import explaining_memory
from nope_gpt.training.reporting import Listener
from nope_gpt.training.runs import Resume, begun, launched


def tune(config: TuneConfig, listeners: list[Listener], *, resume: Resume = False) -> Path:
    """Train adapters and the token embedding on the answers of conversations.

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
    named = config.model
    if named is None:
        raise UsageError(
            "there is no base model to tune",
            hint="nope tune --model runs/pretrain, or --model andrewdalpino/NoPE-GPT-400M-Base",
        )
    with launched(config) as (config, launch):
        base = locate(named)
        tokenizer = ChatTokenizer.load(base)
        path = find_dataset(Path(config.dataset_path).expanduser(), config.dataset, content="chat")
        dataset = Dataset.open(path).require("chat")
        refuse_other_tokenizer(tokenizer, dataset, base)
        batches = make_batches(dataset, tokenizer, config)
        facts = {
            "base model": describe(base / WEIGHTS),
            "tokenizer": dataset.tokenizer,
            "data set": dataset.fingerprint,
            "adapter": {"rank": config.rank, "alpha": config.alpha},
            "samples per step": batches.samples_per_step,
            "samples": batches.num_samples,
            "tokens of a sample, at most": config.max_tokens_per_sample,
            "optimizer": config.optimizer,
            "seed": config.seed,
        }
        model = make_model(base, tokenizer, config)
        told = {
            "base": str(base),
            "data": f"{path} ({batches.num_samples:,} conversations, {batches.num_cut:,} cut, "
            f"{batches.num_refused:,} left out)",
            "trained": f"{model.num_trainable_params:,} parameters: adapters of rank "
            f"{config.rank} and the token embedding",
        }
        precision = resolve_precision(config.precision, launch.device)
        with (
            begun(config, facts, resume, launch.ranks, num_steps(config, batches)) as run,
            explaining_memory(config, model.config, precision),
        ):
            job = make_job(model.to(launch.device), tokenizer, batches, config)
            execute(job, config, run, launch, listeners, told)
    return run.path


def refuse_other_tokenizer(tokenizer: ChatTokenizer, dataset: Dataset, base: Path) -> None:
    """Refuse data that were encoded with another tokenizer than the model's."""
    if tokenizer.fingerprint != dataset.tokenizer["fingerprint"]:
        raise UsageError(
            f"the model's tokenizer is {tokenizer.name}, and the data set's is "
            f"{dataset.tokenizer['name']}",
            where=f"{base} and {dataset.path}",
            hint=f"prepare the data again: nope prepare FILE --token-encoding {base}",
        )


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
    )


def make_model(base: Path, tokenizer: ChatTokenizer, config: TuneConfig) -> NoPEGPT:
    """The base model with room for the control tokens and with fresh adapters."""
    assert config.seed is not None
    torch.manual_seed(config.seed)
    model = NoPEGPT.from_saved(hub.load(base)).float()
    if model.vocabulary_size == tokenizer.encoding.n_vocab:
        model.resize_token_embeddings(tokenizer.vocabulary_size)
    if model.vocabulary_size != tokenizer.vocabulary_size:
        raise UsageError(
            f"the model has {model.vocabulary_size} tokens, and its tokenizer "
            f"{tokenizer.vocabulary_size}",
            where=str(base),
        )
    lora.attach(model, rank=config.rank, alpha=config.alpha)
    model.unfreeze_token_embeddings()
    if config.activation_checkpointing:
        model.decoder.enable_activation_checkpointing(config.checkpointed_fraction)
    return model


def num_steps(config: TuneConfig, batches: ChatBatches) -> int:
    """Updates of the weights in all."""
    every = config.num_epochs * batches.steps_per_epoch
    return min(every, config.max_steps or every)


def make_job(
    model: NoPEGPT, tokenizer: ChatTokenizer, batches: ChatBatches, config: TuneConfig
) -> Job:
    """What the loop is to do; intervals are in passes over the data."""
    assert config.seed is not None

    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}

    def write_model(directory: Path, weights: dict[str, Tensor]) -> None:
        hub.save(directory, model.saved(lora.merged_state(model, weights)))
        tokenizer.save(directory)
        adapter = {name: weights[name] for name in sorted(trained)}
        write_tensors(directory / checkpoints.ADAPTER, adapter)

    return Job(
        model=model,
        batches=batches,
        num_steps=num_steps(config, batches),
        eval_interval=config.eval_interval * batches.steps_per_epoch,
        checkpoint_interval=config.checkpoint_interval * batches.steps_per_epoch,
        precision=resolve_precision(config.precision, model.device),
        seed=config.seed,
        write_model=write_model,
        read_model=lambda checkpoint: checkpoints.read_tensors(checkpoint / checkpoints.ADAPTER),
    )
