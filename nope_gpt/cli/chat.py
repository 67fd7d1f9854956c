"""`nope chat`."""

from __future__ import annotations

import json as jsons
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

from nope_gpt.cli.options import JSON, configured
from nope_gpt.cli.terminal import is_interactive, say
from nope_gpt.config import ChatConfig
from nope_gpt.errors import NopeError

if TYPE_CHECKING:
    from pathlib import Path

    from nope_gpt.chat.session import ChatSession
    from nope_gpt.chat.tools import Tool


@configured(ChatConfig, JSON)
def command(config: ChatConfig, json: bool) -> None:
    """Talk with a model in the terminal, or through a pipe, one message a line.

    Enter sends, Ctrl-C stops an answer and keeps what was said, Ctrl-D leaves; /help lists the
    commands and the other keys. With --json every answer is an object on a line.

    Examples:

    - `nope chat --model andrewdalpino/NoPE-GPT-400M-Chat`

    - `nope chat --model runs/tune --temperature 0 --tools examples`

    - `printf 'Hi!\\nAnd bye.\\n' | nope chat --model runs/tune`
    """
    import torch

    from nope_gpt.chat.tools import load_tools
    from nope_gpt.cli.loading import find_model
    from nope_gpt.device import draw_seed, resolve_device

    # What cannot be is refused now, and not when the model is there.
    tools = load_tools(config.tools)
    resolve_device(config.device)
    directory = find_model(config, "chat")
    torch.manual_seed(draw_seed() if config.seed is None else config.seed)
    found = {config.model: directory}
    if is_interactive() and not json:
        from nope_gpt.cli.repl.conversation import Conversation

        say("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves.", style="dim")
        Conversation(config, partial(opened, tools, found, is_told_later=True)).run()
    else:
        answer_lines(opened(tools, found, config), json)


def opened(
    tools: Mapping[str, Tool],
    found: dict[str | None, Path],
    config: ChatConfig,
    tell: Callable[[float], None] = lambda _: None,
    *,
    is_told_later: bool = False,
) -> ChatSession:
    """A session with the model that is named.

    Args:
        tools: What the model may ask for.
        found: Where models are that were looked for already; each is used up.
        config: Of the session.
        tell: Told which share of the model has been read.
        is_told_later: Whether it is told when a conversation is longer than was trained.

    Raises:
        NopeError: It cannot be loaded.
    """
    from nope_gpt.chat.session import session_of
    from nope_gpt.cli.loading import find_model, load_model, prepare_for_context
    from nope_gpt.tokenization import ChatTokenizer

    directory = found.pop(config.model, None) or find_model(config, "chat")
    model, tokenizer = load_model(directory, config, tell)
    prepare_for_context(model, config.context_length, is_told_later=is_told_later)
    if not isinstance(tokenizer, ChatTokenizer):
        say(
            "note: this is a base model, which was never taught to take turns: it continues what "
            "you write; `nope tune` teaches it",
            style="yellow",
        )
    return session_of(model, tokenizer, config, tools)


def piped_messages() -> Iterator[str]:
    """Messages from standard input, one a line."""
    for line in sys.stdin.buffer:
        try:
            yield line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise NopeError(f"a message is not UTF-8: {error}", where="standard input") from None


def answer_lines(session: ChatSession, as_json: bool) -> None:
    """Answer every message from standard input on a line of its own, or as an object."""
    from nope_gpt.chat.session import NOT_ALLOWED, rounds
    from nope_gpt.chat.tools import Call, carry_out
    from nope_gpt.cli.writing import write_stream

    def result_of(call: Call) -> str:
        allowed = session.config.yes_tools or call.fault
        return carry_out(call, session.tools) if allowed else NOT_ALLOWED

    for message in filter(str.strip, piped_messages()):
        before = len(session.messages)
        for pieces in rounds(session, session.reply(message), result_of):
            if as_json:
                for _ in pieces:
                    pass
            else:
                write_stream(pieces, session.config.colorize_tokens)
                sys.stdout.write("\n")
        if as_json:
            assert session.statistics
            said = session.messages[before:]
            record = {
                "reply": said[-1]["content"],
                "messages": said,
                "statistics": session.statistics.as_dict(),
            }
            sys.stdout.write(jsons.dumps(record, ensure_ascii=False) + "\n")
        sys.stdout.flush()
