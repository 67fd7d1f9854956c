"""Whatever ends `prepare`, the same command goes on and gives the bytes of a calm run."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from nope_gpt.config import PrepareConfig
from nope_gpt.data import planning, reading, schedule, units
from nope_gpt.data.preparation import Preparation
from nope_gpt.data.prepare import prepare
from nope_gpt.errors import NetworkError, NopeError
from nope_gpt.files.writing import ArrayFile

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fork and kill")

KILLED = 9
Counted = Callable[[str], None]


def tree(path: Path) -> dict[str, str]:
    """The sha256 of every file below a directory."""
    return {
        file.relative_to(path).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


def corpus(path: Path, num_documents: int = 60) -> list[str]:
    """A text, conversations and a table: text and chat, several files and units of each."""
    path.mkdir()
    rng = random.Random(0)
    words = "the list holds every value that a function was given and returns none".split()

    def sentence() -> str:
        return " ".join(rng.choices(words, k=rng.randint(5, 40))) + ".\n\n"

    rows = [{"text": sentence() * 3} for _ in range(num_documents)]
    rows += rows[:5]
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, path / "table.parquet", row_group_size=8)
    (path / "story.txt").write_text("".join(sentence() for _ in range(num_documents)))
    with (path / "chats.jsonl").open("w") as file:
        for _ in range(num_documents):
            messages = [
                {"role": "user", "content": sentence()},
                {"role": "assistant", "content": sentence()},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    return [str(path)]


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a few kilobytes make many units."""
    monkeypatch.setattr(units, "UNIT_SIZE", 6_000)
    monkeypatch.setattr(reading, "SPAN_SIZE", 2_000)
    monkeypatch.setattr(reading, "PARAGRAPH_REACH", 500)
    monkeypatch.setattr(planning, "SMALLEST_SHARE", 4_000)


def settings(root: Path, **more: Any) -> PrepareConfig:
    values = {"dataset_path": str(root), "token_encoding": "bytes", "holdout_fraction": 0.1}
    return PrepareConfig(**values | {"num_dataset_processes": 1} | more)


@pytest.fixture
def undisturbed(tmp_path: Path) -> dict[str, str]:
    """What an uninterrupted run makes."""
    names = corpus(tmp_path / "corpus")
    prepare(names, settings(tmp_path / "whole"))
    found = tree(tmp_path / "whole")
    assert len(found) > 20, "several units of each content"
    return found


def in_child(body: Callable[[], None]) -> int:
    """Run something in a copy of this process; returns how that ended."""
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        try:
            body()
        except NopeError as error:
            os.write(2, f"{error}\n".encode())
            os._exit(1)
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(2)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def watch_writes(visit: Counted) -> None:
    """Call something before and after everything that changes the disk."""

    def around(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def wrapped(*arguments: Any, **more: Any) -> Any:
            visit(f"before {name}")
            result = original(*arguments, **more)
            visit(f"after {name}")
            return result

        setattr(owner, name, wrapped)

    for name in ("fsync", "replace", "rename", "unlink", "rmdir", "mkdir"):
        around(os, name)
    around(ArrayFile, "append")
    around(units.WorkFile, "write")


def killed_at(moment: int) -> Counted:
    """End the process without any farewell at the n-th visit."""
    seen = 0

    def visit(_: str) -> None:
        nonlocal seen
        seen += 1
        if seen == moment:
            os._exit(KILLED)

    return visit


def moments(total: int, count: int) -> Iterator[int]:
    """So many moments, the first and the last ones among them."""
    step = max(total // count, 1)
    yield from sorted(
        {*range(1, total + 1, step), *range(1, 12), *range(max(total - 40, 1), total)}
    )


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"deduplicate": True}], ids=["plain", "deduplicated"])
def test_a_kill_at_any_write_flush_or_rename_changes_nothing(
    tmp_path: Path, more: dict[str, Any]
) -> None:
    names = corpus(tmp_path / "corpus", 24)
    prepare(names, settings(tmp_path / "whole", **more))
    expected = tree(tmp_path / "whole")
    visits: list[str] = []
    log = tmp_path / "visits"

    def counted() -> None:
        watch_writes(visits.append)
        prepare(names, settings(tmp_path / "counted", **more))
        log.write_text(str(len(visits)))

    assert in_child(counted) == 0
    total = int(log.read_text())
    assert total > 300
    for moment in moments(total, 60):
        root = tmp_path / f"killed-{moment}"

        def disturbed(moment: int = moment, root: Path = root) -> None:
            watch_writes(killed_at(moment))
            prepare(names, settings(root, **more))

        assert in_child(disturbed) in (KILLED, 0)
        prepare(names, settings(root, **more))
        assert tree(root) == expected, f"killed at {moment} of {total}"


