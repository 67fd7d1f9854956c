"""How soon a conversation answers: with and without what was read before, and while one types.

    pip install -e '.[dev]'
    python benchmarks/chat.py [--model DIR] [--turns 10] [--words 120] [--rounds 5]

Without a model it is a random one of the published chat model's shape. A conversation of so many
turns is held, every question of so many words; then the last question is answered again and again,
in turns with the cache of the conversation and without it: the figures are medians of the time to
the first token. The echo is that of a real pseudo-terminal: the time from a keystroke to its
appearance on the screen, while an endless answer streams.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import pexpect
import torch
from train import hardware

from nope_gpt.chat.session import ChatSession
from nope_gpt.config import ChatConfig
from nope_gpt.memory import Message
from nope_gpt.model import NoPEGPT
from nope_gpt.tokenization import BaseTokenizer, ChatTokenizer

CHAT_400M = (50261, 1280, 20, 5, 20, 4)
KEYS = "abcdefghij"


def session_of(model: NoPEGPT, tokenizer: ChatTokenizer, turns: int, words: int) -> ChatSession:
    """A conversation before its last answer."""
    config = ChatConfig(max_tokens=2, max_message_history=2 * turns, compile="on", seed=0)
    session = ChatSession(model, tokenizer, config)
    for turn in range(turns):
        question = " ".join(f"word{turn * words + index}" for index in range(words))
        session.messages += [message("user", question), message("assistant", question[: 4 * words])]
    session.messages.pop()
    return session


def message(role: str, content: str) -> Message:
    """A message."""
    return {"role": role, "content": content}


def first_token(session: ChatSession, *, reuse: bool) -> float:
    """Seconds to the first token of the last answer."""
    if not reuse:
        session.cache = None
    elif session.cache is not None:
        session.cache.truncate(0, session.cache.num_shared(0, session.prompt()) - LAST_QUESTION)
    for _ in session.answer():
        pass
    session.messages.pop()
    assert session.statistics
    return session.statistics.first_seconds


LAST_QUESTION = 40
"""Tokens that are new in the last turn."""


def echoes(model: Path) -> list[float]:
    """Seconds from keystrokes to their appearance while an answer streams."""
    words = ["-m", "nope_gpt.cli", "chat", f"--model={model}", "--max-tokens=100000"]
    child = pexpect.spawn(
        sys.executable,
        [*words, "--no-markdown", "--no-history", "--context-length=512"],
        env=os.environ | {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"},
        encoding="utf-8",
        codec_errors="replace",
        timeout=120,
    )
    child.delaybeforesend = None
    child.expect_exact("\x1b[?2004h")
    child.send("Hi.\r")
    child.expect("loading|Hi")
    time.sleep(20)
    found = []
    for key in KEYS:
        marker = key * 3
        child.read_nonblocking(1 << 20, timeout=1)
        begun = time.perf_counter()
        child.send(marker)
        child.expect_exact(marker)
        found.append(time.perf_counter() - begun)
        time.sleep(0.2)
    child.sendcontrol("c")
    child.close(force=True)
    return found


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--words", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    parser.set_defaults(device="cpu", threads=os.cpu_count())
    options = parser.parse_args()
    print(hardware(options))
    with tempfile.TemporaryDirectory() as temporary:
        place = options.model or Path(temporary)
        if options.model is None:
            torch.manual_seed(0)
            NoPEGPT(*CHAT_400M).to(torch.bfloat16).save_pretrained(place)
            BaseTokenizer.from_tiktoken("r50k_base").save(place)
        model, tokenizer = NoPEGPT.from_pretrained(place), ChatTokenizer.load(place)
        session = session_of(model, tokenizer, options.turns, options.words)
        found: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(options.rounds + 1):
            for reuse in (False, True):
                found[reuse].append(first_token(session, reuse=reuse))
        read, again = (statistics.median(found[reuse][1:]) for reuse in (True, False))
        assert session.statistics
        print(f"turn {options.turns}, a prompt of {session.statistics.prompt_tokens:,} tokens")
        print(f"first token, all read again: {again:.2f} s; the last {LAST_QUESTION}: {read:.3f} s")
        print(f"ratio {again / read:.1f}")
        del model, session
        times = sorted(echoes(place))
        middle = 1000 * statistics.median(times)
        print(f"echo: median {middle:.1f} ms, worst {1000 * times[-1]:.1f} ms")


if __name__ == "__main__":
    main()
