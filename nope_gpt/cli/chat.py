"""`nope chat`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from nope_gpt.cli.options import configured
from nope_gpt.cli.terminal import is_interactive, say
from nope_gpt.config import ChatConfig
from nope_gpt.errors import NopeError, UsageError

if TYPE_CHECKING:
    from nope_gpt.chat import ChatSession


@configured(ChatConfig)
def command(
    config: ChatConfig,
) -> None:
    """Talk with a model in the terminal, or through a pipe, one message a line.

    Enter sends. Ctrl-C stops an answer and keeps what was said; at the prompt it clears
    the line. Ctrl-D leaves.

    Examples:

    - `nope chat --model andrewdalpino/NoPE-GPT-400M-Chat`

    - `nope chat --model runs/tune --temperature 0`

    - `printf 'Hi!\\nAnd bye.\\n' | nope chat --model runs/tune`
    """
    from nope_gpt.chat import ChatSession
    from nope_gpt.cli.loading import open_model

    model, tokenizer = open_model(config, "chat")
    session = ChatSession(model, tokenizer, config)
    if is_interactive():
        say("Ctrl-C stops an answer, Ctrl-D leaves.", style="dim")
        converse(session, typed_messages())
    else:
        converse(session, piped_messages())


def typed_messages() -> Iterator[str]:
    """Messages from a terminal, with line editing and a history of this session."""
    from prompt_toolkit import PromptSession

    prompt: PromptSession[str] = PromptSession()
    while True:
        try:
            yield prompt.prompt("> ")
        except KeyboardInterrupt:
            continue
        except EOFError:
            return


def piped_messages() -> Iterator[str]:
    """Messages from standard input, one a line."""
    for line in sys.stdin.buffer:
        try:
            yield line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise NopeError(f"a message is not UTF-8: {error}", where="standard input") from None


def converse(session: ChatSession, messages: Iterator[str]) -> None:
    """Answer every message until there are no more."""
    from nope_gpt.cli.writing import write_stream

    for message in messages:
        if not message.strip():
            continue
        try:
            write_stream(session.reply(message), session.config.colorize_tokens)
        except KeyboardInterrupt:
            if not is_interactive():
                raise
        except UsageError as error:
            if not is_interactive():
                raise
            say(str(error))
            continue
        sys.stdout.write("\n")
        sys.stdout.flush()
        if is_interactive():
            say(str(session.statistics), style="dim")
