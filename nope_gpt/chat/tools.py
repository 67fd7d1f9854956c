"""Functions that a model may ask for: told to it as JSON, called for it in a process of their own.

A file of functions is the user's own code, named on the command line; nothing else is ever run. A
call runs in a process that a time limit ends, and what it returns becomes text.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import subprocess
import sys
import types
import typing
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nope_gpt.errors import MissingError, UsageError
from nope_gpt.files.json_files import parse_json

EXAMPLES = Path(__file__).with_name("example_tools.py")
"""A calculator and a clock."""

TIME_LIMIT = 10.0
"""Seconds of a call."""

LONGEST_RESULT = 4000
"""Characters of a result that the model is told."""

CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)

JSON_TYPES: dict[Any, str] = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    list: "array",
    dict: "object",
}

Json = dict[str, Any]


@dataclass(frozen=True)
class Tool:
    """A function that a model may ask for.

    Attributes:
        name: Of it.
        file: That defines it.
        schema: What the model is told: `name`, `description` and `parameters`, a JSON schema.
    """

    name: str
    file: Path
    schema: Json


@dataclass(frozen=True)
class Call:
    """What a model asked for.

    Attributes:
        name: Of a tool.
        arguments: By name.
        fault: Why it cannot be carried out; empty if it can.
    """

    name: str
    arguments: Json
    fault: str = ""

    def __str__(self) -> str:
        """As one would type it."""
        listing = ", ".join(f"{name}={value!r}" for name, value in self.arguments.items())
        return f"{self.name}({listing})"


def load_tools(files: Sequence[str]) -> dict[str, Tool]:
    """The public functions of some files, by name.

    Args:
        files: Paths, or "examples" for a calculator and a clock.

    Raises:
        MissingError: There is no such file.
        UsageError: One cannot be run, or a function cannot be described or is there twice.
    """
    tools: dict[str, Tool] = {}
    for name in files:
        path = EXAMPLES if name == "examples" else Path(name).expanduser().absolute()
        for function in functions_of(path):
            if function.__name__ in tools:
                raise UsageError(f"there are two tools named {function.__name__}", where=str(path))
            schema = schema_of(function, str(path))
            tools[function.__name__] = Tool(function.__name__, path, schema)
    return tools


def functions_of(path: Path) -> list[Callable[..., Any]]:
    """Run a file, and give the functions that it defines, but those named with an underscore.

    Raises:
        MissingError: There is no such file.
        UsageError: It cannot be run, or defines none.
    """
    if not path.is_file():
        raise MissingError(
            "there is no such file of tools", where=str(path), hint="--tools examples, or FILE.py"
        )
    spec = importlib.util.spec_from_file_location(f"tools_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UsageError("this is not a file of Python functions", where=str(path))
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UsageError(
            f"this file of tools cannot be run: {type(error).__name__}: {error}", where=str(path)
        ) from None
    found: list[Callable[..., Any]] = [
        value
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and name[0] != "_"
    ]
    if not found:
        raise UsageError("this file defines no function", where=str(path))
    return found


def schema_of(function: Callable[..., Any], where: str) -> Json:
    """Describe a function by its signature and its docstring.

    Raises:
        UsageError: It has no docstring, or a parameter without a type that JSON has.
    """
    name = function.__name__
    text = inspect.getdoc(function)
    if not text:
        raise UsageError(f"the tool {name} has no docstring to tell the model of it", where=where)
    hints = typing.get_type_hints(function)
    properties: Json = {}
    required = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise UsageError(f"the tool {name} takes any number of arguments", where=where)
        try:
            properties[parameter.name] = type_schema(hints[parameter.name])
        except (KeyError, TypeError):
            raise UsageError(
                f"the parameter {parameter.name} of the tool {name} needs a type that JSON has",
                where=where,
                hint="str, int, float, bool, list, dict, a Literal, or one of these | None",
            ) from None
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    parameters = {"type": "object", "properties": properties, "required": required}
    return {"name": name, "description": text, "parameters": parameters}


def type_schema(hint: Any) -> Json:
    """The JSON schema of a type.

    Raises:
        TypeError: JSON has no such type.
    """
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return {"enum": list(inner)}
    if origin in (typing.Union, types.UnionType):
        plain = [part for part in inner if part is not types.NoneType]
        if len(plain) == 1:
            return type_schema(plain[0])
    if origin is list:
        return {"type": "array", "items": type_schema(inner[0])}
    kind = JSON_TYPES.get(origin or hint)
    if kind is None:
        raise TypeError(f"JSON has no {hint}")
    return {"type": kind}


def told(tools: dict[str, Tool], system_message: str) -> str:
    """A system message that tells a model of tools; the exported template writes the same."""
    if not tools:
        return system_message
    listing = ", ".join(json.dumps(tool.schema, ensure_ascii=False) for tool in tools.values())
    before = f"{system_message}\n\n" if system_message else ""
    return (
        f"{before}You can call these functions:\n<tools>[{listing}]</tools>\n"
        'To call some, answer with\n<tool_call>[{"name": "NAME", "arguments": {}}]</tool_call>'
    )


def calls_in(text: str, tools: dict[str, Tool]) -> list[Call]:
    """What an answer asks for; what cannot be carried out has its fault."""
    calls: list[Call] = []
    for match in CALL.finditer(text):
        try:
            wanted = parse_json(match[1])
        except (ValueError, RecursionError) as error:
            calls.append(Call("?", {}, f"the call is not JSON: {error}"))
            continue
        calls += [
            call_of(item, tools) for item in (wanted if isinstance(wanted, list) else [wanted])
        ]
    return calls


def call_of(item: Any, tools: dict[str, Tool]) -> Call:
    """A call, and what is wrong with it."""
    name = item.get("name") if isinstance(item, dict) else None
    arguments = item.get("arguments", {}) if isinstance(item, dict) else None
    if isinstance(arguments, str):  # JSON within JSON, as OpenAI's interface has it.
        with suppress(ValueError, RecursionError):
            arguments = parse_json(arguments)
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return Call("?", {}, "a call must have a name and arguments")
    if name not in tools:
        known = ", ".join(tools) or "none"
        return Call(name, arguments, f"there is no function {name}; there are: {known}")
    parameters = tools[name].schema["parameters"]
    unknown = sorted(arguments.keys() - parameters["properties"].keys())
    missing = [key for key in parameters["required"] if key not in arguments]
    if unknown or missing:
        what = f"no parameter {unknown[0]}" if unknown else f"the argument {missing[0]} is missing"
        return Call(name, arguments, f"{name}: {what}")
    return Call(name, arguments)


def carry_out(call: Call, tools: dict[str, Tool], seconds: float = TIME_LIMIT) -> str:
    """Run a call in a process of its own; a fault becomes the result.

    Args:
        call: What the model asked for.
        tools: By name.
        seconds: After which the process is ended.

    Returns:
        What to tell the model, as JSON: `result`, or `error`.
    """
    if call.fault:
        return in_json("error", call.fault)
    request = json.dumps({"file": str(tools[call.name].file), "name": call.name})
    try:
        done = subprocess.run(  # noqa: S603
            [sys.executable, "-m", "nope_gpt.chat.tools", request],
            input=json.dumps(call.arguments),
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return in_json("error", f"{call.name} took more than {seconds:g} seconds")
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
        return in_json("error", reason)
    try:
        return in_json("result", json.loads(done.stdout))
    except (ValueError, RecursionError):  # It wrote there past Python's own streams.
        return in_json("error", f"{call.name} gave no result")


def in_json(kind: str, value: Any) -> str:
    """A result as JSON, shortened if it is too long to be told."""
    text = json.dumps({kind: value}, ensure_ascii=False)
    if len(text) <= LONGEST_RESULT:
        return text
    whole = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    left_out = len(whole) - LONGEST_RESULT
    return json.dumps(
        {kind: whole[:LONGEST_RESULT], "left_out": f"{left_out:,} characters"}, ensure_ascii=False
    )


def serve(request: Json) -> None:
    """Run one function: its arguments come from standard input, its result goes to standard output.

    What it prints goes to standard error.
    """
    with redirect_stdout(sys.stderr):
        by_name = {function.__name__: function for function in functions_of(Path(request["file"]))}
        result = by_name[request["name"]](**json.load(sys.stdin))
        text = json.dumps(result, ensure_ascii=False, default=str)
    sys.stdout.write(text)


if __name__ == "__main__":
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    serve(json.loads(sys.argv[1]))
