"""What a conversation keeps, shows and does, without a terminal."""

from __future__ import annotations

import json
import stat
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_chat import FORGED, TOKENIZER, said, say, session, speaker

from nope_gpt.chat import transcripts
from nope_gpt.chat.session import ChatSession, Completion, rounds, session_of, turns
from nope_gpt.chat.tools import carry_out, load_tools
from nope_gpt.cli.repl import commands
from nope_gpt.cli.repl.conversation import Conversation
from nope_gpt.cli.repl.display import Blocks
from nope_gpt.cli.repl.keyboard import history_of, is_open, unfenced
from nope_gpt.config import ChatConfig, PrepareConfig
from nope_gpt.data.prepare import prepare
from nope_gpt.errors import MissingError, NopeError, UsageError
from nope_gpt.hub import storage
from nope_gpt.tokenization import BaseTokenizer

CALL = '<tool_call>{"name": "calculate", "arguments": {"expression": "6*7"}}</tool_call>'


def with_turns(count: int, **settings: Any) -> ChatSession:
    """A session in which a tool was used in every turn."""
    chat = session(**settings)
    for number in range(count):
        chat.messages += [
            said("user", f"Question {number}?"),
            said("assistant", CALL),
            said("tool", '{"result": 42}'),
            said("assistant", f"Answer {number}."),
        ]
    return chat


# What the model sees


def test_whole_turns_are_seen_and_a_call_is_never_parted_from_its_result() -> None:
    chat = with_turns(3, max_message_history=9)
    assert [len(turn) for turn in turns(chat.messages)] == [4, 4, 4]
    chat.messages.append(said("user", "Last?"))
    for seen, history in ((1, 4), (1, 1), (5, 5), (5, 8), (9, 9), (9, 12), (13, 13)):
        chat.config = chat.config.changed(max_message_history=history)
        visible = chat.visible()
        assert len(visible) == seen
        assert visible[0]["role"] == "user"


def test_whole_turns_fall_out_of_the_window_in_tokens_and_the_system_message_stays() -> None:
    chat = with_turns(3, max_message_history=99, system_message="Be kind.")
    whole = chat.window()
    assert (whole.messages, whole.forgotten) == (12, 0)
    chat.config = chat.config.changed(context_length=whole.system + whole.history + 10)
    window = chat.window()
    assert (window.messages, window.forgotten) == (8, 4)
    assert window.system == whole.system
    text = TOKENIZER.decode_tokens(chat.prompt())
    assert text.startswith("<|im_start|>system\nBe kind.")
    assert "Question 0?" not in text
    assert "Question 1?" in text
    assert window.system + window.history + len(TOKENIZER.response_tokens) == len(chat.prompt())
    assert window.free == window.context - window.system - window.history


@given(st.lists(st.sampled_from(["user", "assistant", "tool"]), max_size=20))
def test_turns_lose_nothing_and_begin_with_questions(roles: list[str]) -> None:
    messages = [said(role, str(place)) for place, role in enumerate(roles)]
    parts = turns(messages)
    assert [message for part in parts for message in part] == messages
    assert all(part[0]["role"] == "user" for part in parts[1:])
    assert all(message["role"] != "user" for part in parts for message in part[1:])


# Again, otherwise, back


def test_an_answer_is_given_again_and_the_old_one_is_forgotten() -> None:
    chat = session()
    say(chat, "One?")
    chat.messages[-1] = said("assistant", "wrong")
    assert "".join(piece.text for piece in chat.retry()) == "ok"
    assert chat.messages == [said("user", "One?"), said("assistant", "ok")]


def test_undo_takes_back_a_turn_with_its_tools() -> None:
    chat = with_turns(2)
    assert chat.undo() == "Question 1?"
    assert len(chat.messages) == 4
    assert chat.undo() == "Question 0?"
    assert chat.messages == []
    with pytest.raises(UsageError, match="nothing was asked yet"):
        chat.undo()


