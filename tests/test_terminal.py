"""The conversation in a real pseudo-terminal: every key, and what may go wrong there."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from loopback_hub import LoopbackHub
from test_chat import TOKENIZER, saved, speaker

from nope_gpt.model import NoPEGPT

if sys.platform != "win32":
    import pexpect

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX pseudo-terminal")

READY = "\x1b[?2004h"
"""What a line editor sends when it begins to read."""

Start = Callable[..., Any]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start `nope chat` in a terminal, with a model in `m`; ends what is left running."""
    children = []

    def begin(*words: str, model: NoPEGPT | None = None, size: tuple[int, int] = (24, 100),
              **environment: str) -> Any:  # fmt: skip
        if not (tmp_path / "m").is_dir():
            saved(model or speaker("ok"), tmp_path / "m")
        child = pexpect.spawn(
            sys.executable,
            ["-m", "nope_gpt.cli", "chat", "--model=m", "--device=cpu", "--compile=off", *words],
            env=os.environ
            | {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "XDG_STATE_HOME": str(tmp_path / "s")}
            | environment,
            encoding="utf-8",
            timeout=60,
            dimensions=size,
            # A shell starts what runs in the background with interrupts ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        children.append(child)
        return child

    yield begin
    for child in children:
        child.close(force=True)


def ask(child: Any, text: str) -> None:
    """Wait for the prompt, and send a line."""
    child.expect_exact(READY)
    child.send(f"{text}\r")


def leave(child: Any) -> None:
    """Leave by Ctrl-D, and see that all was well."""
    child.expect_exact(READY)
    child.sendcontrol("d")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    assert not re.search("Traceback|Error", child.before or "")


def transcript(child: Any, path: Path) -> list[dict[str, str]]:
    """The messages so far, by /save."""
    ask(child, f"/save {path}")
    child.expect_exact("saved")
    messages: list[dict[str, str]] = json.loads(path.read_text(encoding="utf-8"))["messages"]
    return messages[1:]


ENDLESS = ("--max-tokens=1000000", "--temperature=1", "--repeat-penalty=0")


def test_ctrl_c_stops_an_answer_and_ctrl_d_leaves(start: Start, tmp_path: Path) -> None:
    child = start(*ENDLESS, "--context-length=200", model=speaker("ha", stops=False))
    ask(child, "One?")
    child.expect_exact("aaaaaa")  # Its beginning may be gone from the line already.
    child.sendcontrol("c")
    child.expect(r"\d+ tokens · .* tok/s · .* · interrupted")
    ask(child, "x" * 200)
    child.expect_exact("the context holds 200")
    child.expect_exact(READY)
    child.send("halfway")
    child.expect_exact("halfway")
    child.sendcontrol("c")
    child.expect_exact(READY)
    child.sendcontrol("c")
    child.expect_exact("Ctrl-D or /quit leaves.")
    messages = transcript(child, tmp_path / "a.jsonl")
    assert [message["role"] for message in messages] == ["user", "assistant"]
    assert re.fullmatch("ha+", messages[1]["content"])
    leave(child)


def test_ctrl_c_stops_the_reading_of_a_long_prompt(start: Start, tmp_path: Path) -> None:
    torch.manual_seed(0)
    slow = NoPEGPT(261, 512, 8, 8, 12, 4).eval()
    (tmp_path / "long.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "x" * 30_000}]})
    )
    child = start("--context-length=40000", "--dtype=float32", model=slow)
    ask(child, "/load long.jsonl")
    ask(child, "/retry")
    child.expect_exact("⠋")
    child.sendcontrol("c")
    child.expect_exact("0 tokens · ", timeout=10)
    child.expect_exact("interrupted")
    leave(child)


def test_every_way_to_a_new_line(start: Start, tmp_path: Path) -> None:
    child = start("--stop=NEVER")
    child.expect_exact(READY)
    child.send("one")
    child.sendcontrol("j")
    child.send("two\x1b\rthree\\\rfour\r")
    child.expect_exact("stop")
    child.expect_exact(READY)
    child.send('"""five\r\rsix"""\r')
    child.expect_exact("stop")
    contents = [m["content"] for m in transcript(child, tmp_path / "a.jsonl")]
    assert contents == ["one\ntwo\nthree\nfour", "ok", "five\n\nsix", "ok"]
    leave(child)


def test_a_paste_of_two_hundred_lines_is_one_message_and_is_not_sent(
    start: Start, tmp_path: Path
) -> None:
    child = start()
    child.expect_exact(READY)
    lines = "\r".join(f"line {number}" for number in range(200))
    child.send(f"\x1b[200~{lines}\x1b[201~")
    child.expect_exact("line 199")
    child.send(" end\r")
    child.expect_exact("stop")
    messages = transcript(child, tmp_path / "a.jsonl")
    assert len(messages) == 2
    assert messages[0]["content"].splitlines()[::199] == ["line 0", "line 199 end"]
    leave(child)


def test_the_history_lasts_and_is_searched(start: Start, tmp_path: Path) -> None:
    child = start()
    ask(child, "first question")
    child.expect_exact("stop")
    ask(child, "second question")
    child.expect_exact("stop")
    leave(child)
    path = tmp_path / "s" / "nope-gpt" / "chat_history"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    child = start()
    child.expect_exact(READY)
    child.send("\x1b[A\x1b[A\r")
    child.expect_exact("stop")
    child.expect_exact(READY)
    child.sendcontrol("r")
    child.expect_exact("I-search backward")
    child.send("secon")
    child.expect_exact(" question")
    child.send("\r")
    time.sleep(0.3)
    child.send("\r")
    child.expect_exact("stop")
    contents = [m["content"] for m in transcript(child, tmp_path / "a.jsonl")]
    assert contents[::2] == ["first question", "second question"]
    leave(child)
    before = path.read_text()
    child = start("--no-history")
    ask(child, "a secret")
    child.expect_exact("stop")
    leave(child)
    assert path.read_text() == before


def test_the_editor_and_the_last_question_to_type_over(start: Start, tmp_path: Path) -> None:
    editor = tmp_path / "editor"
    editor.write_text("#!/bin/sh\nprintf 'written\\nelsewhere' > \"$1\"\n")
    editor.chmod(0o755)
    child = start(EDITOR=str(editor), VISUAL=str(editor))
    child.expect_exact(READY)
    child.send("\x18\x05")
    child.expect_exact("elsewhere")
    child.expect_exact("stop")
    ask(child, "/edit")
    child.expect_exact("written")
    child.expect_exact("elsewhere")
    time.sleep(0.3)
    child.send(" and more\r")
    child.expect_exact("stop")
    contents = [m["content"] for m in transcript(child, tmp_path / "a.jsonl")]
    assert contents == ["written\nelsewhere and more", "ok"]
    leave(child)


def test_commands_are_completed(start: Start) -> None:
    child = start()
    child.expect_exact(READY)
    child.send("/tok\t")
    child.expect("ens")
    child.send("\r")
    child.expect_exact("of 4,096 tokens")
    leave(child)


def test_a_tool_is_run_after_a_yes_and_the_model_goes_on(start: Start, tmp_path: Path) -> None:
    arguments = {"expression": "6*7"}
    call = f"<tool_call>{json.dumps({'name': 'calculate', 'arguments': arguments})}</tool_call>"
    turns = [{"role": "user", "content": "6*7?"}, {"role": "assistant", "content": call}]
    (tmp_path / "t.jsonl").write_text(json.dumps({"messages": turns}))
    child = start("--tools=examples", "--max-tokens=1", "--temperature=0")
    for answer, result in (("y", '{"result": 42}'), ("n", "did not allow")):
        ask(child, "/load t.jsonl")
        ask(child, "/continue")
        child.expect_exact("tool: calculate(expression='6*7')")
        child.expect_exact("run it? [y/N]")
        child.send(f"{answer}\r")
        child.expect_exact("length")
        messages = transcript(child, tmp_path / f"{answer}.jsonl")
        assert [m["role"] for m in messages] == ["user", "assistant", "tool", "assistant"]
        assert result in messages[2]["content"]
        assert messages[3]["content"] == "o"
    leave(child)


@pytest.mark.parametrize(
    ("environment", "size"),
    [
        ({"TERM": "dumb"}, (24, 100)),
        ({"NO_COLOR": "1"}, (24, 100)),
        ({}, (10, 20)),
        ({"TERM": "unknown-terminal"}, (24, 80)),
    ],
)
def test_any_terminal_will_do(
    start: Start, environment: dict[str, str], size: tuple[int, int]
) -> None:
    child = start(size=size, **environment)
    child.expect(">")
    time.sleep(0.5)  # Where nothing tells that it has begun to read.
    child.send("Hi.\r")
    child.expect(r"ok")
    child.expect("stop")
    child.expect(">")
    time.sleep(0.5)
    child.sendcontrol("d")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    assert "Traceback" not in (child.before or "")


def test_the_window_may_change_its_size_and_wide_letters_be_typed(
    start: Start, tmp_path: Path
) -> None:
    child = start()
    child.expect_exact(READY)
    child.send("日本語 e\u0301 👩‍👩‍👧")
    child.setwinsize(30, 40)
    child.send("\x7f!\r")
    child.expect_exact("stop")
    content = transcript(child, tmp_path / "a.jsonl")[0]["content"]
    assert content.startswith("日本語 e\u0301 ")
    assert content.endswith("!")
    leave(child)


@pytest.mark.slow
def test_markdown_is_shown_block_by_block_and_never_again(start: Start) -> None:
    child = start("--repeat-penalty=0", model=speaker("# Td"), size=(24, 60))
    ask(child, "Hi.")
    child.expect_exact("stop")
    shown = child.before.split("\n")
    assert sum("Td" in line and "#" not in line for line in shown) == 1
    leave(child)


def test_a_model_that_is_not_there_ends_it_at_once(start: Start, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    child = start()
    child.expect_exact("this is not a model")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 3


@pytest.mark.slow
def test_a_damaged_model_is_told_when_it_was_to_answer(start: Start, tmp_path: Path) -> None:
    saved(speaker("ok"), tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").write_bytes(b"broken")
    child = start()
    ask(child, "Hi.")
    child.expect_exact("not a whole safetensors file")
    leave(child)


@pytest.mark.slow
def test_no_escape_of_a_models_reaches_the_terminal(start: Start) -> None:
    assert TOKENIZER
    child = start("--no-markdown", model=speaker("a\x1b]0;b\x07c"))
    ask(child, "Hi.")
    child.expect_exact("stop")
    assert "\x1b]0;" not in child.before
    leave(child)


@pytest.mark.slow
def test_a_published_model_is_talked_to_and_again_when_the_hub_is_gone(
    start: Start, tmp_path: Path
) -> None:
    repository = tmp_path / "hub" / "models" / "someone" / "talker"
    saved(speaker("ok"), repository)
    config = json.loads((repository / "config.json").read_text())
    (repository / "config.json").write_text(json.dumps(config | {"vocabulary_size": 257}))
    with LoopbackHub(tmp_path / "hub") as hub:
        environment = hub.environment(tmp_path / "cache")
        child = start("--model=someone/talker", **environment)
        ask(child, "Hi.")
        child.expect_exact("ok")
        child.expect_exact("stop")
        leave(child)
        asked = len(hub.requests)
        assert asked > 0
        child = start("--model=someone/talker", **environment)
        ask(child, "Hi.")
        child.expect_exact("stop")
        leave(child)
        assert len(hub.requests) == asked, "the second start asks nobody"
    child = start("--model=someone/talker", **environment)
    ask(child, "Hi.")
    child.expect_exact("ok")
    leave(child)
