"""How fast text becomes tokens on disk: `nope prepare` beside the other ways, in one run.

    pip install -e '.[bench]'
    python benchmarks/prepare.py CORPUS.parquet [--times 10] [--rounds 3]

Every way reads the same .parquet file (the given one, repeated so many times with a mark
behind each text) in a process of its own, all ways in turn, round after round. Processor
time is that of the process and all of its children, memory the largest sum of the
proportional set sizes (PSS) of all of them, sampled. The table gives medians.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

ENCODING = "r50k_base"


def texts_of(path: Path, groups: list[int]) -> list[str]:
    """The texts of some row groups."""
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(path)
    return [
        text
        for group in groups
        for text in file.read_row_group(group, columns=["text"]).column(0).to_pylist()
    ]


def encode_share(arguments: tuple[Path, list[int]]) -> tuple[int, float, float, float]:
    """Encode row groups that were read before: tokens, CPU seconds, start and end."""
    import tiktoken

    texts, encoding = texts_of(*arguments), tiktoken.get_encoding(ENCODING)
    started, before = time.time(), time.process_time()
    tokens = sum(len(encoding.encode_ordinary(text)) for text in texts)
    return tokens, time.process_time() - before, started, time.time()


def raw(path: Path, processes: int) -> dict[str, float]:
    """Nothing but `encode_ordinary` on texts in memory, on all cores: the ceiling."""
    import pyarrow.parquet

    count = pyarrow.parquet.ParquetFile(path).metadata.num_row_groups
    shares = [(path, list(range(start, count, processes))) for start in range(processes)]
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        done = pool.map(encode_share, shares, chunksize=1)
    tokens, cpu, _, _ = map(sum, zip(*done, strict=True))
    wall = max(end - start for _, _, start, end in done)
    return {"tokens": tokens, "cpu": cpu, "wall": wall}


def mapped(path: Path, processes: int) -> dict[str, float]:
    """`datasets.map` in batches, to its own files."""
    import datasets
    import tiktoken

    encoding = tiktoken.get_encoding(ENCODING)

    def encode(batch: dict[str, list[str]]) -> dict[str, list[Any]]:
        ids = [encoding.encode_ordinary(text) for text in batch["text"]]
        return {"ids": ids, "size": [len(each) for each in ids]}

    with tempfile.TemporaryDirectory() as cache:
        data = datasets.load_dataset(
            "parquet", data_files=str(path), split="train", columns=["text"], cache_dir=cache
        )
        done = data.map(encode, batched=True, num_proc=processes, remove_columns=["text"])
        return {"tokens": sum(done["size"])}


def streamed(path: Path, _: int) -> dict[str, float]:
    """A stream, row by row, a Python loop over the tokens, into a memory map."""
    import datasets
    import numpy as np
    import tiktoken

    encoding = tiktoken.get_encoding(ENCODING)
    data = datasets.load_dataset(
        "parquet", data_files=str(path), split="train", columns=["text"], streaming=True
    )
    data = data.map(lambda row: {"ids": encoding.encode_ordinary(row["text"])})
    with tempfile.TemporaryDirectory() as directory:
        size, place = 1 << 20, 0
        file = np.memmap(Path(directory) / "tokens", dtype=np.uint16, mode="w+", shape=size)
        for row in data:
            ids = [*row["ids"], encoding.eot_token]
            while place + len(ids) > size:
                file.flush()
                size *= 2
                os.truncate(file.filename, size * 2)
                file = np.memmap(file.filename, dtype=np.uint16, mode="r+", shape=size)
            for token in ids:
                file[place] = token
                place += 1
        file.flush()
    return {"tokens": place}


def nope(path: Path, processes: int) -> dict[str, float]:
    """`nope prepare`, to the data set in its place."""
    with tempfile.TemporaryDirectory() as root:
        done = subprocess.run(
            [sys.executable, "-m", "nope_gpt.cli", "prepare", str(path), "--dataset-path", root,
             "--num-dataset-processes", str(processes), "--json"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    (made,) = json.loads(done.stdout)["datasets"]
    return {"tokens": made["statistics"]["tokens"]}


WAYS: dict[str, tuple[str, Callable[[Path, int], dict[str, float]]]] = {
    "raw": ("`encode_ordinary` alone, texts in memory", raw),
    "map": ("`datasets.map(num_proc)`", mapped),
    "stream": ("`datasets` streaming, row by row", streamed),
    "nope": ("`nope prepare`", nope),
}


def measured(way: str, path: Path, processes: int) -> dict[str, float]:
    """Run one way in a process of its own."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, __file__, str(path), "--way", way, "--processes", str(processes)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    memory = Memory(child.pid)
    out, _ = child.communicate()
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    if child.returncode:
        raise SystemExit(f"{way} failed with {child.returncode}")
    peak = memory.stop()
    return {"cpu": cpu, "wall": wall, "peak": peak} | json.loads(out.splitlines()[-1])


