"""What surrounds the program may be anything: its user, its limits, its clock, its neighbours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from loopback_hub import CLIENT
from small import SHAPE, small_model

from nope_gpt.errors import NopeError
from nope_gpt.files.artefacts import FORMAT_VERSION, MANIFEST, read_manifest, verify
from nope_gpt.tokenization import BaseTokenizer

COMMAND = "import sys; from nope_gpt.cli import main; main(sys.argv[1:])"

NO_HOME = """
import os, pwd
os.environ.pop("HOME")
def nobody(*_): raise KeyError("no such user")
pwd.getpwuid = nobody
"""

LEAPING_CLOCK = """
import itertools, time
real, calls = time.time, itertools.count()
time.time = lambda: real() + (-1) ** next(calls) * 10 ** 8
"""

FEW_FILES = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
"""

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def under(tmp_path: Path) -> Run:
    """Run the command line in a process of its own, after some lines that change its world."""

    def run(world: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", world + COMMAND, *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=300,
            check=False,
            stdin=subprocess.DEVNULL,
        )

    return run


TRAINING = [
    "pretrain",
    *(f"--{name.replace('_', '-')}={value}" for name, value in SHAPE.items()),
    *("--tokens-per-sample=16", "--batch-size=2", "--max-steps=2", "--device=cpu", "--seed=0"),
]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="users and limits are those of POSIX")
@pytest.mark.parametrize(
    "world", [NO_HOME, LEAPING_CLOCK, FEW_FILES], ids=["no home", "a leaping clock", "64 files"]
)
def test_the_family_works_wherever_it_is(
    tmp_path: Path, corpus: Path, under: Run, world: str
) -> None:
    for path in corpus.iterdir():
        os.utime(path, (0, 0) if path.name < "05" else (2**33, 2**33))
    commands = [
        ["prepare", corpus, "--token-encoding=bytes", "--holdout-fraction=0.1"],
        TRAINING,
        [*TRAINING, "--max-steps=3", "--resume"],
        ["generate", "The", "--model=runs/pretrain", "--max-tokens=3"],
        ["export", "--model=runs/pretrain", "--format=hub", "--output=out"],
        ["size", "--memory=24GB"],
    ]
    for command in commands:
        done = under(world, *command)
        assert done.returncode == 0, (command, done.stderr)
        assert "Traceback" not in done.stderr
    rows = [json.loads(line) for line in (tmp_path / "runs/pretrain/metrics.jsonl").open()]
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3]
    assert all(0 <= row["seconds"] < 300 for row in steps)


@pytest.mark.skipif(sys.platform == "win32", reason="users are those of POSIX")
@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "~nobody-of-this-name/data"],
        pytest.param(
            ["generate", "x", "--model=a/b"],
            marks=pytest.mark.skipif(CLIENT < (1, 29), reason="older clients do without a home"),
        ),
    ],
)
def test_a_home_that_is_nowhere_is_told_as_such(under: Run, arguments: list[str]) -> None:
    done = under(NO_HOME, *arguments)
    assert done.returncode == 2, done.stderr
    assert "this user has no home directory" in done.stderr
    assert "set HOME" in done.stderr


PUBLISHER = f"""
import sys
from pathlib import Path
from nope_gpt.files.artefacts import publish
from nope_gpt.errors import NopeError
place, mine = Path(sys.argv[1]), sys.argv[2]
for round in range(40):
    manifest = {{"kind": "dataset", "format_version": {FORMAT_VERSION}}}
    try:
        with publish(place, manifest=manifest, overwrite=sys.argv[3] == "yes") as directory:
            for number in range(3):
                (directory / f"{{number}}.txt").write_text(f"{{mine}} {{round}}")
    except NopeError:
        continue
"""


