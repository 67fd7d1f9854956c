"""Two tools to begin with: `nope chat --tools examples`."""

from __future__ import annotations

import ast
import datetime
import operator
from collections.abc import Callable
from typing import Any

OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}


def calculate(expression: str) -> float:
    """Compute an expression of numbers, such as (2 + 3) * 4 ** 2.

    Args:
        expression: With + - * / // % ** and brackets.
    """
    result: float = _value(ast.parse(expression, mode="eval").body)
    return result


def clock() -> str:
    """Tell the date and the time here."""
    return datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")


def _value(node: ast.expr) -> Any:
    """The value of a part of an expression; nothing but arithmetic is carried out."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value
    if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_value(node.operand))
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError(f"this is no arithmetic: {ast.unparse(node)}")
