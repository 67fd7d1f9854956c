"""Every benchmark that the libraries of the tests suffice for still runs, in its smallest form."""

from __future__ import annotations

import itertools
import shlex
import subprocess
import sys
from pathlib import Path
from pydoc_data import topics

import pytest
from small_chats import message, written

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

TINY = "--d 32 --layers 2 --heads 2 --kv 1 --vocabulary 300 --T 32 --B 2 --rounds 1 --steps 1"

COMMANDS = {
    "train": f"train.py {TINY} --without=nanoGPT-class --without=transformers,\\ float32",
    "checkpoints": "checkpoints.py --rounds 1 --steps 1",
    "cross_entropy": "cross_entropy.py --tokens 64 --dimensions 16 --rounds 1",
    "generate": "generate.py --shape tiny --case 1x64 --dtype bfloat16 --rounds 1 --steps 2",
    "tune": "tune.py chats.jsonl --rounds 1 --steps 1 --batch-size 2 --held-out 2 "
    "--tokenizer text.txt",
    "tune-dpo": "tune.py pairs.jsonl --objective dpo --rounds 1 --steps 1 --batch-size 2 "
    "--held-out 2 --tokenizer text.txt",
    "ablation": "learn.py ablation text.txt --steps 2 --encoding bpe:300 --only '**the default**'",
    "variations": "learn.py variations text.txt --steps 2 --encoding bpe:300 --only 'the default'",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_benchmark_runs(name: str, tmp_path: Path) -> None:
    texts = list(topics.topics.values())
    (tmp_path / "text.txt").write_text("\n".join(texts), encoding="utf-8")
    asked = [message("user", "Tell me more.")]
    answers = [[*asked, message("assistant", text[:400])] for text in texts]
    written([{"messages": answer} for answer in answers], tmp_path / "chats.jsonl")
    pairs = itertools.pairwise(answers)
    written([{"chosen": a, "rejected": b} for a, b in pairs], tmp_path / "pairs.jsonl")
    script, *words = shlex.split(COMMANDS[name])
    if name.startswith("tune"):
        words += [f"--without={way}" for way in ("TRL", "TRL, padding-free", "TRL, recomputing")]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "|" in done.stdout
