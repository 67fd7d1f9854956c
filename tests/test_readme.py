"""The Python in the README runs, as it stands there, from a directory and from a hub."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from loopback_hub import LoopbackHub
from reference import write_published

README = Path(__file__).parent.parent / "README.md"
OWNER = "andrewdalpino"
TINY = {
    "embedding_dimensions": 8,
    "num_q_heads": 2,
    "num_kv_heads": 1,
    "num_decoder_layers": 1,
}


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)


def write_models(root: Path) -> None:
    """Both models in the published layout, with the chat model's wrong vocabulary."""
    for name, rows in (("NoPE-GPT-400M-Base", 50257), ("NoPE-GPT-400M-Chat", 50261)):
        write_published(
            root / OWNER / name,
            stated_vocabulary=50257,
            tokenizer="r50k_base",
            vocabulary_size=rows,
            **TINY,
        )


def run_python(code: str, stdin: str, environment: dict[str, str]) -> str:
    """Run a snippet in a process of its own; the end of the input is the end of the user."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=stdin,
        capture_output=True,
        encoding="utf-8",
        env=os.environ | environment | {"PYTHONIOENCODING": "utf-8"},
        timeout=120,
        check=False,
    )
    expected_end = "EOFError" in done.stderr and "while True" in code
    assert done.returncode == 0 or expected_end, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("source", ["directory", "hub"])
def test_the_readmes_python_runs_as_it_stands_there(source: str, tmp_path: Path) -> None:
    load, generate, chat = python_blocks()
    with LoopbackHub(tmp_path / "hub") as hub:
        if source == "hub":
            write_models(tmp_path / "hub" / "models")
            environment = hub.environment(tmp_path / "home")
        else:
            write_models(tmp_path)
            environment = {"HF_HUB_OFFLINE": "1"}
        continued = run_python(load + generate, "Once upon a time\n", environment)
        assert continued.startswith("Enter a prompt: ")
        assert len(continued) > len("Enter a prompt: ")
        # Random weights seldom stop by themselves: a shorter answer is as good.
        chat = chat.replace("max_tokens=2000", "max_tokens=20")
        answered = run_python(chat, "Hi!\nWho are you? 👋\n", environment)
        assert answered.count("Enter a prompt: ") == 3
        assert len(answered.split("Enter a prompt: ")[1]) > 3
        assert bool(hub.requests) == (source == "hub")


@pytest.mark.slow
@pytest.mark.ranks
def test_chat_talks_to_a_model_of_the_hub_and_again_without_it(tmp_path: Path) -> None:
    write_models(tmp_path / "hub" / "models")
    command = [sys.executable, "-m", "nope_gpt.cli", "chat", "--max-tokens", "8", "--seed", "0"]
    command += ["--model", f"{OWNER}/NoPE-GPT-400M-Chat"]
    answers = []
    with LoopbackHub(tmp_path / "hub") as hub:
        environment = os.environ | hub.environment(tmp_path / "home")
        answers.append(chat(command, environment))
        assert any("model.safetensors" in request for request in hub.requests)
    answers.append(chat(command, environment))
    assert answers[0] == answers[1]
    assert len(answers[0].splitlines()) >= 2


def chat(command: list[str], environment: dict[str, str]) -> str:
    """Two messages through a pipe."""
    done = subprocess.run(
        command,
        input="hi\nbye\n",
        capture_output=True,
        encoding="utf-8",
        env=environment,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.ranks
def test_a_pushed_model_comes_back_bit_for_bit(tmp_path: Path) -> None:
    write_models(tmp_path)
    code = f"""
import torch
from nope_gpt.model import NoPEGPT
model = NoPEGPT.from_pretrained({str(tmp_path / OWNER / "NoPE-GPT-400M-Chat")!r})
model.push_to_hub("someone/copy", private=True)
again = NoPEGPT.from_pretrained("someone/copy")
tokens = torch.arange(50).unsqueeze(0)
print(torch.equal(model(tokens), again(tokens)), again.vocabulary_size)
"""
    with LoopbackHub(tmp_path / "hub") as hub:
        environment = hub.environment(tmp_path / "home")
        assert run_python(code, "", environment) == "True 50261\n"


@pytest.mark.slow
def test_a_model_that_is_on_no_hub_is_missing_and_an_absent_hub_is_the_network(
    tmp_path: Path,
) -> None:
    command = [sys.executable, "-m", "nope_gpt.cli", "generate", "hi", "--model", "no/such"]
    with LoopbackHub(tmp_path / "hub") as hub:
        environment = os.environ | hub.environment(tmp_path / "home")
        missing = subprocess.run(command, capture_output=True, text=True, env=environment)
    absent = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (missing.returncode, absent.returncode) == (3, 5)
    assert "no such model on the Hub" in missing.stderr
    assert "the Hub cannot be reached" in absent.stderr
    assert "Traceback" not in missing.stderr + absent.stderr
