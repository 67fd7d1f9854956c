"""What `nope inspect` and `--preview` show, to people and to programs."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from nope_gpt.cli.artefacts import described
from nope_gpt.config import ExportConfig
from nope_gpt.data.staging import Staging
from nope_gpt.errors import MissingError, NopeError, UsageError
from nope_gpt.export.exporting import export
from nope_gpt.inspection import facts_of
from nope_gpt.model import NoPEGPT
from nope_gpt.training.runs import locked

Nope = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.mark.slow
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


def test_a_run_tells_its_state_its_settings_and_its_checkpoints(base: Path) -> None:
    damaged = base / "checkpoints" / "step-9"
    damaged.mkdir()
    facts = facts_of(base)
    assert (facts["kind"], facts["command"], facts["step"]) == ("run", "pretrain", 2)
    assert facts["trained_by"] is None
    assert facts["changed_settings"]["--max-steps"] == 2
    assert facts["changed_settings"].keys().isdisjoint({"--weight-decay", "--length-growth"})
    whole, broken = facts["checkpoints"]
    assert (whole["step"], whole["complaint"]) == (2, None)
    assert "no manifest.json" in broken["complaint"]
    told = described(facts)
    assert f"nope pretrain --resume {base}" in told
    assert f"nope generate --model {base}" in told
    with locked(base):
        assert f"process {os.getpid()}" in facts_of(base)["trained_by"]


def test_a_checkpoint_tells_the_network_and_how_it_came_to_be(base: Path) -> None:
    path = base / "checkpoints" / "step-2"
    facts = facts_of(path, verify=True)
    model = NoPEGPT.from_pretrained(path)
    assert facts["parameters"] == sum(weight.numel() for weight in model.parameters())
    assert facts["config"] == model.config.as_dict()
    assert facts["tokenizer"] == {"name": "bytes", "chat": False}
    (stage,) = facts["stages"]
    assert (stage["command"], stage["step"]) == ("pretrain", 2)
    assert f"{facts['parameters']:,} in float32" in described(facts)
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    with pytest.raises(NopeError, match=r"model\.safetensors is not what was written"):
        facts_of(path, verify=True)


@pytest.mark.parametrize("format", ["hub", "gguf"])
def test_an_export_tells_what_read_it_and_whether_it_is_still_that(
    base: Path, tmp_path: Path, format: str
) -> None:
    path = tmp_path / "exported"
    export(ExportConfig(model=str(base), format=format, output=str(path)))
    facts = facts_of(path, verify=True)
    assert (facts["kind"], facts["format"]) == ("export", format)
    assert facts["reports"][0]["texts"] == facts["reports"][0]["num_texts"]
    assert ("config" in facts) == (format == "hub")
    assert "nope pretrain  2 steps" in described(facts)
    with (path / "README.md").open("a") as card:
        card.write("more")
    with pytest.raises(NopeError, match=r"this export is damaged: README\.md"):
        facts_of(path, verify=True)
    facts_of(path)


def test_a_directory_of_artefacts_tells_each(base: Path, corpus: Path, tmp_path: Path) -> None:
    facts = facts_of(tmp_path)
    kinds = {item["name"]: item["kind"] for item in facts["items"]}
    assert kinds["bases/pretrain"] == "run"
    assert kinds["text/corpus-bytes"] == "dataset"
    assert "bases/pretrain  " in described(facts)
    with pytest.raises(MissingError, match="nothing that nope has made"):
        facts_of(corpus)
    with pytest.raises(MissingError, match="there is nothing here") as missing:
        facts_of(base.with_name("pretrian"))
    assert str(base) in str(missing.value)
    with pytest.raises(UsageError, match="this is a file"):
        facts_of(base / "run.json")


def test_an_unfinished_data_set_tells_how_far_it_is(tmp_path: Path) -> None:
    staging = Staging(tmp_path / "texts.partial")
    staging.begin({"recipe": {}})
    staging.keep_unit({"unit": "one"})
    with staging.locked((0, 1), print):
        facts = facts_of(staging.path)
        assert (facts["kind"], facts["units"]) == ("unfinished dataset", 1)
        assert facts["prepared_now"]
    assert "1 shard" in described(facts_of(staging.path))
    assert not facts_of(staging.path)["prepared_now"]


def test_the_command_prints_one_object_for_programs_and_refuses_what_it_cannot_show(
    nope: Nope, base: Path
) -> None:
    done = nope("inspect", base, "--json")
    assert json.loads(done.stdout)["kind"] == "run"
    refused = nope("inspect", base, "--preview", "2")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "this is a run, and --preview shows documents of a data set" in refused.stderr
