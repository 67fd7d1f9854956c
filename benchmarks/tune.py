"""How fast adapters are trained, and in how much memory: ours beside PEFT's and TRL's.

    pip install -e '.[bench]' peft trl
    python benchmarks/tune.py CONVERSATIONS.jsonl [--rounds 5] [--steps 4] [--batch-size 8]
        [--max-tokens 1024] [--shape small] [--json]
    python benchmarks/tune.py PAIRS.jsonl --objective dpo --tokenizer CONVERSATIONS.jsonl

Every way tunes the same network of random weights on the same conversations, or pairs of answers,
in the same order, on a CPU in bfloat16 by autocast: adapters of rank 8 on the six matrices of
each block, the four rows of the control tokens, AdamW at a constant rate, gradients clipped at 1.
Each runs in a process of its own, and the processes take turns, round after round. What is ours
is all of `nope tune`; TRL's are its trainers, without the recomputation of activations that they
do by default, and once with it; "transformers + PEFT" is the loop that a script would have.
Before anything is timed, all ways must give the held-out answers the same probability in float32,
and their first steps the same loss and norm of the gradient, as near as bfloat16 allows.

Trained tokens are those that count in the loss, of a pair those of both answers; all tokens are
those that are read, without padding. Speeds and ratios are medians of the rounds; the first two
steps are not counted. Peak memory is that of warm steps, less what the process took before the
first one, so without the weights; beside it is that of the whole process, libraries and all.
The loss of the held-out answers is computed in float32, one conversation at a time, by the same
few lines for all, before the first step and after the last; for pairs it is that of DPO.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from train import SHAPES, Worker, arcee, forget_peak, hardware, memory, seeded

from nope_gpt.adaptation.lora import LoRALinear
from nope_gpt.amounts import format_bytes
from nope_gpt.config import PrepareConfig, TuneConfig
from nope_gpt.data.batches import Batch
from nope_gpt.data.chats import Sample, end_to_end, padded
from nope_gpt.data.prepare import prepare
from nope_gpt.model import NoPEGPT
from nope_gpt.network.cross_entropy import IGNORED
from nope_gpt.tokenization import BaseTokenizer
from nope_gpt.training.reporting import Listener, StepReport
from nope_gpt.training.tuning import Tuning, tune

CPU = torch.device("cpu")
UNCOUNTED = 2  # Steps before the first round.
PEERS = ("TRL", "transformers + PEFT")
PACKAGES = ("peft", "trl", "accelerate")
MATRICES = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


class Turns(Listener):
    """Lets a way go on for so many steps whenever that is asked for, and answers."""

    def __init__(self, answers: IO[str]) -> None:
        self.answers = answers
        self.left = self.before = 0
        self.since = 0.0

    def planned(self, *_: object) -> None:
        """All is there, and nothing is trained."""
        forget_peak(CPU)
        self.before = memory(CPU)
        self.wait()

    def stepped(self, report: StepReport) -> None:
        self.step(report.loss, report.gradient_norm)

    def step(self, loss: float, norm: float) -> None:
        """A step is done."""
        self.left -= 1
        if self.left == 0:
            self.answer([time.perf_counter() - self.since, loss, norm])
            self.wait()

    def wait(self) -> None:
        """Until steps are asked for, or the end; beside them, the most memory since last asked."""
        while (line := sys.stdin.readline().strip()) == "memory":
            self.answer([memory(CPU) - self.before, memory(CPU)])
            forget_peak(CPU)
        if not line:
            raise SystemExit("nobody asks any more")
        self.left = 0 if line == "end" else int(line)
        self.since = time.perf_counter()

    def answer(self, what: object) -> None:
        print(json.dumps(what), file=self.answers, flush=True)


class Ours:
    """What `nope tune` does."""

    def __init__(self, tuning: Tuning, *, packed: bool) -> None:
        self.config = tuning.config.changed(packing=packed, run_name=f"packed-{packed}")
        self.model: NoPEGPT | None = NoPEGPT.from_saved(tuning.saved).float()

    def logits(self, tokens: Tensor) -> Tensor:
        assert self.model
        return self.model(tokens)

    def train(self, turns: Turns) -> None:
        self.model = None
        self.model = NoPEGPT.from_pretrained(tune(self.config, [turns])).float()


class Loop:
    """The network in transformers, the adapters in PEFT, and a plain loop."""

    def __init__(self, tuning: Tuning) -> None:
        from peft import get_peft_model

        self.config, self.steps = tuning.config, steps_of(tuning)
        self.model = get_peft_model(network(tuning), adapters(tuning))
        begin_alike(self.model, tuning)

    def logits(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens).logits

    def train(self, turns: Turns) -> None:
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(
            trained, self.config.peak_learning_rate, (0.9, 0.95), weight_decay=0.0, fused=True
        )
        self.model.train()
        turns.planned()
        for samples in self.steps:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = self.loss(samples)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            turns.step(loss.item(), norm.item())

    def loss(self, samples: Sequence[Sample]) -> Tensor:
        """The mean over the tokens of the answers; for pairs, that of DPO over them."""
        batch = padded(samples)
        tokens, targets = batch.tokens, batch.targets
        lengths = [document.tokens.size - 1 for sample in samples for document in sample]
        is_token = torch.arange(tokens.size(1)) < torch.tensor(lengths)[:, None]
        inputs = {"input_ids": tokens, "attention_mask": is_token.long()}
        if self.config.objective == "sft":
            return self.model(**inputs, labels=targets, shift_labels=targets).loss
        with torch.no_grad(), self.model.disable_adapter():
            before = self.of_answers(inputs, targets)
        rewards = self.config.beta * (self.of_answers(inputs, targets) - before).view(-1, 2)
        return -F.logsigmoid(rewards[:, 0] - rewards[:, 1]).mean()

    def of_answers(self, inputs: dict[str, Tensor], targets: Tensor) -> Tensor:
        """The log-probability of the answer in each row, [B]."""
        logits = self.model(**inputs).logits.float().flatten(0, 1)
        losses = F.cross_entropy(logits, targets.flatten(), reduction="none")
        return -losses.view_as(targets).sum(dim=1)


class Trl:
    """What TRL's trainers do."""

    def __init__(self, tuning: Tuning, **options: Any) -> None:
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast
        from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

        # DPOTrainer takes text alone, and is given tokens here.
        DPOTrainer._prepare_dataset = lambda _, dataset, *__: dataset
        settings = trl_settings(tuning.config) | options
        trainer, arguments = SFTTrainer, SFTConfig
        if tuning.config.objective == "dpo":
            trainer, arguments = DPOTrainer, DPOConfig
            settings["beta"] = tuning.config.beta
        # A tokenizer is asked for, of which nothing is taken but how to pad.
        words = Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>"))
        self.trainer = trainer(
            model=network(tuning),
            args=arguments(**settings),
            train_dataset=trl_dataset(tuning),
            processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>"),
            peft_config=adapters(tuning),
        )
        begin_alike(self.trainer.model, tuning)
        # The head is asked for its bias, and PEFT's wrapper around a head without one has none.
        self.trainer.model.get_output_embeddings().bias = None

    def logits(self, tokens: Tensor) -> Tensor:
        unwrap, model = self.trainer.accelerator.unwrap_model, self.trainer.model
        return unwrap(model, keep_fp32_wrapper=False)(input_ids=tokens).logits

    def train(self, turns: Turns) -> None:
        from transformers import PrinterCallback, TrainerCallback

        class Telling(TrainerCallback):  # type: ignore[misc]
            """Passes on what the trainer tells."""

            def on_train_begin(self, *_: Any, **__: Any) -> None:
                turns.planned()

            def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
                if "loss" in logs:
                    turns.step(logs["loss"], logs["grad_norm"])

        self.trainer.remove_callback(PrinterCallback)
        self.trainer.add_callback(Telling())
        self.trainer.train()


