"""What a network without positions learns: in equal time beside others, and by recipe.

    python benchmarks/learn.py time TEXT [--seconds 180] [--seeds 1] [--encoding bpe:1024]
    python benchmarks/learn.py ablation|variations TEXT [--steps 400] [--seeds 1] [--only NAME ...]

TEXT is a .txt file, of which the last tenth is held out, or a .parquet file of documents, of which
every tenth is. What is compared is bits for each byte of the held-out text, read in windows as
long as the contexts that a model was trained on, so that tokenizers do not matter. The text is
encoded before the clock runs, for all alike.

`time` gives every way the same seconds, measured by its own training steps, in a process of its
own that has the machine, or with --workers its share of the cores, for itself: the recipe that
`nope pretrain` has by default; the same network with rotary embeddings from the first to the last
step; the recipe of before (Adafactor at a constant 1e-2, torch's initialization); and a
nanoGPT-class network on characters with the settings that nanoGPT publishes for a CPU. How many
steps fit is found by a short run first, so that every schedule ends when the time does. Last, the
default recipe in a quarter of the time.

`ablation` trains the same network for the same number of tokens without some of its help, or with
positions, once for each seed, and `variations` with another setting; the error is the standard
error over seeds of the difference to the default.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nanogpt import train_peer
from numpy.typing import NDArray
from train import hardware

from nope_gpt.config import PrepareConfig, PretrainConfig
from nope_gpt.config.presets import SEED_BEGINNING, SEED_RECIPE
from nope_gpt.data.batches import Batch, TextBatches
from nope_gpt.data.prepare import prepare
from nope_gpt.evaluation.lengths import bits_per_byte, spans_of, windowed_losses
from nope_gpt.evaluation.scorers import OwnScorer
from nope_gpt.hub import storage
from nope_gpt.hub.locating import locate
from nope_gpt.model import NoPEGPT
from nope_gpt.tokenization import BaseTokenizer
from nope_gpt.training.execution import execute
from nope_gpt.training.pretraining import Pretraining
from nope_gpt.training.reporting import Listener, StepReport
from nope_gpt.training.runs import begun, launched

MOST_HELD_OUT = 400_000
"""Characters to evaluate on."""

SHAPE: dict[str, Any] = {
    "embedding_dimensions": 192,
    "num_q_heads": 6,
    "num_kv_heads": 2,
    "num_decoder_layers": 4,
    "tokens_per_sample": 256,
    "batch_size": 8,
    "gradient_accumulation_steps": 1,
}

OLD = SEED_RECIPE | SEED_BEGINNING
"""As `--preset seed` has it."""

PLAIN = {"initialization": "scaled", "length_growth": 0.0, "recall": 0.0, "anchor": False}
"""No help: the loss of the next token alone, on whole samples."""

TIME: dict[str, dict[str, Any]] = {
    "nope pretrain": {},
    "rotary throughout": {"rotary": True},
    "the recipe of before": OLD,
    "nanoGPT-class": {"peer": True},
    "nope pretrain, a quarter": {"share": 0.25},
}

ABLATION: dict[str, dict[str, Any]] = {
    "**the default**": {},
    "no help: `--initialization scaled --length-growth 0 --recall 0 --no-anchor`": PLAIN,
    "without recall": {"recall": 0.0},
    "samples whole from the start": {"length_growth": 0.0},
    "without the anchor": {"anchor": False},
    "blocks that begin scaled": {"initialization": "scaled"},
    "rotary throughout (no NoPE GPT)": {"rotary": True},
    "rotary throughout, no help (no NoPE GPT)": PLAIN | {"rotary": True},
    "rotary throughout, all help but recall (no NoPE GPT)": {"rotary": True, "recall": 0.0},
}
"""What each help is worth; `rotary` is of this script alone."""

VARIATIONS: dict[str, dict[str, Any]] = {
    "the default": {},
    "rotary, dropped in the middle (`--rotary-until 0.5`)": {"rotary_until": 0.5},
    "rotary, dropped near the end (`--rotary-until 0.875`)": {"rotary_until": 0.875},
    "no help, rotary dropped in the middle": PLAIN | {"rotary_until": 0.5},
    "no help but the anchor": PLAIN | {"anchor": True},
    "no help but recall": PLAIN | {"recall": 0.5},
    "`--recall 0.25`": {"recall": 0.25},
    "`--recall 1`": {"recall": 1.0},
    "`--document-masking`, and so no anchor": {"document_masking": True},
    "batches of 2 samples for the first quarter of them, then of 8": {"growing": True},
    "Muon at 1e-2": {"learning_rate": 1e-2},
    "Muon at 4e-2": {"learning_rate": 4e-2},
    "`--optimizer adamw`, 3e-3": {"optimizer": "adamw", "learning_rate": 3e-3},
    "`--optimizer adafactor`, 1e-2": {"optimizer": "adafactor", "learning_rate": 1e-2},
    "`--schedule cosine`": {"schedule": "cosine"},
    "`--schedule wsd`": {"schedule": "wsd"},
    "`--schedule constant`": {"schedule": "constant"},
    "the recipe of before": OLD,
}
"""Each changes something; `growing` is of this script alone."""

TABLES = {"time": TIME, "ablation": ABLATION, "variations": VARIATIONS}


class Last(Listener):
    """Remembers the last step."""

    report: StepReport | None = None

    def stepped(self, report: StepReport) -> None:
        self.report = report


class GrowingBatches:
    """The samples of so many steps of four batches each: the first quarter of them a batch at a
    time, which makes as many steps, the others by four.
    """

    def __init__(self, batches: TextBatches, steps: int) -> None:
        self.batches, self.small = batches, steps
        self.num_steps = steps + 3 * steps // 4
        self.num_samples, self.steps_per_epoch = batches.num_samples, batches.steps_per_epoch

    def parts(self, step: int) -> range:
        """Which of the small batches a step has."""
        if step < self.small:
            return range(step, step + 1)
        first = self.small + 4 * (step - self.small)
        return range(first, first + 4)

    def sample_indices(self, step: int) -> NDArray[np.int64]:
        return np.concatenate([self.batches.sample_indices(part) for part in self.parts(step)])

    def micro_batches(self, step: int, rank: int, world_size: int) -> list[Batch]:
        """One micro-batch, of all samples of a step."""
        parts = [self.batches.micro_batches(part, rank, world_size)[0] for part in self.parts(step)]
        tokens, targets = (torch.cat([part[index] for part in parts]) for index in (0, 1))
        return [Batch(tokens, targets)]

    def holdout(self, limit: int, rank: int, world_size: int) -> Iterator[Batch]:
        return self.batches.holdout(limit, rank, world_size)


def run(config: PretrainConfig, *, rotary: bool = False, growing: bool = False) -> StepReport:
    """`nope pretrain`, with rotary embeddings to the end, or growing batches, if asked for."""
    last = Last()
    with launched(config) as (config, launch):
        task = Pretraining.of(config, launch.device)
        with begun(config, task.facts, task.origin, False, launch.ranks, config.max_steps) as place:
            job = task.job(launch.device)
            if rotary:
                job = replace(job, rotary_steps=config.max_steps + 1)
            if growing:
                batches = GrowingBatches(task.batches, config.max_steps)
                job = replace(job, batches=batches, num_steps=batches.num_steps)
            execute(job, config, place, launch, [last], task.told)
    assert last.report
    return last.report


def trained(
    cell: dict[str, Any], directory: Path, seconds: float | None = None
) -> tuple[NoPEGPT, BaseTokenizer, StepReport]:
    """A cell of ours, for its steps or for so many seconds, on what was prepared there."""
    settings = dict(cell)
    own = {name: settings.pop(name, False) for name in ("rotary", "growing")}
    if own["growing"]:
        settings["batch_size"] //= 4
    settings |= {
        "dataset_path": str(directory / "datasets"),
        "run_dir_path": str(directory / "runs"),
        "device": "cpu",
        "eval_interval": 10**9,
        "checkpoint_interval": 10**9,
        "sample_interval": 0,
        "num_eval_samples": 1,
    }
    if seconds:
        steps = 20
        for part in (0.02, 0.2, 1.0):  # Trials, ever longer: the first steps are slow.
            trial = PretrainConfig(**settings, max_steps=steps, run_name=f"trial-{part}")
            done = run(trial, **own)
            steps = max(round(done.step * part * seconds / done.seconds), 20)
        settings["max_steps"] = steps
    last = run(PretrainConfig(**settings, run_name="cell"), **own)
    model_path = locate(str(directory / "runs" / "cell"))
    model = NoPEGPT.from_saved(storage.load(model_path, rotary=True))
    model.decoder.set_rotary(own["rotary"])
    return model, BaseTokenizer.load(model_path), last


def judged(trained: tuple[NoPEGPT, BaseTokenizer, StepReport], held_out: str) -> dict[str, Any]:
    """What a model of ours came to."""
    model, tokenizer, last = trained
    length = model.trained_context_length
    assert length
    spans = spans_of(torch.tensor(tokenizer.tokenize(held_out)), length, 10**9)
    losses = windowed_losses(OwnScorer(model), spans, length)
    read = spans[:, 1:].flatten().tolist()
    size = sum(len(tokenizer.bytes_of(token)) for token in read)
    return {
        "bits_per_byte": bits_per_byte(float(losses.sum()), size),
        "parameters": model.num_weights,
        "seconds": last.seconds,
        "steps": last.step,
        "tokens": last.tokens,
    }


def encode(texts: list[str], encoding: str, directory: Path) -> None:
    """`nope prepare` of some documents, none of them held out."""
    lines = [json.dumps({"text": text}) for text in texts]
    (directory / "text.jsonl").write_text("\n".join(lines), encoding="utf-8")
    settings = PrepareConfig(
        dataset_path=str(directory / "datasets"), token_encoding=encoding, holdout_fraction=0.0
    )
    prepare([str(directory / "text.jsonl")], settings)


def texts_of(path: Path) -> tuple[list[str], str]:
    """Documents to train on, and the held-out text."""
    if path.suffix == ".parquet":
        import pyarrow.parquet

        documents = pyarrow.parquet.read_table(path, columns=["text"])["text"].to_pylist()
        held_out = "\n".join(document[:40_000] for document in documents[::10])
        train = [text for place, text in enumerate(documents) if place % 10]
        return train, held_out[:MOST_HELD_OUT]
    text = path.read_text(encoding="utf-8")
    middle = len(text) * 9 // 10
    return [text[:middle]], text[middle:]


def work(task: dict[str, Any]) -> None:
    """One cell, in this process; prints what it came to."""
    train, held_out = texts_of(Path(task["text"]))
    cell = dict(task["cell"])
    seconds = task["seconds"] and task["seconds"] * cell.pop("share", 1.0)
    if cell.pop("peer", False):
        found = train_peer("\n".join(train), held_out, seconds, task["seed"])
    else:
        with tempfile.TemporaryDirectory() as name:
            directory = Path(name)
            encode(train, task["encoding"], directory)
            cell = SHAPE | task["shape"] | {"seed": task["seed"]} | cell
            if not task["seconds"]:
                cell["max_steps"] = task["steps"]
            found = judged(trained(cell, directory, seconds), held_out)
    print(json.dumps(found), flush=True)


def measured(task: dict[str, Any]) -> dict[str, Any]:
    """A cell in a process of its own."""
    command = [sys.executable, __file__, "--work", json.dumps(task)]
    environment = os.environ | {"OMP_NUM_THREADS": str(task["threads"])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def main() -> None:
    """Print a table."""
    if sys.argv[1:2] == ["--work"]:
        work(json.loads(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=list(TABLES))
    parser.add_argument("text")
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1, help="cells at a time")
    parser.add_argument("--encoding", default="bpe:1024")
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE")
    options = parser.parse_args()
    cells = TABLES[options.what]
    cells = {name: cell for name, cell in cells.items() if not options.only or name in options.only}
    shape = {name: json.loads(value) for name, value in (x.split("=") for x in options.set)}
    common = {"text": options.text, "encoding": options.encoding, "shape": shape}
    common |= {"seconds": options.seconds if options.what == "time" else None}
    workers = options.workers
    options.device, options.threads = "cpu", max(torch.get_num_threads() // workers, 1)
    common |= {"steps": options.steps, "threads": options.threads}
    print(hardware(options), f"\n{SHAPE | shape}, {options.encoding}\n")
    titles = ["way", "bits per byte", "beside the first"]
    if options.what == "time":
        titles += ["seconds", "steps", "tokens", "parameters"]
    print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}", flush=True)
    first: list[float] = []
    with ThreadPoolExecutor(workers) as pool:
        tasks = {
            name: [
                pool.submit(measured, common | {"cell": cell, "seed": seed})
                for seed in range(options.seeds)
            ]
            for name, cell in cells.items()
        }
        for name, futures in tasks.items():
            rows = [future.result() for future in futures]
            bits = [row["bits_per_byte"] for row in rows]
            first = first or bits
            line = [name, *figures(bits, first, rows)][: len(titles)]
            print(f"| {' | '.join(line)} |", flush=True)


def figures(bits: list[float], first: list[float], rows: list[dict[str, Any]]) -> list[str]:
    """The cells of a line of the table."""
    differences = [one - other for one, other in zip(bits, first, strict=True)]
    mean, error = statistics.fmean(differences), ""
    if len(bits) > 1:
        error = f" ± {statistics.stdev(differences) / math.sqrt(len(bits)):.4f}"
    row = rows[0]
    return [
        f"{statistics.fmean(bits):.4f}",
        f"{mean:+.4f}{error}, {statistics.fmean(bits) / statistics.fmean(first):.3f}x",
        f"{statistics.fmean(row['seconds'] for row in rows):.0f}",
        f"{row['steps']:,}",
        f"{row['tokens']:,}",
        f"{row['parameters']:,}",
    ]


if __name__ == "__main__":
    main()
