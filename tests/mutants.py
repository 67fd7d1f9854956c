"""Plant faults in copies of the package, one in each, and see that the tests catch them.

    python tests/mutants.py [--jobs 2] [network/attention data/shards ...]

`mutants.toml` lists, for each module, the tests that guard it and the faults.
"""

from __future__ import annotations

import argparse
import collections
import importlib
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import tomllib
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "nope_gpt"
TABLE = TESTS / "mutants.toml"

HERE, QUICK = "not online and not llama and not gpu", " and not slow"
"""Which tests run: the quick ones, and where each is named alone the others too."""

PROCESSES = multiprocessing.get_context("forkserver")
PRELOADED = ["hypothesis", "huggingface_hub", "pyarrow", "pytest", "safetensors.torch", "tiktoken"]
PRELOADED += ["torch.distributed.fsdp", "torch._dynamo"]
"""What takes longer to import than most tests to run; processes are forked from one that has it."""

CANNOT_IMPORT = 70
"""How a process ends whose module cannot be imported: every test would fail, whatever it tests."""

SHORTEST_LIMIT, TIMES_AS_LONG = 120.0, 5.0
"""Seconds that tests may take at least, and how many times what they take without a fault."""


class Fault(NamedTuple):
    """A text of a module, what takes its place, and what that breaks."""

    module: str
    what: str
    old: str
    new: str


class Outcome(NamedTuple):
    """What became of a fault: caught, MISSED or INVALID, and by which test or why."""

    verdict: str
    reason: str


class Ran(NamedTuple):
    """A run of tests; its code is None where it was stopped at the limit."""

    code: int | None
    output: str
    seconds: float


@contextmanager
def copied() -> Iterator[Path]:
    """A directory with a copy of the package."""
    with tempfile.TemporaryDirectory(prefix="mutant-", ignore_cleanup_errors=True) as root:
        shutil.copytree(PACKAGE, Path(root, PACKAGE.name))
        yield Path(root)


def run(root: Path, module: str, tests: Sequence[str], limit: float | None = None) -> Ran:
    """Run tests against the package in a directory, up to the first that fails."""
    output = root / "output"
    process = PROCESSES.Process(target=run_here, args=(root, module, tests, output))
    started = time.monotonic()
    process.start()
    process.join(limit)
    code = process.exitcode
    end(process)
    process.join()
    seen = output.read_text(encoding="utf-8", errors="replace") if output.is_file() else ""
    return Ran(code, seen, time.monotonic() - started)


def end(process: BaseProcess) -> None:
    """End a process and all that its tests started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid or 0, signal.SIGKILL)


def run_here(root: Path, module: str, tests: Sequence[str], output: Path) -> None:
    """Run tests in this process, which ends with their exit code."""
    os.setsid()
    with output.open("wb") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    os.chdir(root)
    os.environ["PYTHONPATH"] = sys.path[0] = str(root)
    import hypothesis
    import pytest

    # The first example that fails will do, and the same ones are tried every time.
    phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
    hypothesis.settings.register_profile("first", phases=phases, derandomize=True)
    hypothesis.settings.load_profile("first")
    try:
        found = importlib.import_module(".".join((PACKAGE.name, *module.split("/"))))
        assert Path(found.__file__ or "").is_relative_to(root), found.__file__
    except BaseException:
        traceback.print_exc()
        sys.exit(CANNOT_IMPORT)
    which = HERE if all("::" in name for name in tests) else HERE + QUICK
    options = ["-x", "-q", "-p", "no:cacheprovider", "-m", which, f"--basetemp={root / 'tests'}"]
    sys.exit(int(pytest.main([*options, *(str(TESTS / name) for name in tests)])))


def judge(ran: Ran) -> Outcome:
    """Say what a run of the tests means for the fault that was planted."""
    if ran.code is None:
        return Outcome("caught", f"the tests did not end within {ran.seconds:.0f} s")
    if ran.code == 0:
        return Outcome("MISSED", "every test passed")
    if ran.code < 0:
        return Outcome("caught", f"the tests were ended by {signal.Signals(-ran.code).name}")
    failed = re.search(r"^(?:FAILED|ERROR) \S*?(\w+\.py::.+?)(?: - |$)", ran.output, re.MULTILINE)
    if failed:
        return Outcome("caught", failed[1])
    what = "the module cannot be imported" if ran.code == CANNOT_IMPORT else "no test could run"
    return Outcome("INVALID", f"{what}: {ran.output.strip().splitlines()[-1]}")


def untouched(module: str, tests: Sequence[str]) -> Ran:
    """Run tests without a fault."""
    with copied() as root:
        return run(root, module, tests)


def planted(fault: Fault, tests: Sequence[str], limit: float) -> Outcome:
    """Plant a fault in a copy of the package and run the tests that guard it."""
    with copied() as root:
        path = root / PACKAGE.name / f"{fault.module}.py"
        content = path.read_text(encoding="utf-8")
        times = content.count(fault.old)
        if times != 1:
            return Outcome("INVALID", f"what it replaces is there {times} times, not once")
        path.write_text(content.replace(fault.old, fault.new), encoding="utf-8")
        return judge(run(root, fault.module, tests, limit))


def limits(table: Mapping[str, Any], pool: ThreadPoolExecutor) -> dict[str, float]:
    """Seconds that the tests of each module may take; without a fault all of them pass."""
    found = {}
    runs = pool.map(untouched, table, [entry["tests"] for entry in table.values()])
    for module, ran in zip(table, runs, strict=True):
        if ran.code != 0:
            sys.exit(f"{ran.output}\n{module}: its tests do not pass without a fault")
        seen = ran.output.strip().splitlines()[-1]  # Also how many were skipped.
        print(f"{module}: without a fault {seen}", file=sys.stderr, flush=True)
        found[module] = max(SHORTEST_LIMIT, TIMES_AS_LONG * ran.seconds)
    return found


def all_caught(table: Mapping[str, Any], pool: ThreadPoolExecutor) -> bool:
    """Plant every fault; tells of each, then of each module."""
    allowed = limits(table, pool)
    caught: collections.Counter[str] = collections.Counter()
    futures = {}
    for module, entry in table.items():
        for what, texts in entry["faults"].items():
            fault = Fault(module, what, *texts)
            futures[pool.submit(planted, fault, entry["tests"], allowed[module])] = fault
    for future in as_completed(futures):
        (module, what, *_), outcome = futures[future], future.result()
        caught[module] += outcome.verdict == "caught"
        print(f"{module}: {outcome.verdict}: {what} ({outcome.reason})", flush=True)
    print()
    for module, entry in table.items():
        print(f"{module}: {caught[module]} of {len(entry['faults'])} caught")
    return caught.total() == len(futures)


def main() -> int:
    """Plant the faults of the modules that are named, or of all; 1 unless all are caught."""
    table = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("modules", nargs="*", metavar="MODULE", help="such as data/shards")
    parser.add_argument("--jobs", type=int, default=1, help="faults at a time")
    arguments = parser.parse_args()
    if unknown := set(arguments.modules) - table.keys():
        parser.error(f"{TABLE.name} has no {', '.join(sorted(unknown))}")
    os.environ["OMP_NUM_THREADS"] = "1"
    PROCESSES.set_forkserver_preload(PRELOADED)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        try:
            chosen = {name: table[name] for name in arguments.modules or table}
            return 0 if all_caught(chosen, pool) else 1
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                end(process)
            raise


if __name__ == "__main__":
    sys.exit(main())
