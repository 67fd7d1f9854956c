"""The verb `tune --extend`: one scale for each head of attention, for contexts longer than trained.

All weights stay as they are but for the scales (Wang et al. 2024, section 3, "HeadScale"). They
begin at the best one for all heads, never fall below 1, and are folded into the queries' weights
in the end: a checkpoint is an ordinary model.

Shapes: B batch, T tokens, C embedding dimensions, L layers, H query heads, D head dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nope_gpt.adaptation.reach import sharpened
from nope_gpt.config import EXTENSION_INTERVAL, TuneConfig
from nope_gpt.data.batches import TextBatches
from nope_gpt.data.finding import find_dataset
from nope_gpt.data.shards import Dataset
from nope_gpt.device import autocast, resolve_precision
from nope_gpt.errors import UsageError
from nope_gpt.evaluation.calibration import SCALES
from nope_gpt.files.writing import write_tensors
from nope_gpt.hub import storage
from nope_gpt.hub.locating import locate
from nope_gpt.model import NoPEGPT
from nope_gpt.network.sharpening import Sharpening, scaled_heads
from nope_gpt.tokenization import BaseTokenizer, tokenizer_of
from nope_gpt.training.checkpoints import read_tensors
from nope_gpt.training.execution import execute
from nope_gpt.training.loop import Job
from nope_gpt.training.planning import explaining_memory
from nope_gpt.training.reporting import Listener
from nope_gpt.training.runs import Resume, begun, launched
from nope_gpt.training.tuning import OnABase

SCALES_FILE = "head_scales.safetensors"

TRIED_SAMPLES = 4
"""On which the scale to begin with is chosen."""


class ScaledHeads(nn.Linear):
    """The queries' layer with a scale for each head, of which alone is learned.

    Args:
        linear: The layer; its weight is shared, not copied.
        num_heads: H.
        scale: To begin with.
    """

    def __init__(self, linear: nn.Linear, num_heads: int, scale: float) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight
        self.scales = nn.Parameter(linear.weight.new_full((num_heads,), scale))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] to [B, T, H * D]."""
        # What is below 1 counts as 1 and can come back: the gradient goes past the bound.
        scales = self.scales + (self.scales.clamp(min=1.0) - self.scales).detach()
        rows = scales.repeat_interleave(self.out_features // len(scales))
        return F.linear(x, self.weight) * rows.type_as(x)


def extend(config: TuneConfig, listeners: list[Listener], *, resume: Resume = False) -> Path:
    """Learn scales for contexts that are `--extend` times as long as was trained.

    Args:
        config: Every setting.
        listeners: Told what happens.
        resume: Go on from the run's newest valid checkpoint, or from this one.

    Returns:
        The run's directory.

    Raises:
        NopeError: The model, the data, the settings or the machine do not allow it.
        Interrupted: A signal ended the run, after a checkpoint.
    """
    with launched(config) as (config, launch):
        if launch.ranks.world_size > 1:
            raise UsageError(
                "--extend learns a few hundred numbers, and does so on one device",
                hint="leave --gpus out",
            )
        task = Extension.of(config)
        precision = resolve_precision(config.precision, launch.device)
        model = NoPEGPT.from_saved(task.saved).float().to(launch.device)
        model.loss_chunk = config.loss_chunk
        with (
            begun(config, task.facts, task.origin, resume, launch.ranks, task.num_steps) as run,
            explaining_memory(config, model.config, launch),
        ):
            told, scale = dict(task.told), 1.0
            if not run.resumed_from:
                scale = task.best_scale(model, precision)
                told["begins"] = f"with a scale of {scale:g} for all heads"
            scale_heads(model, scale)
            if config.activation_checkpointing:
                model.decoder.enable_activation_checkpointing(config.checkpointed_fraction)
            execute(task.job(model, precision), config, run, launch, listeners, told)
    return run.path


@dataclass(frozen=True)
class Extension(OnABase):
    """What a config asks for, with its model and its text at hand.

    Attributes:
        batches: Samples of the new length.
    """

    batches: TextBatches

    @classmethod
    def of(cls, config: TuneConfig) -> Self:
        """Find the model and the text that a config means.

        Raises:
            NopeError: One is not there, or they do not belong together.
        """
        assert config.extend is not None
        others = {
            "--full": config.full,
            "--objective dpo": config.objective == "dpo",
            "--compile on": config.compile == "on",
            "--batch-size auto": config.auto_batch_size,
        }
        for given in (name for name, is_given in others.items() if is_given):
            raise UsageError(
                f"--extend learns scales on text alone, and {given} asks for something else",
                hint="do one after the other",
            )
        if config.model is None:
            raise UsageError(
                "there is no model to extend", hint="nope tune --extend 2x --model runs/pretrain"
            )
        base = locate(config.model)
        saved = storage.load(base)
        trained = saved.trained_context_length
        if trained is None:
            raise UsageError(
                "it is not known on how long contexts this model was trained",
                where=str(base),
                hint='write it into its config.json: "trained_context_length": 4096',
            )
        tokenizer = tokenizer_of(BaseTokenizer.load(base), saved.config.vocabulary_size)
        root = Path(config.dataset_path).expanduser()
        dataset = Dataset.open(find_dataset(root, config.dataset)).require("text")
        dataset.require_tokenizer(tokenizer.name, tokenizer.fingerprint, str(base))
        batches = TextBatches(
            dataset,
            tokens_per_sample=int(config.extend.removesuffix("x")) * trained,
            batch_size=config.batch_size,
            micro_batches_per_step=config.gradient_accumulation_steps,
            seed=config.seed or 0,
        )
        return cls(config, base, saved, tokenizer, dataset, batches)

    @property
    def facts(self) -> dict[str, Any]:
        """What must not change while the run goes on."""
        return {
            "base model": self.base_sha256,
            "data set": self.dataset.fingerprint,
            "extension": self.config.extend,
            "samples per step": self.batches.samples_per_step,
            "optimizer": self.config.optimizer,
            "seed": self.config.seed,
        }

    @property
    def told(self) -> dict[str, str]:
        """What people want to know before it begins."""
        shape, length = self.saved.config, self.batches.tokens_per_sample
        return {
            "base": str(self.base),
            "data": f"{self.dataset.path} ({self.batches.samples_per_step} samples of "
            f"{length:,} tokens in a step)",
            "learns": f"{shape.num_decoder_layers * shape.num_q_heads} scales, for contexts of "
            f"{length:,} tokens; trained on {self.saved.trained_context_length:,}",
        }

    def best_scale(self, model: NoPEGPT, precision: torch.dtype) -> float:
        """The scale that is best for all heads at once, on some samples."""
        count = max(TRIED_SAMPLES // self.config.batch_size, 1)
        batches = self.batches.micro_batches(0, 0, 1)[:count]
        some = [batch.beginning_with(self.saved.first_token) for batch in batches]
        losses = {}
        for scale in SCALES:
            with (
                torch.inference_mode(),
                autocast(model.device, precision),
                sharpened(model, Sharpening(scale=scale), self.batches.tokens_per_sample),
            ):
                found = [model(b.tokens.to(model.device), b.targets.to(model.device)) for b in some]
            losses[scale] = float(torch.stack(found).sum())
        return min(losses, key=lambda scale: losses[scale])

    def job(self, model: NoPEGPT, precision: torch.dtype) -> Job:
        """What the loop is to do."""
        assert self.config.seed is not None
        return Job(
            model=model,
            batches=self.batches,
            num_steps=self.num_steps,
            eval_interval=EXTENSION_INTERVAL,
            checkpoint_interval=EXTENSION_INTERVAL,
            precision=precision,
            seed=self.config.seed,
            write_model=self.write_model,
            read_model=lambda checkpoint: read_tensors(checkpoint / SCALES_FILE),
            first_token=self.saved.first_token,
            looks_before=True,
        )

    def write_model(self, directory: Path, scales: dict[str, Tensor]) -> None:
        """Write the model with its scales folded in, and the scales beside it."""
        state = folded(self.saved.state, scales)
        length = self.batches.tokens_per_sample
        longer = replace(self.saved, state=state, trained_context_length=length, sharpenings={})
        storage.save(directory, longer)
        self.tokenizer.save(directory)
        write_tensors(directory / SCALES_FILE, scales)


def scale_heads(model: NoPEGPT, scale: float) -> None:
    """Give each head a scale to learn, and let nothing else be learned."""
    model.freeze_model_parameters()
    for layer in model.decoder.layers:
        linear = layer.attention.q_proj
        layer.attention.q_proj = ScaledHeads(linear, model.config.num_q_heads, scale)


def folded(state: dict[str, Tensor], scales: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights with the scales of their heads folded into them; the others as they are."""
    result = dict(state)
    for name, own in scales.items():
        weight = f"{name.removesuffix('.scales')}.weight"
        result[weight] = scaled_heads(state[weight], own.clamp(min=1.0))
    return result
