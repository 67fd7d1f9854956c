"""A conversation in a terminal: what is typed goes to the session, what it answers is shown."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import FrameType
from typing import Any, Self

from nope_gpt.chat.session import LONGEST_CHAIN, NOT_ALLOWED, ChatSession, rounds
from nope_gpt.chat.tools import Call, carry_out
from nope_gpt.cli.repl import commands
from nope_gpt.cli.repl.display import show
from nope_gpt.cli.repl.keyboard import Keyboard
from nope_gpt.cli.terminal import say, waiting
from nope_gpt.config import ChatConfig
from nope_gpt.errors import NopeError
from nope_gpt.generation.streaming import Piece
from nope_gpt.memory import Message

BAR = 24
"""Cells of the bar while the model is loaded."""

Opener = Callable[[ChatConfig, Callable[[float], None]], ChatSession]


class Conversation:
    """The terminal's side of a conversation.

    Args:
        config: Of the session.
        opener: Makes a session; it is called in the background.

    Attributes:
        draft: What stands in the next line already.
        is_editing: Whether the line is the last question, to be replaced if it is sent.
        told: Notices that were given, each once.
    """

    def __init__(self, config: ChatConfig, opener: Opener) -> None:
        self.opener = opener
        self.pool = ThreadPoolExecutor(1, "loading")
        self.share_loaded = 0.0
        self.opening: Future[ChatSession] = self.pool.submit(opener, config, self.loaded)
        self.keep_history = config.history
        self.markdown = config.markdown
        self.show_statistics = True
        self.draft = ""
        self.is_editing = False
        self.told: set[str] = set()

    def run(self) -> None:
        """Talk until Ctrl-D or /quit."""
        helps = {name: item.help for name, item in commands.COMMANDS.items()}
        keyboard = Keyboard(helps, keep_history=self.keep_history, toolbar=self.toolbar)
        try:
            for text in keyboard.messages(self.take_draft):
                self.attend(text)
        except EOFError:
            return

    @property
    def session(self) -> ChatSession:
        """The model's side, once it is there.

        Raises:
            NopeError: It cannot be loaded.
        """
        if not self.opening.done():
            with waiting("loading the model"):
                self.opening.result()
        return self.opening.result()

    def toolbar(self) -> str | None:
        """What is going on behind the prompt."""
        if self.opening.done():
            return None
        filled = round(BAR * self.share_loaded)
        return f" loading {'█' * filled}{'░' * (BAR - filled)} {self.share_loaded:.0%}, type on"

    def loaded(self, share: float) -> None:
        """Note which share of the weights has been read."""
        self.share_loaded = share

    def take_draft(self) -> str:
        """What is to stand in the next line, once; what is sent from there replaces a question."""
        draft, self.draft = self.draft, ""
        self.is_editing = bool(draft)
        return draft

    def attend(self, text: str) -> None:
        """Do what a line says, or answer it; what cannot be done is told."""
        if not text.strip():
            return
        replaces, self.is_editing = self.is_editing, False
        try:
            if text.startswith("/") and not text.startswith("//"):
                commands.run(self, text)
            else:
                if replaces:
                    self.session.undo()
                self.ask(text.removeprefix("/") if text.startswith("//") else text)
        except NopeError as error:
            say(str(error), style="red")
        except KeyboardInterrupt:
            say("interrupted", style="dim")

    def ask(self, text: str) -> None:
        """Answer a message, calls of tools included."""
        self.show(self.session.reply(text))

    def show(self, pieces: Iterator[Piece]) -> None:
        """Show an answer, carry out what it asks for, and show what comes of it."""
        for answer in rounds(self.session, pieces, self.result_of):
            if not self.show_one(answer):
                return
        if self.session.messages and self.session.messages[-1]["role"] == "tool":
            say(f"it asked for tools {LONGEST_CHAIN} times in a row, and is not asked again")

    def show_one(self, pieces: Iterator[Piece]) -> bool:
        """Show one answer; returns whether it came to its end."""
        config = self.session.config
        finished = True
        try:
            with Interruptible(pieces) as stream:
                show(stream, markdown=self.markdown, colorize=config.colorize_tokens)
        except KeyboardInterrupt:
            finished = False
            close(pieces)
            sys.stdout.write("\n")
            sys.stdout.flush()
        if self.show_statistics:
            say(str(self.session.statistics), style="dim")
        self.notice()
        return finished

    def result_of(self, call: Call) -> str:
        """Carry out a call, if the user lets it; returns what to tell the model."""
        say(f"tool: {call}", style="cyan")
        if not call.fault and not self.session.config.yes_tools and not agreed("run it?"):
            return NOT_ALLOWED
        result = carry_out(call, self.session.tools)
        say(f"  {commands.shortened(result, 200)}", style="dim")
        return result

    def notice(self) -> None:
        """Tell once what a user should know of the conversation's length."""
        session = self.session
        try:
            window = session.window()
        except NopeError:
            return
        if window.forgotten:
            self.tell_once(
                "forgotten",
                f"the model sees the last {window.messages} messages, and no longer the first "
                f"{window.forgotten}: /memory and /tokens",
            )
        trained = session.model.trained_context_length
        if trained and window.system + window.history > trained:
            self.tell_once(
                "beyond",
                f"the conversation is longer than the {trained:,} tokens that the model was "
                f"trained on: answers may become worse; /new begins another",
            )

    def tell_once(self, kind: str, text: str) -> None:
        """Tell something if it was not told in this conversation."""
        if kind not in self.told:
            self.told.add(kind)
            say(f"note: {text}", style="yellow")

    def change(self, **changes: Any) -> None:
        """Change settings of the session."""
        self.session.config = self.session.config.changed(**changes)

    def open(self, config: ChatConfig) -> None:
        """Go on with another model, and what was said."""
        before = self.session
        with waiting(f"loading {config.model}"):
            session = self.opener(config, self.loaded)
        session.messages = before.messages
        self.opening = Future()
        self.opening.set_result(session)

    def all_messages(self) -> list[Message]:
        """All that was said, the system message first."""
        text = self.session.config.system_message
        system = [{"role": "system", "content": text}] if text else []
        return [*system, *self.session.messages]

    def facts(self) -> dict[str, Any]:
        """What is kept beside a conversation."""
        config = self.session.config.as_dict()
        params = {name: config[name] for name in commands.SETTABLE}
        return {"model": config["model"], "params": params, "seed": config["seed"]}


class Interruptible:
    """A stream that Ctrl-C ends between two pieces, or while the model computes one.

    The interrupt is raised here and nowhere else: in the middle of what draws on the terminal, or
    where Python ignores what is raised, it would be lost or leave a lock behind.

    Args:
        pieces: The stream.
    """

    def __init__(self, pieces: Iterator[Piece]) -> None:
        self.pieces = pieces
        self.is_wanted = False
        self.is_computing = False

    def __enter__(self) -> Self:
        self.before = signal.signal(signal.SIGINT, self.interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self.before)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Piece:
        if self.is_wanted:
            raise KeyboardInterrupt
        self.is_computing = True
        try:
            return next(self.pieces)
        finally:
            self.is_computing = False

    def interrupt(self, _number: int, _frame: FrameType | None) -> None:
        """Note that the user wants it to end, and end it if nothing but the model is at work."""
        self.is_wanted = True
        if self.is_computing:
            raise KeyboardInterrupt


def close(pieces: Iterator[Piece]) -> None:
    """End a stream that was left, so that what came of it is kept."""
    if isinstance(pieces, Generator):
        pieces.close()


def agreed(question: str) -> bool:
    """Whether the user says yes."""
    try:
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
    except (EOFError, KeyboardInterrupt):
        return False
