"""Functions for a model: described, asked for, run apart, and every fault told as a message."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_export import SPECIAL

from nope_gpt.chat.tools import Call, calls_in, carry_out, load_tools, schema_of, told
from nope_gpt.errors import MissingError, UsageError
from nope_gpt.export.chat_template import jinja

FAULTY = '''
import os
import sys
import time
from typing import Literal


def shout(text: str, times: int = 1, mark: Literal["!", "?"] = "!") -> str:
    """Say it loudly."""
    print("this is for people")
    return text.upper() + mark * times


def fail(reason: str) -> None:
    """Fail."""
    raise RuntimeError(reason)


def sleep(seconds: float) -> None:
    """Take long."""
    time.sleep(seconds)


def huge(size: int) -> str:
    """Say much."""
    return "x" * size


def leave() -> None:
    """End the process."""
    os._exit(7)


def strange() -> object:
    """Return what JSON has not."""
    return {"path": sys.path.__class__, "set": [1, None, 2.5, "ü"]}


def _hidden() -> None:
    raise AssertionError
'''


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(FAULTY, encoding="utf-8")
    return tmp_path / "mine.py"


def run(file: Path, name: str, limit: float = 10.0, **arguments: Any) -> dict[str, Any]:
    tools = load_tools([str(file)])
    (call,) = calls_in(
        f"<tool_call>{json.dumps([{'name': name, 'arguments': arguments}])}</tool_call>", tools
    )
    found: dict[str, Any] = json.loads(carry_out(call, tools, limit))
    return found


def test_a_function_is_described_by_its_signature_and_docstring(file: Path) -> None:
    tools = load_tools([str(file)])
    assert list(tools) == ["shout", "fail", "sleep", "huge", "leave", "strange"]
    assert tools["shout"].schema == {
        "name": "shout",
        "description": "Say it loudly.",
        "parameters": {
            "type": "object",
            "properties": {
                "text": {"type": "string"},
                "times": {"type": "integer"},
                "mark": {"enum": ["!", "?"]},
            },
            "required": ["text"],
        },
    }


def test_a_call_is_run_and_its_result_is_json(file: Path) -> None:
    assert run(file, "shout", text="hallo ü", times=2) == {"result": "HALLO Ü!!"}
    assert run(file, "strange")["result"]["set"] == [1, None, 2.5, "ü"]


def test_the_examples_compute_and_tell_the_time() -> None:
    tools = load_tools(["examples"])
    assert list(tools) == ["calculate", "clock"]
    found = carry_out(Call("calculate", {"expression": "(2 + 3) * 4 ** 2 - -1"}), tools)
    assert json.loads(found) == {"result": 81}
    found = json.loads(carry_out(Call("calculate", {"expression": "__import__('os')"}), tools))
    assert found == {"error": "ValueError: this is no arithmetic: __import__('os')"}
    assert json.loads(carry_out(Call("clock", {}), tools))["result"].startswith("20")


def test_every_fault_of_a_tool_is_told_to_the_model(file: Path) -> None:
    assert run(file, "fail", reason="no luck") == {"error": "RuntimeError: no luck"}
    assert run(file, "leave") == {"error": "it ended with 7"}
    begun = time.monotonic()
    assert run(file, "sleep", 0.5, seconds_=1) == {"error": "sleep: no parameter seconds_"}
    assert run(file, "shout", text="a", loud=1) == {"error": "shout: no parameter loud"}
    assert run(file, "sleep", 1.0, seconds=60.0) == {"error": "sleep took more than 1 seconds"}
    assert time.monotonic() - begun < 20
    assert run(file, "shout") == {"error": "shout: the argument text is missing"}
    told_of = run(file, "nothing")["error"]
    assert told_of.startswith("there is no function nothing; there are: shout, fail")
    found = run(file, "huge", size=100_000)
    assert len(found["result"]) == 4000
    assert found["left_out"] == "96,000 characters"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("<tool_call>{</tool_call>", "the call is not JSON"),
        ("<tool_call>[1]</tool_call>", "a call must have a name and arguments"),
        ('<tool_call>{"name": 3}</tool_call>', "a call must have a name and arguments"),
        (
            '<tool_call>{"name": "a", "arguments": "x"}</tool_call>',
            "must have a name and arguments",
        ),
        ('<tool_call>{"name": "a"}</tool_call>', "there is no function a; there are: none"),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", "the call is not JSON"),
    ],
)
def test_what_is_no_call_has_its_fault(text: str, fault: str) -> None:
    (call,) = calls_in(text, {})
    assert fault in call.fault
    assert fault in json.loads(carry_out(call, {}))["error"]


def test_arguments_may_be_json_within_json(file: Path) -> None:
    tools = load_tools([str(file)])
    text = json.dumps({"name": "huge", "arguments": json.dumps({"size": 3})})
    (call,) = calls_in(f"<tool_call>{text}</tool_call>", tools)
    assert (str(call), call.fault) == ("huge(size=3)", "")


def test_several_calls_are_found_in_order_and_text_around_them_is_none(file: Path) -> None:
    tools = load_tools([str(file)])
    text = (
        'Let me see. <tool_call>[{"name": "leave"}, {"name": "huge", "arguments": {"size": 1}}]'
        '</tool_call> and <tool_call>{"name": "fail", "arguments": {"reason": "é"}}</tool_call>'
    )
    assert [str(call) for call in calls_in(text, tools)] == [
        "leave()", "huge(size=1)", "fail(reason='é')",
    ]  # fmt: skip
    assert calls_in("<tool_call>not closed", tools) == calls_in("", tools) == []


@given(st.text())
def test_no_text_breaks_the_reading_of_calls(text: str) -> None:
    for call in calls_in(f"<tool_call>{text}</tool_call>{text}", {}):
        assert call.fault


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def f(x): 'd'", "the parameter x of the tool f needs a type that JSON has"),
        ("def f(x: bytes): 'd'", "the parameter x of the tool f needs a type that JSON has"),
        ("def f(x: int): pass", "the tool f has no docstring"),
        ("def f(*x: int): 'd'", "the tool f takes any number of arguments"),
        ("x = 1", "this file defines no function"),
        ("raise ValueError('no')", "this file of tools cannot be run: ValueError: no"),
        ("def (", "this file of tools cannot be run: SyntaxError"),
    ],
)
def test_a_file_that_cannot_serve_is_refused(tmp_path: Path, code: str, message: str) -> None:
    (tmp_path / "t.py").write_text(code)
    with pytest.raises(UsageError, match=message):
        load_tools([str(tmp_path / "t.py")])


def test_a_file_that_is_not_there_and_two_of_a_name_are_refused(file: Path) -> None:
    with pytest.raises(MissingError, match="no such file of tools"):
        load_tools(["gone.py"])
    with pytest.raises(UsageError, match="two tools named shout"):
        load_tools([str(file), str(file)])


def test_optional_and_nested_types_are_told() -> None:
    def f(a: int | None, b: list[str], c: dict[str, int] | None = None) -> None:
        """Do."""

    parameters = schema_of(f, "here")["parameters"]
    assert parameters["properties"] == {
        "a": {"type": "integer"},
        "b": {"type": "array", "items": {"type": "string"}},
        "c": {"type": "object"},
    }
    assert parameters["required"] == ["a", "b"]


@pytest.mark.parametrize("system", ["Be brief.", ""])
def test_the_system_message_with_tools_is_that_of_the_exported_template(system: str) -> None:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    tools = load_tools(["examples"])
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": "Hi."})
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    schemas = [{"type": "function", "function": tool.schema} for tool in tools.values()]
    text = environment.from_string(jinja(SPECIAL)).render(messages=messages, tools=schemas)
    expected = f"<|im_start|>system\n{told(tools, system)}\n<|im_end|>\n<|im_start|>user\n"
    assert text.startswith(expected)
    assert told({}, system) == system