WAYS: dict[str, Callable[[Tuning], Ours | Loop | Trl]] = {
    "nope": lambda tuning: Ours(tuning, packed=True),
    "nope, padded": lambda tuning: Ours(tuning, packed=False),
    "transformers + PEFT": Loop,
    "TRL": Trl,
    "TRL, padding-free": lambda tuning: Trl(tuning, padding_free=True),  # Not there for DPO.
    "TRL, recomputing": lambda tuning: Trl(tuning, gradient_checkpointing=True),
}


def network(tuning: Tuning) -> nn.Module:
    """The base in transformers, with the rows of the control tokens."""
    return arcee(NoPEGPT.from_saved(tuning.saved), tuning.config.max_tokens_per_sample)


def adapters(tuning: Tuning) -> Any:
    """Our adapters in PEFT, which divides alpha by the rank."""
    from peft import LoraConfig

    rank, size = tuning.config.rank, tuning.saved.config.vocabulary_size
    rows = range(size - len(tuning.tokenizer.control_tokens), size)
    return LoraConfig(
        r=rank,
        lora_alpha=rank * tuning.config.alpha,
        target_modules=MATRICES,
        trainable_token_indices={"embed_tokens": list(rows)},
        task_type="CAUSAL_LM",
    )


@torch.no_grad()
def begin_alike(model: nn.Module, tuning: Tuning) -> None:
    """Give PEFT's adapters the numbers that ours begin with, matrix by matrix in order."""
    ours = [x for x in tuning.model(torch.float32).modules() if isinstance(x, LoRALinear)]
    theirs = [module for module in model.modules() if hasattr(module, "lora_A")]
    for own, other in zip(ours, theirs, strict=True):
        other.lora_A["default"].weight.copy_(own.lora_a)