class Memory(threading.Thread):
    """Samples the memory of a process and all below it."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.peak, self.ended = pid, 0, threading.Event()
        self.start()

    def run(self) -> None:
        import psutil

        while not self.ended.wait(0.1):
            total = 0
            try:
                root = psutil.Process(self.pid)
                everyone = [root, *root.children(recursive=True)]
            except psutil.Error:
                continue
            for process in everyone:
                try:
                    total += process.memory_full_info().pss
                except (psutil.Error, AttributeError):
                    continue
            self.peak = max(self.peak, total)

    def stop(self) -> int:
        """The largest sum that was seen."""
        self.ended.set()
        self.join()
        return self.peak


def repeated(path: Path, times: int, directory: Path) -> Path:
    """The corpus so many times, each text with a mark of its own behind it."""
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path)
    texts = table.column("text").to_pylist()
    place = table.schema.get_field_index("text")
    result = directory / f"{times}x.parquet"
    with pyarrow.parquet.ParquetWriter(result, table.schema) as writer:
        for number in range(times):
            marked = pyarrow.array([f"{text} ({number})" for text in texts])
            writer.write_table(table.set_column(place, "text", marked), row_group_size=1000)
    return result


def main() -> None:
    """Measure every way and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--times", type=int, nargs="+", default=[1, 10])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--way", choices=WAYS)
    given = parser.parse_args()
    if given.way:
        print(json.dumps(WAYS[given.way][1](given.corpus, given.processes)))
        return
    names = ("tiktoken", "pyarrow", "datasets", "numpy")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    print(f"{platform.machine()}, {cpu_name()}, {given.processes} processes")
    print(f"Python {platform.python_version()}, {versions}")
    with tempfile.TemporaryDirectory() as directory:
        for times in given.times:
            path = repeated(given.corpus, times, Path(directory))
            runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
            for _ in range(given.rounds):
                for way, results in runs.items():
                    results.append(measured(way, path, given.processes))
                    print(f"{times}x {way} {results[-1]}", file=sys.stderr)
            report(times, runs)
        shutil.rmtree(directory, ignore_errors=True)


def report(times: int, runs: dict[str, list[dict[str, float]]]) -> None:
    """Print the medians, and each as a share of the ceiling in its own round."""
    tokens = runs["raw"][0]["tokens"]
    print(f"\nCorpus x {times}: {tokens / 1e6:,.1f} million tokens of {ENCODING}\n")
    print("| way | M tok/s | M tok/CPU-s | of the ceiling: wall, CPU | memory, MB |")
    print("|---|---|---|---|---|")
    for way, results in runs.items():
        rounds = list(zip(results, runs["raw"], strict=True))

        def median(value: Callable[[dict[str, float], dict[str, float]], float]) -> float:
            return statistics.median(value(*each) for each in rounds)  # noqa: B023

        wall = median(lambda mine, _: tokens / mine["wall"] / 1e6)
        cpu = median(lambda mine, _: tokens / mine["cpu"] / 1e6)
        of_wall = median(lambda mine, best: best["wall"] / mine["wall"])
        of_cpu = median(lambda mine, best: best["cpu"] / mine["cpu"])
        peak = median(lambda mine, _: mine["peak"] / 1e6)
        print(
            f"| {WAYS[way][0]} | {wall:.2f} | {cpu:.2f} | {of_wall:.2f}, {of_cpu:.2f} "
            f"| {peak:,.0f} |"
        )


def cpu_name() -> str:
    """What the processor is called."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown")


if __name__ == "__main__":
    main()