def test_a_cut_answer_goes_on_as_one_message() -> None:
    chat = session(speaker("hoping"), max_tokens=3, repeat_penalty=0.0)
    assert say(chat, "Hi.") == "hop"
    assert "".join(piece.text for piece in chat.proceed()) == "ing"
    assert chat.messages[1:] == [said("assistant", "hoping")]
    chat.messages.pop()
    with pytest.raises(UsageError, match="there is no answer to go on with"):
        chat.proceed()


def test_a_question_that_was_left_before_its_answer_began_stays_a_question() -> None:
    chat = session()
    answer = chat.reply("Hi.")
    with pytest.raises(KeyboardInterrupt):
        answer.throw(KeyboardInterrupt)  # type: ignore[attr-defined]
    assert chat.messages == [said("user", "Hi.")]
    assert "".join(piece.text for piece in chat.retry()) == "ok"


def test_the_cache_is_reused_from_turn_to_turn() -> None:
    chat = session()
    say(chat, "One?")
    say(chat, "Two?")
    took = chat.statistics
    assert took
    assert took.reused_tokens > took.prompt_tokens / 2


# Tools


def test_a_call_is_answered_by_its_tool_and_the_model_goes_on() -> None:
    tools = load_tools(["examples"])
    chat = ChatSession(speaker("ok"), TOKENIZER, ChatConfig(), tools=tools)
    chat.messages = [said("user", "6*7?"), said("assistant", CALL)]
    (call,) = chat.calls()
    assert str(call) == "calculate(expression='6*7')"
    answers = []
    begun = chat.messages.pop()["content"]

    def first() -> Any:
        yield from ()
        chat.messages.append(said("assistant", begun))

    for pieces in rounds(chat, first(), lambda call: carry_out(call, tools)):
        answers.append("".join(piece.text for piece in pieces))
    assert answers == ["", "ok"]
    assert [message["role"] for message in chat.messages] == [
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert json.loads(chat.messages[2]["content"]) == {"result": 42}
    assert "<tools>[{" in TOKENIZER.decode_tokens(chat.prompt())


def test_a_model_that_asks_for_tools_for_ever_is_stopped() -> None:
    tools = load_tools(["examples"])
    chat = ChatSession(speaker("ok"), TOKENIZER, ChatConfig(), tools=tools)

    def asking() -> Any:
        yield from ()
        chat.messages.append(said("assistant", CALL))

    chat.answer = asking  # type: ignore[method-assign]
    chat.messages = [said("user", "6*7?")]
    count = 0
    for pieces in rounds(chat, asking(), lambda _: "{}"):
        list(pieces)
        count += 1
    assert count == 5


def test_no_call_is_seen_where_no_tools_were_given() -> None:
    chat = session()
    chat.messages = [said("user", "6*7?"), said("assistant", CALL)]
    assert chat.calls() == []


def test_a_forged_marker_in_a_tools_result_stays_text() -> None:
    chat = session()
    chat.messages = [said("user", "?"), said("assistant", CALL), said("tool", FORGED)]
    prompt = chat.prompt()
    assert prompt.count(TOKENIZER.im_start_index) == 5
    assert prompt.count(TOKENIZER.im_end_index) == 4


# A base model


def test_a_base_model_continues_each_message() -> None:
    model = speaker("ok")
    model.resize_token_embeddings(257)
    chat = session_of(model, BaseTokenizer.of_bytes(), ChatConfig(max_tokens=4))
    assert isinstance(chat, Completion)
    chat.messages.append(said("user", "Once"))
    assert chat.prompt() == list(b"Once")
    list(chat.answer())
    chat.messages.append(said("user", "Twice"))
    assert chat.prompt() == list(b"Twice")
    assert chat.window().system == 0


# Transcripts


def test_a_transcript_comes_back_and_is_data_to_tune_on(tmp_path: Path) -> None:
    messages = [
        said("system", "Be kind."),
        said("user", "Hi 😀\n\u2028.\x85"),
        said("assistant", "ok"),
    ]
    path = tmp_path / "chat.jsonl"
    transcripts.save(path, messages, {"model": "m", "seed": None})
    assert transcripts.load(path) == messages
    transcripts.add(path, messages[1:], {})
    assert transcripts.load(path) == messages[1:]
    settings = PrepareConfig(dataset_path=str(tmp_path / "d"), token_encoding="bytes")
    (made,) = prepare([str(path)], settings)
    assert made.manifest["statistics"]["documents"] == 2


def test_unknown_fields_of_a_transcript_are_left_alone(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "Hi.", "when": 3}], "mood": "good"}
    (tmp_path / "a.jsonl").write_text("\n" + json.dumps(row) + "\n\n")
    assert transcripts.load(tmp_path / "a.jsonl") == [said("user", "Hi.")]


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"messages": 3}', '{"messages": [{"role": "x", "content": ""}]}', "\xff"],
)
def test_what_is_no_transcript_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content.encode("latin-1"))
    with pytest.raises(NopeError, match="this is no transcript"):
        transcripts.load(tmp_path / "a.jsonl")
    with pytest.raises(MissingError, match="there is no such transcript"):
        transcripts.load(tmp_path / "b.jsonl")


