"""`nope doctor` tells what a machine has and lacks, and what mends it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from loopback_hub import LoopbackHub

Nope = Callable[..., "subprocess.CompletedProcess[str]"]


def found_by(done: subprocess.CompletedProcess[str]) -> dict[str, dict[str, str]]:
    return {finding["name"]: finding for finding in json.loads(done.stdout)["findings"]}


def test_every_finding_that_could_be_better_says_what_to_do(nope: Nope) -> None:
    done = nope("doctor", "--no-speed", "--json")
    assert done.returncode == 0, done.stderr
    found = found_by(done)
    assert {"versions", "device", "memory", "disk", "Hub", "transformers"} <= found.keys()
    for finding in found.values():
        assert finding["state"] == "good" or (finding["state"] == "less" and finding["remedy"])
    assert found["Hub"]["remedy"] == "unset HF_HUB_OFFLINE"


def test_people_read_a_line_for_each_finding_and_what_to_type_below_it(nope: Nope) -> None:
    lines = nope("doctor", "--no-speed").stdout.splitlines()
    place = next(index for index, line in enumerate(lines) if "HF_HUB_OFFLINE is set" in line)
    assert lines[place].startswith("– Hub ")
    assert lines[place + 1].split() == ["next:", "unset", "HF_HUB_OFFLINE"]
    assert any(line.startswith("✓ versions ") for line in lines)


@pytest.mark.parametrize("token", ["", "hf_secret_of_a_user"])
def test_a_hub_that_answers_is_told_and_a_token_is_never_printed(
    nope: Nope, tmp_path: Path, token: str
) -> None:
    with LoopbackHub(tmp_path / "hub") as hub:
        environment = hub.environment(tmp_path / "home")
        done = nope("doctor", "--no-speed", "--json", env=environment | {"HF_TOKEN": token})
    finding = found_by(done)["Hub"]
    assert (finding["state"], "answers" in finding["told"]) == ("good", True)
    assert finding["remedy"] == (None if token else "hf auth login")
    assert "hf_secret" not in done.stdout + done.stderr
    gone = nope("doctor", "--no-speed", "--json", env=environment)
    assert gone.returncode == 0
    assert "does not answer" in found_by(gone)["Hub"]["told"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a place that is never writable")
def test_a_place_that_cannot_be_written_is_bad(nope: Nope) -> None:
    done = nope("doctor", "--no-speed", "--json", shell='cd /proc && exec "$0" "$@"')
    assert done.returncode == 1
    assert found_by(done)["disk"]["state"] == "bad"
    assert found_by(done)["disk"]["remedy"]


@pytest.mark.slow
def test_it_compiles_and_trains_here(nope: Nope) -> None:
    found = found_by(nope("doctor", "--json"))
    assert "tokens/s" in found["speed"]["told"]
    assert found["torch.compile"]["told"].startswith("compiles a block")
    assert found["native decoding"]["state"] == "good"


@pytest.mark.slow
def test_without_a_compiler_it_says_which_package_has_one(nope: Nope, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    found = found_by(nope("doctor", "--json", env={"PATH": str(tools), "CXX": "no-such"}))
    for name in ("torch.compile", "native decoding"):
        assert found[name]["state"] == "less"
        assert "C++ compiler" in found[name]["told"]
    assert found["native decoding"]["remedy"] == "apt install g++"