def steps_of(tuning: Tuning) -> list[list[Sample]]:
    """What each step trains on."""
    indices = map(tuning.batches.sample_indices, range(tuning.num_steps))
    return [[tuning.batches.train[index] for index in step] for step in indices]


def trl_settings(config: TuneConfig) -> dict[str, Any]:
    """What both of TRL's trainers are told."""
    size, rate = config.batch_size, config.peak_learning_rate
    settings = {"output_dir": config.run_dir_path, "save_strategy": "no", "report_to": "none"}
    settings |= {"use_cpu": True, "bf16": True, "gradient_checkpointing": False}
    settings |= {"max_steps": config.max_steps, "logging_steps": 1, "disable_tqdm": True}
    settings |= {"per_device_train_batch_size": size, "train_sampling_strategy": "sequential"}
    settings |= {"max_length": None, "dataloader_pin_memory": False}
    settings |= {"learning_rate": rate, "lr_scheduler_type": "constant", "max_grad_norm": 1.0}
    return settings | {"optim": "adamw_torch_fused", "adam_beta2": 0.95, "weight_decay": 0.0}


def trl_dataset(tuning: Tuning) -> Any:
    """What TRL's trainers read, in order; the labels are shifted later."""
    from datasets import Dataset

    rows = []
    for sample in (sample for step in steps_of(tuning) for sample in step):
        row = {}
        for document, name in zip(sample, ("chosen_ids", "rejected_ids"), strict=False):
            # What is last, the newline after an answer, is not trained, and nothing follows it.
            tokens, mask = document.tokens[:-1].astype(np.int64), document.mask[:-1]
            start, *_, last = np.flatnonzero(mask).tolist()
            row |= {"input_ids": tokens, "labels": np.where(mask, tokens, IGNORED)}
            row |= {"prompt_ids": tokens[:start], name: tokens[start : last + 1]}
            assert len(sample) == 1 or mask[start : last + 1].all()  # TRL takes one answer.
        rows.append(row)
    is_dpo = tuning.config.objective == "dpo"
    kept = ("prompt_ids", "chosen_ids", "rejected_ids") if is_dpo else ("input_ids", "labels")
    return Dataset.from_list([{name: row[name].tolist() for name in kept} for row in rows])


