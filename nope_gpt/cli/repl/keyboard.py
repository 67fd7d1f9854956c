"""What a person types: several lines, an editor, and a history that lasts.

Enter sends. Alt-Enter, Ctrl-J, a backslash at the end of a line and an open triple quote begin
another line; what is pasted never sends itself.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from nope_gpt.cli.terminal import say
from nope_gpt.files.places import state_directory

FENCE = '"""'

TWICE = 2.0
"""Seconds in which a second Ctrl-C at the prompt is told how to leave."""


def history_of(wanted: bool) -> History:
    """What was typed at other times, in a file that only its owner reads."""
    if not wanted or os.environ.get("NOPE_NO_HISTORY"):
        return InMemoryHistory()
    path = state_directory() / "chat_history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.chmod(0o600)
        with path.open("r+b"):
            return FileHistory(path)
    except OSError as error:
        say(f"there will be no history: {path}: {error.strerror}", style="yellow")
        return InMemoryHistory()


class Words(Completer):
    """Completes commands after a slash.

    Args:
        commands: Each name with its help.
    """

    def __init__(self, commands: dict[str, str]) -> None:
        self.commands = commands

    def get_completions(self, document: Document, _: CompleteEvent) -> Iterable[Completion]:
        text = document.text
        if text.startswith("/") and not text.startswith("//") and " " not in text:
            for name, help in self.commands.items():
                if name.startswith(text[1:]):
                    yield Completion(f"/{name}", start_position=-len(text), display_meta=help)


class Keyboard:
    """Reads messages.

    Args:
        commands: For completion, each name with its help.
        keep_history: In a file.
        toolbar: The line below, if there is something to tell.
    """

    def __init__(
        self, commands: dict[str, str], *, keep_history: bool, toolbar: Callable[[], str | None]
    ) -> None:
        self.interrupted = 0.0
        self.session: PromptSession[str] = PromptSession(
            history=history_of(keep_history),
            completer=Words(commands),
            key_bindings=bindings(),
            multiline=True,
            enable_open_in_editor=True,
            tempfile_suffix=".md",
            complete_while_typing=False,
            prompt_continuation=lambda *_: "… ",
            bottom_toolbar=lambda: toolbar() or None,
            refresh_interval=0.2,
        )

    def messages(self, first: Callable[[], str]) -> Iterable[str]:
        """What is typed, until Ctrl-D.

        Args:
            first: What stands in the line already when it is asked for.
        """
        while True:
            try:
                yield unfenced(self.session.prompt("> ", default=first()))
            except KeyboardInterrupt:
                now = time.monotonic()
                if now - self.interrupted < TWICE:
                    say("Ctrl-D or /quit leaves.", style="dim")
                self.interrupted = now
            except EOFError:
                return


def bindings() -> KeyBindings:
    """The keys that differ from those of any line editor."""
    keys = KeyBindings()
    typing = has_focus(DEFAULT_BUFFER)

    @keys.add("enter", filter=typing)
    def _send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        text = buffer.text
        if text.endswith("\\") and buffer.document.is_cursor_at_the_end:
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        elif is_open(text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=typing)
    @keys.add("c-j", filter=typing)
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def is_open(text: str) -> bool:
    """Whether a text begins with triple quotes that are not closed."""
    text = text.strip()
    return text.startswith(FENCE) and (len(text) < 2 * len(FENCE) or not text.endswith(FENCE))


def unfenced(text: str) -> str:
    """A text without the triple quotes around it."""
    inner = text.strip()
    if inner.startswith(FENCE) and not is_open(inner):
        return inner.removeprefix(FENCE).removesuffix(FENCE).strip("\n")
    return text