# Showing


MARKDOWN = st.text(alphabet="ab \n`~#-*", max_size=60)


@given(MARKDOWN, st.lists(st.integers(1, 9), min_size=1, max_size=60))
def test_blocks_are_the_same_however_their_text_comes(text: str, sizes: list[int]) -> None:
    whole, parts = Blocks(), Blocks()
    right = [*whole.add(text), *whole.rest()]
    found, place = [], 0
    for size in sizes:
        found += parts.add(text[place : place + size])
        place += size
    found += [*parts.add(text[place:]), *parts.rest()]
    assert found == right
    lines = [line for line in text.split("\n") if line.strip()]
    assert [line for block in right for line in block.split("\n") if line.strip()] == lines


def test_a_fence_is_one_block_and_is_finished_when_it_closes() -> None:
    blocks = Blocks()
    found = list(blocks.add("Look:\n```py\nx = 1\n\ny = 2\n```\nand"))
    assert found == ["Look:", "```py\nx = 1\n\ny = 2\n```"]
    assert blocks.tail(80) == "and"
    assert list(blocks.rest()) == ["and"]


# Typing


@pytest.mark.parametrize(
    ("text", "is_so"),
    [
        ("", False),
        ('"""', True),
        ('"""a', True),
        ('"""a\nb', True),
        ('"""a"""', False),
        ('a"""', False),
    ],
)
def test_triple_quotes_are_open_until_they_close(text: str, is_so: bool) -> None:
    assert is_open(text) is is_so


def test_triple_quotes_are_taken_away() -> None:
    assert unfenced('"""\na\n\nb\n"""') == "a\n\nb"
    assert unfenced(' a """ b ') == ' a """ b '


def test_the_history_is_a_file_of_its_owner_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    history_of(True).store_string("hello")
    path = tmp_path / "state" / "nope-gpt" / "chat_history"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert "+hello" in path.read_text()
    assert list(history_of(True).load_history_strings()) == ["hello"]
    path.write_bytes(b"\xff\xfe broken\n+old\n")
    assert "old" in list(history_of(True).load_history_strings())
    history_of(False).store_string("secret")
    monkeypatch.setenv("NOPE_NO_HISTORY", "1")
    history_of(True).store_string("secret")
    assert "secret" not in path.read_text(errors="replace")


def test_a_history_that_cannot_be_kept_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    history_of(True).store_string("hello")
    assert "there will be no history: " in capsys.readouterr().err


# Commands


@pytest.fixture
def talk() -> Conversation:
    """A conversation with a model that says ok."""
    config = ChatConfig(model="m", markdown=False)
    return Conversation(config, lambda config, _: ChatSession(speaker("ok"), TOKENIZER, config))


def told(talk: Conversation, capsys: pytest.CaptureFixture[str], *lines: str) -> tuple[str, str]:
    """What lines print on stdout and stderr."""
    capsys.readouterr()
    for line in lines:
        talk.attend(line)
    out, err = capsys.readouterr()
    return out, err


def test_every_command_has_help_and_every_alias_a_command() -> None:
    assert set(commands.ALIASES.values()) <= commands.COMMANDS.keys()
    names = "help new system set retry edit undo continue history tokens memory save load export"
    more = "copy stats markdown model adapter tools quit"
    assert commands.COMMANDS.keys() == {*names.split(), *more.split()}
    assert all(item.help.endswith(".") for item in commands.COMMANDS.values())


