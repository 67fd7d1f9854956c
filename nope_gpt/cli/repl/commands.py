"""What can be done with a slash: one function for each command, its docstring the help."""

from __future__ import annotations

import base64
import difflib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nope_gpt.chat import transcripts
from nope_gpt.cli.terminal import say
from nope_gpt.config import ChatConfig, knobs
from nope_gpt.errors import UsageError
from nope_gpt.files.writing import write_file

if TYPE_CHECKING:
    from nope_gpt.chat.session import Window
    from nope_gpt.cli.repl.conversation import Conversation

BAR = 40
"""Cells of the picture of the context."""

SETTABLE = (
    "temperature", "top_k", "top_p", "min_p", "repeat_penalty", "repeat_window", "max_tokens",
    "context_length", "pin_tokens", "draft_tokens", "max_message_history", "stop", "logit_bias",
)  # fmt: skip
"""The settings that can change while a conversation goes on."""


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        name: Of it.
        usage: What may follow the name.
        help: A sentence.
        run: Does it, with what followed the name.
    """

    name: str
    usage: str
    help: str
    run: Callable[[Conversation, str], None]


COMMANDS: dict[str, Command] = {}
ALIASES = {
    "?": "help", "clear": "new", "reset": "new", "regen": "retry", "params": "set",
    "exit": "quit", "bye": "quit",
}  # fmt: skip


def command(usage: str = "") -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function a command, by its name and its docstring."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        name = function.__name__.removeprefix("do_")
        COMMANDS[name] = Command(name, usage, str(function.__doc__), function)
        return function

    return register


def run(talk: Conversation, line: str) -> None:
    """Do what a line that begins with a slash says.

    Raises:
        UsageError: There is no such command, or it cannot be done.
    """
    name, _, rest = line[1:].partition(" ")
    name = ALIASES.get(name, name)
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, [*COMMANDS, *ALIASES], n=1)
        hint = f"did you mean /{close[0]}?" if close else "/help lists them"
        raise UsageError(f"there is no command /{name}", hint=f"{hint} // sends a slash")
    COMMANDS[name].run(talk, rest.strip())


def switch(text: str, now: bool, name: str) -> bool:
    """What on, off or nothing makes of a switch; tells it."""
    if text not in ("", "on", "off"):
        raise UsageError(f"/{name} is {text!r}, and must be on or off")
    value = not now if not text else text == "on"
    say(f"{name} {'on' if value else 'off'}", style="dim")
    return value


@command("[COMMAND]")
def do_help(_: Conversation, text: str) -> None:
    """Tell what the commands and the keys are."""
    chosen = [COMMANDS[text.lstrip("/")]] if text.lstrip("/") in COMMANDS else COMMANDS.values()
    for item in chosen:
        say(f"  {f'/{item.name} {item.usage}':<32} {item.help}")
    if not text:
        say('  Enter sends; Alt-Enter, Ctrl-J, a \\ at the end or open """ make a new line.')
        say("  Ctrl-R searches what was typed; Ctrl-X Ctrl-E opens the editor.")
        say("  Ctrl-C stops an answer; Ctrl-D leaves; // sends a slash.")


@command()
def do_new(talk: Conversation, _: str) -> None:
    """Forget the conversation and begin another."""
    talk.session.messages.clear()
    talk.told.clear()
    say("a new conversation", style="dim")


@command("[TEXT|clear]")
def do_system(talk: Conversation, text: str) -> None:
    """Show the system message, or set it."""
    if text:
        talk.change(system_message="" if text == "clear" else text)
    say(talk.session.config.system_message or "there is no system message", style="dim")


@command("[NAME VALUE]")
def do_set(talk: Conversation, text: str) -> None:
    """Show how the next token is drawn, or change one setting."""
    if text:
        name, _, value = text.partition(" ")
        talk.change(**setting(name, value))
    config = talk.session.config.as_dict()
    for name in SETTABLE:
        value = "none" if config[name] in (None, ()) else config[name]
        say(f"  {name.replace('_', '-'):<20} {value}", style="dim")


def setting(name: str, value: str) -> dict[str, Any]:
    """A setting by its flag's name, from text.

    Raises:
        UsageError: There is none, or the value cannot be meant.
    """
    name = name.replace("-", "_").lstrip("_")
    if name not in SETTABLE:
        raise UsageError(
            f"there is no setting {name!r} to change now", hint=f"/set {', '.join(SETTABLE)}"
        )
    kind, _ = knobs.kind_of(ChatConfig, name)
    if kind == knobs.TEXTS:
        return {name: (value,) if value else ()}
    if kind is str:
        return {name: value or None}
    try:
        return {name: kind(value)}
    except ValueError:
        raise UsageError(f"/set {name} is {value!r}, and must be a number") from None


@command("[NAME=VALUE ...]")
def do_retry(talk: Conversation, text: str) -> None:
    """Answer the last question again, if you like with other settings, such as temperature=1."""
    changes: dict[str, Any] = {}
    for part in text.split():
        name, _, value = part.partition("=")
        changes |= setting({"temp": "temperature"}.get(name, name), value)
    before = talk.session.config
    talk.session.config = before.changed(**changes)
    try:
        talk.show(talk.session.retry())
    finally:
        talk.session.config = before


@command("[TEXT]")
def do_edit(talk: Conversation, text: str) -> None:
    """Ask the last question in other words, given now or typed over the old ones."""
    place = talk.session.last_question()
    if text:
        talk.session.undo()
        talk.ask(text)
    else:
        talk.draft = talk.session.messages[place]["content"]


