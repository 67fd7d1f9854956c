"""What `nope inspect` and `--preview` show, to people and to programs."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

Nope = Callable[..., "subprocess.CompletedProcess[str]"]


def test_samples_are_told_to_programs_as_one_object(nope: Nope, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "Hi?"},
                          {"role": "assistant", "content": "Yes."}]}]  # fmt: skip
    (tmp_path / "[red]chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = ("prepare", "[red]chats.jsonl", "--token-encoding", "bytes")
    told = nope(*line, "--preview", "2", "--json")
    (sample,) = json.loads(told.stdout)["samples"]
    assert sample["source"] == "[red]chats"
    (stream,) = sample["streams"]
    assert [run["text"] for run in stream["runs"] if run["trained"]] == ["Yes.\n<|im_end|>"]
    assert "".join(run["text"] for run in stream["runs"]).count("<|im_start|>") == 2
    assert nope(*line).returncode == 0
    again = nope("inspect", "datasets/red-chats-bytes", "--preview", "2", "--json")
    assert json.loads(again.stdout) == json.loads(told.stdout)
    plain = nope("inspect", "datasets/red-chats-bytes", "--preview", "1")
    assert "[red]chats: " in plain.stdout
    assert "⟦Yes.\n<|im_end|>⟧" in plain.stdout
    assert nope(*line, "--preview", "-1").returncode == 2
    assert nope("inspect", "datasets/red-chats-bytes", "--preview", "-1").returncode == 2


def test_a_report_is_printed_by_whatever_rank_and_in_whatever_encoding(
    nope: Nope, corpus: Path
) -> None:
    assert nope("prepare", corpus, "--token-encoding", "bytes").returncode == 0
    env = {"RANK": "3", "PYTHONIOENCODING": "latin-1"}
    done = nope("inspect", "datasets/corpus-bytes", env=env)
    assert done.returncode == 0, done.stderr
    assert "tokens a document" in done.stdout
    assert "????" in done.stdout, "for the bars"