def serve(name: str, config: TuneConfig, count: int) -> None:
    """Be one way: tell of the held-out answers, before and after what is asked for on stdin."""
    # Libraries print what they like; the answers go where stdout was.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    tuning = Tuning.of(config, torch.device("cpu"))
    way, batches = WAYS[name](tuning), held_out(tuning, count)
    del tuning
    turns = Turns(answers)
    turns.answer(log_probabilities(way, batches))
    way.train(turns)
    turns.answer(log_probabilities(way, batches))


def held_out(tuning: Tuning, count: int) -> list[Batch]:
    """The first held-out conversations, or both sides of the first held-out pairs, one by one."""
    samples = tuning.batches.held_out[:count]
    return [end_to_end([(document,)]) for sample in samples for document in sample]


@torch.no_grad()
def log_probabilities(way: Ours | Loop | Trl, batches: Sequence[Batch]) -> list[float]:
    """Of the answers in each conversation, in nats."""
    pairs = ((way.logits(batch.tokens)[0], batch.targets[0]) for batch in batches)
    return [-F.cross_entropy(logits, x, reduction="sum").item() for logits, x in pairs]


def prepared(options: argparse.Namespace, work: Path) -> TuneConfig:
    """The data, a base of random weights, and how it is to be tuned."""
    data = PrepareConfig(dataset_path=str(work), token_encoding="bpe:4096", holdout_fraction=0.1)
    if options.tokenizer:
        (other,) = prepare([str(options.tokenizer)], data.changed(name="tokenizer"))
        data = data.changed(token_encoding=str(other.path))
    (dataset,) = prepare([str(options.data)], data.changed(name="data"))
    tokenizer, base = BaseTokenizer.load(dataset.path), work / "base"
    seeded(SHAPES[options.shape] | {"vocabulary": tokenizer.vocabulary_size}).save_pretrained(base)
    tokenizer.save(base)
    how: dict[str, Any] = {"device": "cpu", "precision": "bfloat16", "seed": 0}
    how |= {"objective": options.objective, "max_tokens_per_sample": options.max_tokens}
    how |= {"batch_size": options.batch_size, "gradient_accumulation_steps": 1}
    how |= {"max_steps": UNCOUNTED + options.rounds * options.steps, "num_eval_samples": 8}
    how |= {"optimizer": "adamw", "learning_rate": options.learning_rate, "weight_decay": 0.0}
    how |= {"schedule": "constant", "warmup_fraction": 0.0, "max_gradient_norm": 1.0}
    how |= {"dataset_path": str(dataset.path), "run_dir_path": str(work / "runs")}
    return TuneConfig(model=str(base), **how)


def measured(tuning: Tuning, options: argparse.Namespace) -> dict[str, Any]:
    """All ways in turn."""
    config, arguments = tuning.config, ["--threads", str(options.threads), str(options.data)]
    arguments += ["--held-out", str(options.held_out), "--config", json.dumps(config.as_dict())]
    without = {"TRL, padding-free"} if config.objective == "dpo" else set()
    ways = [way for way in WAYS if way not in without.union(options.without)]
    workers = {way: Worker(way, arguments, __file__) for way in ways}
    refuse_other_networks(workers)
    for worker in workers.values():
        worker.ask("memory")
        worker.ask(UNCOUNTED - 1)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(options.rounds):
        for way in ways:
            seconds[way].append(workers[way].ask(options.steps)[0])
    memories = {way: worker.ask("memory") for way, worker in workers.items()}
    exact = {way: (worker.first, worker.ask("end")) for way, worker in workers.items()}
    steps = [end_to_end(step) for step in steps_of(tuning)[UNCOUNTED:]]
    rounds = [steps[i : i + options.steps] for i in range(0, len(steps), options.steps)]
    batches = held_out(tuning, options.held_out)
    return {
        "trained": [sum(batch.num_trained for batch in each) for each in rounds],
        "read": [sum(batch.tokens.numel() for batch in each) for each in rounds],
        "seconds": seconds,
        "memory": memories,
        "held_out": {
            way: [loss(config, batches, before, now) for now in (before, after)]
            for way, (before, after) in exact.items()
        },
    }