def test_messages_are_answered_and_a_double_slash_is_one(
    talk: Conversation, capsys: pytest.CaptureFixture[str]
) -> None:
    out, err = told(talk, capsys, "Hi.", "//quit is a command", "   ")
    assert out == "ok\nok\n"
    assert "3 tokens · " in err
    assert [m["content"] for m in talk.session.messages] == [
        "Hi.",
        "ok",
        "/quit is a command",
        "ok",
    ]


def test_an_unknown_command_names_a_near_one(
    talk: Conversation, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "did you mean /history?" in told(talk, capsys, "/histroy")[1]
    assert "there is no command /zzz" in told(talk, capsys, "/zzz")[1]
    with pytest.raises(EOFError):
        talk.attend("/bye")


def test_settings_change_and_only_what_can(
    talk: Conversation, capsys: pytest.CaptureFixture[str]
) -> None:
    told(talk, capsys, "/set temperature 0.25", "/set top-k 7", "/set stop END", "/memory 2")
    config = talk.session.config
    assert (config.temperature, config.top_k, config.stop) == (0.25, 7, ("END",))
    assert config.max_message_history == 2
    assert (
        "--temperature is -1.0, and must be at least 0"
        in told(talk, capsys, "/set temperature -1")[1]
    )
    assert "must be a number" in told(talk, capsys, "/set top_p x")[1]
    assert "there is no setting 'model'" in told(talk, capsys, "/set model x")[1]


def test_a_retry_draws_otherwise_once(
    talk: Conversation, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []
    told(talk, capsys, "Hi.")
    written = talk.session.written

    def noted(prompt: list[int], begun: str) -> Any:
        seen.append(talk.session.config.temperature)
        return written(prompt, begun)

    talk.session.written = noted  # type: ignore[method-assign]
    told(talk, capsys, "/retry temp=1.5")
    assert seen == [1.5]
    assert talk.session.config.temperature == 0.7
    assert len(talk.session.messages) == 2


def test_editing_asks_the_last_question_otherwise(
    talk: Conversation, capsys: pytest.CaptureFixture[str]
) -> None:
    told(talk, capsys, "One?", "Two?", "/edit Three?")
    assert [m["content"] for m in talk.session.messages] == ["One?", "ok", "Three?", "ok"]
    told(talk, capsys, "/edit")
    assert talk.take_draft() == "Three?"
    assert len(talk.session.messages) == 4, "nothing is lost before it is sent"
    told(talk, capsys, "Four?")
    assert [m["content"] for m in talk.session.messages] == ["One?", "ok", "Four?", "ok"]
    told(talk, capsys, "/edit")
    assert (talk.take_draft(), talk.take_draft()) == ("Four?", "")
    told(talk, capsys, "Five?")
    assert len(talk.session.messages) == 6, "a line that was cleared replaces nothing"
    assert "must be a number of turns" in told(talk, capsys, "/undo x")[1]
    told(talk, capsys, "/undo")
    told(talk, capsys, "/undo 2")
    assert talk.session.messages == []
    assert "nothing was asked yet" in told(talk, capsys, "/undo 9")[1]


def test_saved_and_loaded_conversations_are_the_same(
    talk: Conversation, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    told(talk, capsys, "/system Be kind.", "One?", f"/save {tmp_path / 'a.jsonl'}")
    before = talk.all_messages()
    told(talk, capsys, "/new", "/system clear", f"/load {tmp_path / 'a.jsonl'}")
    assert talk.all_messages() == before == [
        said("system", "Be kind."), said("user", "One?"), said("assistant", "ok"),
    ]  # fmt: skip
    record = json.loads((tmp_path / "a.jsonl").read_text())
    assert record["model"] == "m"
    assert record["params"]["temperature"] == 0.7
    told(talk, capsys, f"/export {tmp_path / 'a.md'}", f"/export {tmp_path / 'all.jsonl'}")
    told(talk, capsys, f"/export {tmp_path / 'all.jsonl'}")
    assert (tmp_path / "a.md").read_text() == (
        "**system**\n\nBe kind.\n\n**user**\n\nOne?\n\n**assistant**\n\nok\n"
    )
    assert len((tmp_path / "all.jsonl").read_text().splitlines()) == 2
    assert "there is no file name" in told(talk, capsys, "/save")[1]
    assert "there is no such transcript" in told(talk, capsys, "/load gone.jsonl")[1]


def test_the_context_is_pictured_and_what_is_forgotten_is_told_once(
    talk: Conversation, capsys: pytest.CaptureFixture[str]
) -> None:
    out = told(talk, capsys, "/tokens")[1]
    assert "of 4,096 tokens: ▓ system" in out
    first = told(talk, capsys, "/memory 2", "One?", "Two?")[1]
    assert first.count("the model sees the last 2 messages, and no longer the first 2") == 1
    assert "no longer" not in told(talk, capsys, "Three?")[1]
    talk.session.model.trained_context_length = 40
    assert "longer than the 40 tokens that the model was trained on" in told(talk, capsys, "4?")[1]
    assert "trained on 40" in told(talk, capsys, "/tokens")[1]


@pytest.mark.parametrize(
    ("system", "history", "filled"), [(0, 0, 0), (50, 25, 30), (100, 100, 40), (0, 1000, 40)]
)
def test_the_picture_of_the_context_is_forty_cells(system: int, history: int, filled: int) -> None:
    from nope_gpt.chat.session import Window

    text = commands.meter(Window(system, history, 100, 3, 0), None)
    bar = text.split(" ")[0]
    assert len(bar) == 40
    assert len(bar) - bar.count("░") == filled


def test_a_tool_is_shown_and_run_only_if_the_user_agrees(
    talk: Conversation, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = load_tools(["examples"])
    talk.session.tools = tools
    talk.session.messages = [said("user", "6*7?"), said("assistant", CALL)]
    (call,) = talk.session.calls()
    monkeypatch.setattr("builtins.input", lambda _: "n")
    assert json.loads(talk.result_of(call)) == {"error": "the user did not allow it"}
    monkeypatch.setattr("builtins.input", lambda _: "y")
    assert json.loads(talk.result_of(call)) == {"result": 42}
    talk.change(yes_tools=True)
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("asked"))
    assert json.loads(talk.result_of(call)) == {"result": 42}
    assert "tool: calculate(expression='6*7')" in capsys.readouterr().err
    assert "calculate" in told(talk, capsys, "/tools")[1]


def test_a_model_that_cannot_be_loaded_is_told_when_it_is_needed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def opener(_config: ChatConfig, _tell: object) -> ChatSession:
        raise MissingError("there is no such model")

    broken = Conversation(ChatConfig(model="gone"), opener)
    assert "there is no such model" in told(broken, capsys, "Hi.")[1]


def test_memory_stays_flat_over_two_hundred_turns() -> None:
    chat = session(context_length=400)
    sizes = []
    for number in range(200):
        say(chat, f"Question {number}?")
        assert chat.cache
        sizes.append(chat.cache.num_allocated)
    assert len(set(sizes[20:])) == 1


def test_loading_is_a_bar_below_the_prompt() -> None:
    begun, end = threading.Event(), threading.Event()

    def opener(config: ChatConfig, tell: Any) -> ChatSession:
        tell(0.5)
        begun.set()
        end.wait(30)
        return ChatSession(speaker("ok"), TOKENIZER, config)

    talk = Conversation(ChatConfig(), opener)
    begun.wait(30)
    assert talk.toolbar() == f" loading {'█' * 12}{'░' * 12} 50%, type on"
    end.set()
    assert talk.session
    assert talk.toolbar() is None


def test_loading_tells_every_share_up_to_all_of_it(tmp_path: Path) -> None:
    speaker("ok").save_pretrained(tmp_path)
    shares: list[float] = []
    storage.load(tmp_path, shares.append)
    assert shares == sorted(shares)
    assert 0 < shares[0] < 0.9 < shares[-1] <= 1