@command("[N]")
def do_undo(talk: Conversation, text: str) -> None:
    """Forget the last question and its answer, or the last N of them."""
    if text and not (text.isdecimal() and int(text)):
        raise UsageError(f"/undo is {text!r}, and must be a number of turns")
    for _ in range(int(text or 1)):
        question = talk.session.undo()
        say(f"forgotten: {shortened(question)}", style="dim")


@command()
def do_continue(talk: Conversation, _: str) -> None:
    """Go on with an answer that was cut."""
    talk.show(talk.session.proceed())


@command()
def do_history(talk: Conversation, _: str) -> None:
    """Show the conversation."""
    for message in talk.all_messages():
        say(f"{message['role']}: {message['content']}", style="dim")


@command()
def do_tokens(talk: Conversation, _: str) -> None:
    """Show how full the context is."""
    say(meter(talk.session.window(), talk.session.model.trained_context_length))


def meter(window: Window, trained: int | None) -> str:
    """A picture of the context: system message, history, and what is free."""
    used = [round(BAR * size / window.context) for size in (window.system, window.history)]
    system, history = min(used[0], BAR), min(used[1], BAR - min(used[0], BAR))
    bar = "▓" * system + "█" * history + "░" * (BAR - system - history)
    beyond = "" if trained is None else f"; trained on {trained:,}"
    forgotten = f"; {window.forgotten} messages are no longer seen" if window.forgotten else ""
    return (
        f"{bar} {window.system + window.history:,} of {window.context:,} tokens: "
        f"▓ system {window.system:,}, █ {window.messages} messages {window.history:,}, "
        f"░ free {window.free:,}{beyond}{forgotten}"
    )


@command("N")
def do_memory(talk: Conversation, text: str) -> None:
    """Set how many messages of the conversation the model sees."""
    talk.change(**setting("max_message_history", text))
    say(f"it sees the last {talk.session.config.max_message_history} messages", style="dim")


@command("FILE.jsonl")
def do_save(talk: Conversation, text: str) -> None:
    """Save the conversation, as `nope prepare` and `nope tune` read it."""
    path = named(text, "/save chat.jsonl")
    transcripts.save(path, talk.all_messages(), talk.facts())
    say(f"saved {path}", style="dim")


@command("FILE.jsonl")
def do_load(talk: Conversation, text: str) -> None:
    """Go on with a saved conversation."""
    messages = transcripts.load(named(text, "/load chat.jsonl"))
    if messages and messages[0]["role"] == "system":
        talk.change(system_message=messages.pop(0)["content"])
    talk.session.messages = messages
    say(f"{len(messages)} messages", style="dim")


@command("FILE.md|FILE.jsonl")
def do_export(talk: Conversation, text: str) -> None:
    """Write the conversation for people, or add it to a file of conversations to tune on."""
    path = named(text, "/export chats.jsonl")
    if path.suffix == ".jsonl":
        transcripts.add(path, talk.all_messages(), talk.facts())
    else:
        write_file(path, transcripts.as_markdown(talk.all_messages()).encode())
    say(f"wrote {path}", style="dim")


def named(text: str, example: str) -> Path:
    """The file that is named.

    Raises:
        UsageError: None is.
    """
    if not text:
        raise UsageError("there is no file name", hint=example)
    return Path(text).expanduser()


@command()
def do_copy(talk: Conversation, _: str) -> None:
    """Copy the last answer, by the terminal's own way, which works over ssh too."""
    answers = [m["content"] for m in talk.session.messages if m["role"] == "assistant"]
    if not answers:
        raise UsageError("there is no answer to copy yet")
    content = base64.b64encode(answers[-1].encode()).decode()
    sys.stderr.write(f"\x1b]52;c;{content}\x07")
    sys.stderr.flush()
    say(f"copied {len(answers[-1]):,} characters", style="dim")


@command("[on|off]")
def do_stats(talk: Conversation, text: str) -> None:
    """Tell or do not tell after each answer what it took."""
    talk.show_statistics = switch(text, talk.show_statistics, "stats")


@command("[on|off]")
def do_markdown(talk: Conversation, text: str) -> None:
    """Show answers as Markdown, block by block, or as they come."""
    talk.markdown = switch(text, talk.markdown, "markdown")


@command("MODEL")
def do_model(talk: Conversation, text: str) -> None:
    """Go on with another model."""
    if not text:
        say(str(talk.session.config.model), style="dim")
        return
    talk.open(talk.session.config.changed(model=text, adapter=()))


@command("RUN")
def do_adapter(talk: Conversation, text: str) -> None:
    """Fold an adapter into the model, after those that are in it."""
    if not text:
        raise UsageError("there is no adapter", hint="/adapter runs/tune")
    config = talk.session.config
    talk.open(config.changed(adapter=(*config.adapter, text)))


@command()
def do_tools(talk: Conversation, _: str) -> None:
    """Show the functions that the model may ask for."""
    tools = talk.session.tools
    for tool in tools.values():
        say(f"  {tool.name:<20} {tool.schema['description'].splitlines()[0]}", style="dim")
    if not tools:
        say("none: nope chat --tools examples, or --tools FILE.py", style="dim")


@command()
def do_quit(_talk: Conversation, _text: str) -> None:
    """Leave."""
    raise EOFError


def shortened(text: str, size: int = 60) -> str:
    """The beginning of a text, on one line."""
    line = " ".join(text.split())
    return line if len(line) <= size else f"{line[: size - 1]}…"