@pytest.mark.parametrize("overwrite", ["yes", "no"])
def test_processes_that_write_one_place_leave_one_whole(tmp_path: Path, overwrite: str) -> None:
    place = tmp_path / "place"
    processes = [
        subprocess.Popen([sys.executable, "-c", PUBLISHER, place, str(number), overwrite])
        for number in range(4)
    ]
    seen = 0
    while any(process.poll() is None for process in processes):
        try:
            verify(place, read_manifest(place, "dataset"))
            seen += 1
        except NopeError:
            pass  # It is being replaced.
    assert [process.returncode for process in processes] == [0] * 4
    verify(place, read_manifest(place, "dataset"))
    assert len({path.read_text() for path in place.glob("*.txt")}) == 1
    assert seen
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("place")] == ["place"]


NO_LOCKS = """
import fcntl
fcntl.flock = fcntl.lockf = lambda *_: None
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the locks are those of POSIX")
def test_locks_without_effect_are_told(tmp_path: Path, corpus: Path, under: Run) -> None:
    prepare = ["prepare", corpus, "--token-encoding=bytes"]
    for world, said in ((NO_LOCKS, True), ("", False)):
        done = under(world, *prepare, f"--dataset-path=root-{said}")
        assert done.returncode == 0, done.stderr
        assert ("locks have no effect on this file system" in done.stderr) == said
    one, other = (tmp_path / f"root-{said}" / "corpus-bytes" / MANIFEST for said in (True, False))
    assert one.read_bytes() == other.read_bytes()


needs_linux = pytest.mark.skipif(
    sys.platform != "linux", reason="what root may do is taken from it by a call of Linux"
)

BOUND_BY_MODES = """
import ctypes
libc = ctypes.CDLL(None)
header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
libc.capget(header, sets)
sets[0] &= ~0b110
libc.capset(header, sets)
"""
"""Takes from root what lets it read and write where the mode of a file forbids it."""


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[Path]:
    """A directory that nothing can be written into."""
    path = tmp_path / "locked"
    path.mkdir()
    path.chmod(0o555)
    yield path
    path.chmod(0o755)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A model of bytes."""
    path = tmp_path / "model"
    small_model(vocabulary_size=257).save_pretrained(path)
    BaseTokenizer.of_bytes().save(path)
    return path


@pytest.mark.slow
@needs_linux
def test_a_place_that_may_not_be_written_is_told_and_stays_as_it_is(
    tmp_path: Path, corpus: Path, under: Run, locked: Path, written: Path
) -> None:
    prepare = ["prepare", corpus, "--token-encoding=bytes"]
    assert under("", *prepare).returncode == 0
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "x"}\n')
    many = ["generate", "--input=prompts.jsonl", f"--model={written}", "--max-tokens=2"]
    for command in (
        [*prepare, f"--dataset-path={locked}/sets"],
        [*TRAINING, f"--run-dir-path={locked}/runs"],
        ["export", f"--model={written}", "--format=hub", f"--output={locked}/out"],
        [*many, f"--output={locked}/texts.jsonl"],
    ):
        done = under(BOUND_BY_MODES, *command)
        assert done.returncode == 1, (command, done.stderr)
        assert "cannot write here: Permission denied" in done.stderr, command
        assert str(locked) in done.stderr
        assert "Traceback" not in done.stderr
        assert list(locked.iterdir()) == []


@pytest.mark.slow
@needs_linux
def test_a_home_that_may_not_be_written_is_done_without(
    under: Run, corpus: Path, locked: Path, written: Path
) -> None:
    world = f"""
import os
os.environ["HOME"] = {str(locked)!r}
for name in ("XDG_CACHE_HOME", "XDG_STATE_HOME", "HF_HOME", "TIKTOKEN_CACHE_DIR"):
    os.environ.pop(name, None)
"""
    for command in (
        ["prepare", corpus, "--token-encoding=bytes"],
        ["generate", "The", f"--model={written}", "--max-tokens=3"],
        ["chat", f"--model={written}", "--max-tokens=3"],
        ["size", "--memory=24GB"],
    ):
        done = under(BOUND_BY_MODES + world, *command)
        assert "Traceback" not in done.stderr, (command, done.stderr)
        assert done.returncode == 0, (command, done.stderr)