@pytest.mark.slow
def test_a_loss_of_power_changes_nothing(tmp_path: Path, undisturbed: dict[str, str]) -> None:
    names = [str(tmp_path / "corpus")]
    for moment in range(10, 1200, 61):
        root = tmp_path / f"lost-{moment}"
        flushed = tmp_path / f"flushed-{moment}"
        inodes: set[int] = set()

        def disturbed(
            moment: int = moment,
            root: Path = root,
            flushed: Path = flushed,
            inodes: set[int] = inodes,
        ) -> None:
            original, stop = os.fsync, killed_at(moment)

            def fsync(descriptor: int) -> None:
                original(descriptor)
                inodes.add(os.fstat(descriptor).st_ino)
                flushed.write_text(json.dumps(sorted(inodes)))

            os.fsync = fsync
            watch_writes(stop)
            prepare(names, settings(root))

        if in_child(disturbed) == 0:
            break
        safe = set(json.loads(flushed.read_text())) if flushed.is_file() else set()
        for file in root.rglob("*"):
            if file.is_file() and file.stat().st_ino not in safe:
                os.truncate(file, file.stat().st_size // 2)  # What never reached the disk.
        prepare(names, settings(root))
        assert tree(root) == undisturbed, f"lost at {moment}"


SCRIPT = """
import sys
from nope_gpt.data import planning, reading, units
units.UNIT_SIZE, reading.SPAN_SIZE, planning.SMALLEST_SHARE = 6_000, 2_000, 4_000
reading.PARAGRAPH_REACH = 500
from nope_gpt.cli import main
main()
"""


def start(names: list[str], root: Path, processes: int) -> subprocess.Popen[bytes]:
    """Prepare in a process of its own."""
    options = ["--dataset-path", root, "--token-encoding", "bytes", "--holdout-fraction", "0.1"]
    arguments = ["prepare", *names, *options, "--num-dataset-processes", processes]
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *map(str, arguments)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def finished(process: subprocess.Popen[bytes]) -> None:
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said.decode()


def test_processes_do_not_change_the_bytes(tmp_path: Path, undisturbed: dict[str, str]) -> None:
    for processes in (2, 5):
        root = tmp_path / f"by-{processes}"
        finished(start([str(tmp_path / "corpus")], root, processes))
        assert tree(root) == undisturbed


@pytest.mark.slow
def test_kills_at_random_moments_change_nothing(
    tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    rng = random.Random(1)
    root = tmp_path / "killed"
    kept = 0
    for _ in range(6):
        process = start([str(tmp_path / "corpus")], root, 2)
        deadline = time.monotonic() + 60
        partial = root / "corpus-bytes.partial" / "units"
        while process.poll() is None and time.monotonic() < deadline:
            if len(list(partial.glob("*.json"))) > kept:
                time.sleep(rng.uniform(0.0, 0.05))
                break
            time.sleep(0.002)
        process.kill()
        process.communicate()
        kept = len(list(partial.glob("*.json")))
    finished(start([str(tmp_path / "corpus")], root, 3))
    assert tree(root) == undisturbed


@pytest.mark.slow
def test_an_interrupt_says_what_is_kept_and_the_same_command_goes_on(
    tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        root = tmp_path / f"stopped-{code}"
        process = start([str(tmp_path / "corpus")], root, 2)
        partial = root / "corpus-bytes.partial"
        deadline = time.monotonic() + 60
        while not any(partial.glob("units/*")) and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        if process.returncode == 0:
            pytest.fail("it was done before the signal came")
        assert process.returncode == code
        assert f"what is finished is kept in {partial}" in said.decode().replace("\n", " ")
        assert "the same command goes on" in said.decode()
        finished(start([str(tmp_path / "corpus")], root, 2))
        assert tree(root) == undisturbed


def test_several_processes_prepare_the_same_at_once(
    tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    root = tmp_path / "shared"
    together = [start([str(tmp_path / "corpus")], root, 1) for _ in range(3)]
    for process in together:
        finished(process)
    assert tree(root) == undisturbed


def test_workers_end_with_their_parent(tmp_path: Path) -> None:
    names = corpus(tmp_path / "corpus", 3_000)
    root = tmp_path / "root"
    process = start(names, root, 2)
    deadline = time.monotonic() + 60
    while not any(root.glob("*.partial/units/*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    children = children_of(process.pid)
    assert len(children) >= 2
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 10
    while any(map(is_running, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, children))


def children_of(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children")
    if not found.exists():
        pytest.skip("needs /proc")
    return [int(child) for child in found.read_text().split()]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_parts_on_several_machines_make_the_same_bytes(
    tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    names = [str(tmp_path / "corpus")]
    root = tmp_path / "parts"
    for index in (2, 0):
        assert prepare(names, settings(root, shard=f"{index}/3")) == []
    with pytest.raises(NopeError, match="groups of files are not encoded yet") as caught:
        prepare(names, settings(root), merge=True)
    assert "run every --shard I/N to its end" in str(caught.value.hint)
    assert prepare(names, settings(root, shard="1/3")) == []
    made = prepare(names, settings(root), merge=True)
    assert [item.content for item in made] == ["text", "chat"]
    assert tree(root) == undisturbed


@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_ARRAY_TASK_ID": "{}", "SLURM_ARRAY_TASK_COUNT": "2"},
        {
            "SLURM_ARRAY_TASK_ID": "1{}",
            "SLURM_ARRAY_TASK_COUNT": "2",
            "SLURM_ARRAY_TASK_MIN": "10",
        },
        {"RANK": "{}", "WORLD_SIZE": "2"},
    ],
    ids=["slurm", "slurm from ten", "torchrun"],
)
def test_a_job_engine_tells_which_part_is_ours(
    tmp_path: Path,
    undisturbed: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
) -> None:
    names = [str(tmp_path / "corpus")]
    root = tmp_path / "parts"
    for index in range(2):
        for name, value in environment.items():
            monkeypatch.setenv(name, value.format(index))
        assert prepare(names, settings(root)) == []
    prepare(names, settings(root), merge=True)
    assert tree(root) == undisturbed


@pytest.mark.parametrize("shard", ["2/2", "1", "a/b", "-1/2", "1/0", ""])
def test_a_part_that_cannot_be_meant_is_refused(tmp_path: Path, shard: str) -> None:
    with pytest.raises(NopeError, match="must be I/N with I from 0 to N - 1"):
        prepare(["python-docs"], settings(tmp_path, shard=shard))


def test_an_unfinished_preparation_of_something_else_is_not_used(
    tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    names = [str(tmp_path / "corpus")]
    root = tmp_path / "root"
    prepare(names, settings(root, shard="0/2"))
    other = settings(root, holdout_fraction=0.2)
    with pytest.raises(NopeError, match=r"holdout fraction was 0\.1, and is 0\.2 now") as caught:
        prepare(names, other)
    assert "--overwrite to begin anew" in str(caught.value.hint)
    made = prepare(names, settings(root, holdout_fraction=0.2, overwrite=True))
    assert not made[0].existed
    assert sorted(path.name for path in root.iterdir()) == ["corpus-bytes", "corpus-chat-bytes"]
    assert tree(root) != undisturbed


def test_after_a_file_is_mended_the_units_of_the_others_are_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = corpus(tmp_path / "corpus")
    torn = tmp_path / "corpus" / "torn.jsonl"
    torn.write_text('{"text": "fine"}\n{"text": ')
    root = tmp_path / "root"
    with pytest.raises(NopeError, match="this line is not JSON") as caught:
        prepare(names, settings(root))
    assert caught.value.where == f"{torn}:2"
    kept = {path.name for path in (root / "corpus-bytes.partial" / "units").iterdir()}
    assert len(kept) > 5
    torn.write_text('{"text": "fine"}\n{"text": "mended"}\n')
    made: list[str] = []
    original = units.encode_span

    def counted(span: Any, *more: Any) -> Any:
        made.append(span.name)
        return original(span, *more)

    monkeypatch.setattr(schedule, "encode_span", counted)
    prepare(names, settings(root))
    assert "torn.jsonl" in made
    calm = tmp_path / "calm"
    num_before = len(made)
    prepare(names, settings(calm))
    assert len(made) - num_before > num_before, "most of it was kept"
    assert tree(root) == tree(calm)


@pytest.mark.parametrize("hint", ["look at the network", None])
def test_an_error_says_what_is_kept_also_where_it_has_no_hint_of_its_own(
    tmp_path: Path, hint: str | None
) -> None:
    job = Preparation(corpus(tmp_path / "corpus"), settings(tmp_path / "root"), lambda _: None)
    job.staging.keep_unit({"unit": "one"})
    told = job.with_what_is_kept(NetworkError("gone", hint=hint)).hint
    assert told is not None
    kept = f"0 of 0 files are encoded and kept in {job.staging.path}, and the same command goes on"
    assert told == (f"{hint}; {kept}" if hint else kept)
