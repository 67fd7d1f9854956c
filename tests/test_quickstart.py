"""The main job, end to end, on the text that this Python carries."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Nope = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.slow
def test_quickstart_makes_a_model_and_goes_on_where_it_stopped(nope: Nope, tmp_path: Path) -> None:
    steps = ("quickstart", "--pretrain-steps", 2, "--tune-steps", 2)
    done = nope(*steps)
    assert done.returncode == 0, done.stderr
    for command in ("prepare", "pretrain", "tune", "export", "generate", "chat"):
        assert f"$ nope {command}" in done.stderr
    assert "What to type next" in done.stderr
    assert done.stdout.rstrip().endswith("exports/docs-chat")
    assert (tmp_path / "quickstart" / "exports" / "docs-chat" / "model.safetensors").is_file()
    again = nope(*steps)
    assert again.returncode == 0, again.stderr
    assert "already there" in again.stderr
    assert "going on from step 2 of 2" in again.stderr
    assert again.stdout == done.stdout
    other = nope(*steps, "--seed", 1)
    assert other.returncode == 2
    assert "the seed changed since the run began" in other.stderr
    assert "choose another --directory" in other.stderr


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="the signal of a terminal is POSIX's")
def test_an_interrupted_quickstart_says_that_the_same_line_goes_on(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "nope_gpt.cli", "quickstart", "--pretrain-steps=100000"]
    process = subprocess.Popen(line, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    with process.stderr:
        assert any(text.startswith("step ") for text in process.stderr)
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
    assert process.wait(60) == 130, said
    assert "by a signal, after saving a checkpoint" in said
    assert "next:  the same command goes on\n" in said
