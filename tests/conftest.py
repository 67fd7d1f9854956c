"""Every test gets a home, a working directory and an environment of its own."""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # As `nope` has it; read when torch is imported.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) - 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // (workers + 1), 1)))

import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

R50K_RANKS = "0ea1e91bbb3a60f729a8dc8f777fd2fc07cd8df4"
"""The name tiktoken gives to r50k_base's ranks in its cache: the sha1 of their address."""

CORPUS = (
    "The function returns a new list. The list holds the values that the function was given. "
    "If the value is None, an error is raised. The method sets the name of the object. "
)


@pytest.fixture(autouse=True)
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keep the user's files, terminal and credentials out of the tests."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    scheduled = [name for name in os.environ if name.startswith("SLURM_")] + ["RANK", "WORLD_SIZE"]
    for name in ("FORCE_COLOR", "NOPE_DEBUG", "XDG_CACHE_HOME", "HF_TOKEN", *scheduled):
        monkeypatch.delenv(name, raising=False)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    yield
    torch.set_rng_state(state)
    torch.set_num_threads(threads)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--forbid-skips", action="store_true", help="fail if any test was skipped for any reason"
    )
    parser.addoption(
        "--file-budget", type=float, help="fail if the tests of a file take more seconds than this"
    )


spent: Counter[str] = Counter()
"""Seconds by file."""


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    spent[report.nodeid.partition("::")[0]] += report.duration


def beyond_budget(config: pytest.Config) -> list[str]:
    budget = config.getoption("--file-budget")
    over = [(file, seconds) for file, seconds in spent.items() if budget and seconds > budget]
    return [f"{file} took {seconds:.0f} s, and may take {budget:.0f}" for file, seconds in over]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in beyond_budget(terminalreporter.config):
        terminalreporter.write_line(f"over budget: {line}", red=True)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A skipped test is no passed test, where everything is at hand to run it."""
    reporter = session.config.pluginmanager.getplugin("terminalreporter")
    skipped = session.config.getoption("--forbid-skips") and reporter.stats.get("skipped")
    if reporter and (skipped or beyond_budget(session.config)):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs tiktoken's ranks where they are not cached: tests use no network."""
    cache = os.environ.get("TIKTOKEN_CACHE_DIR")
    if item.get_closest_marker("ranks") and not (cache and (Path(cache) / R50K_RANKS).is_file()):
        pytest.skip("needs tiktoken's ranks: set TIKTOKEN_CACHE_DIR to a cache that has them")


@pytest.fixture
def nope(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the real command line in a process of its own; returns what it said."""

    def run(
        *arguments: object,
        stdin: str | bytes = "",
        env: dict[str, str] | None = None,
        shell: str | None = None,
    ) -> subprocess.CompletedProcess[str]:
        beginning = ["sh", "-c", shell] if shell else []
        done = subprocess.run(
            [*beginning, sys.executable, "-m", "nope_gpt.cli", *map(str, arguments)],
            input=stdin.encode() if isinstance(stdin, str) else stdin,
            capture_output=True,
            cwd=tmp_path,
            env=os.environ | (env or {}),
            timeout=300,
            check=False,
        )
        return subprocess.CompletedProcess(
            done.args, done.returncode, done.stdout.decode(), done.stderr.decode()
        )

    return run


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A small text file of several documents."""
    directory = tmp_path / "corpus"
    directory.mkdir()
    for number in range(12):
        (directory / f"{number:02d}.txt").write_text(CORPUS * (number + 2), encoding="utf-8")
    return directory


@pytest.fixture
def base(corpus: Path, tmp_path: Path) -> Path:
    """A run of a base model to tune."""
    from small_chats import base_run

    return base_run(corpus, tmp_path)