def refuse_other_networks(workers: dict[str, Worker]) -> None:
    """Stop if a way trains something else than the first one: no answer, loss or norm is far."""
    own: tuple[list[float], float, float] | None = None
    for way, worker in workers.items():
        _, loss, norm = worker.ask(1)
        own = own or (worker.first, loss, norm)
        off = [float(np.abs(np.subtract(worker.first, own[0])).max()) / 1e-2]
        off += [abs(loss - own[1]) / 3e-3, abs(norm / own[2] - 1) / 1e-2]
        if not max(off) <= 1:
            raise SystemExit(f"{way} trains something else: it is {off} of the tolerances away")


def loss(config: TuneConfig, batches: list[Batch], before: list[float], now: list[float]) -> float:
    """Of the held-out answers: the cross entropy of their tokens, or DPO's of the pairs."""
    if config.objective == "sft":
        return -sum(now) / sum(batch.num_trained for batch in batches)
    rewards = config.beta * np.subtract(now, before).reshape(-1, 2)
    return float(np.log1p(np.exp(rewards[:, 1] - rewards[:, 0])).mean())


def table(found: dict[str, Any]) -> str:
    """The figures as markdown."""
    peers = " | ".join(f"beside {peer}" for peer in PEERS)
    lines = [
        f"| way | trained tok/s | all tok/s | {peers} | peak memory | {peers} | whole process "
        "| held-out loss before | after |",
        "|---" * 11 + "|",
    ]
    for way, times in found["seconds"].items():
        peak, process = found["memory"][way]
        others = [found["seconds"].get(peer, math.nan) for peer in PEERS]
        sizes = [found["memory"].get(peer, [math.nan])[0] for peer in PEERS]
        cells = [f"{np.median(np.divide(found[n], times)):,.0f}" for n in ("trained", "read")]
        cells += [f"{np.median(np.divide(other, times)):.2f}" for other in others]
        cells += [format_bytes(peak), *(f"{peak / size:.2f}" for size in sizes)]
        cells += [format_bytes(process), *(f"{loss:.4f}" for loss in found["held_out"][way])]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="`messages`, or for dpo `chosen` and `rejected`")
    parser.add_argument("--objective", choices=("sft", "dpo"), default="sft")
    parser.add_argument("--tokenizer", type=Path, help="file to train it on instead of the data")
    parser.add_argument("--shape", choices=SHAPES, default="small")
    for name, usual in (("batch-size", 8), ("max-tokens", 1024), ("held-out", 64)):
        parser.add_argument(f"--{name}", type=int, default=usual)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="in each round")
    parser.add_argument("--without", action="append", default=[], choices=WAYS)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--config", type=json.loads, help=argparse.SUPPRESS)
    parser.set_defaults(device="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.way:
        serve(options.way, TuneConfig(**options.config), options.held_out)
        return
    os.environ["HF_HUB_OFFLINE"] = "1"  # Or TRL tells its makers.
    with tempfile.TemporaryDirectory() as work:
        tuning = Tuning.of(prepared(options, Path(work)), torch.device("cpu"))
        wanted, whole = tuning.num_steps, tuning.batches.num_samples // options.batch_size
        if wanted > whole:
            raise SystemExit(f"these are {wanted} steps, and the data is for {whole} in one pass")
        found = measured(tuning, options)
    peers = ", ".join(f"{name} {version(name)}" for name in PACKAGES if find_spec(name))
    what = f"{hardware(options)}, {peers}\n{tuning.saved.config}\n{tuning.told['data']}"
    print(json.dumps({"told": what, **found}) if options.json else f"{what}\n\n{table(found)}")


if __name__ == "__main__":
    main()
