"""The house keeps its shape: imports point one way, and starting is cheap."""

from __future__ import annotations

import ast
import pkgutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import pytest

import nope_gpt

PACKAGE = Path(nope_gpt.__file__).parent

FLOORS = [
    {"errors", "signals"},
    {"memory", "amounts"},
    {"files"},
    {"config"},
    {"network", "sizing"},
    {"device", "hub"},
    {"tokenization"},
    {"data", "generation"},
    {"model"},
    {"adaptation", "chat"},
    {"evaluation"},
    {"export", "training"},
    {"diagnosis", "inspection"},
    {"cli"},
]
"""Each room may import those on lower floors, and its own."""

FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}


MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def run(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a syntax tree that are run, without what only a type checker reads."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield node
            yield from run(node)


def imports_of(module: str, nodes: Callable[[ast.AST], Iterator[ast.AST]]) -> set[str]:
    """The modules of the package that one imports, wherever in the nodes of its tree."""
    found = set()
    for node in nodes(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                named = f"{node.module}.{alias.name}"
                found.add(named if named in MODULES else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return (found & MODULES.keys()) - {module}


def room_of(module: str) -> str:
    return module.split(".")[1]


def test_imports_point_one_way() -> None:
    rooms = set()
    for module in MODULES.keys() - {"nope_gpt"}:
        rooms.add(room_of(module))
        for name in imports_of(module, ast.walk) - {"nope_gpt"}:
            own, other = room_of(module), room_of(name)
            assert own == other or FLOOR_OF[other] < FLOOR_OF[own], f"{module} imports {name}"
    assert not imports_of("nope_gpt", ast.walk)
    assert rooms == FLOOR_OF.keys()


def test_no_imports_go_in_a_circle() -> None:
    waiting = {module: imports_of(module, run) for module in MODULES}
    while free := {module for module, needs in waiting.items() if not needs & waiting.keys()}:
        waiting = {module: needs for module, needs in waiting.items() if module not in free}
    assert not waiting


def test_only_the_command_line_knows_a_terminal() -> None:
    for path in PACKAGE.rglob("*.py"):
        if "cli" not in path.relative_to(PACKAGE).parts:
            for library in ("typer", "rich", "prompt_toolkit", "click"):
                text = path.read_text(encoding="utf-8")
                assert f"import {library}" not in text, path
                assert f"from {library}" not in text, path


def test_every_module_imports() -> None:
    for module in pkgutil.walk_packages(nope_gpt.__path__, "nope_gpt."):
        if not module.name.endswith("__main__"):
            import_module(module.name)


@pytest.mark.parametrize("name", ["cli", "config", "sizing"])
def test_the_command_line_the_config_and_the_calculator_start_without_torch(name: str) -> None:
    code = f"import sys, nope_gpt.{name}; print({{'torch', 'numpy'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("arguments", [["--help"], ["size", "--memory", "24GB"]])
def test_help_and_size_answer_in_under_three_tenths_of_a_second(arguments: list[str]) -> None:
    # Processor time, the best of several: the clock on the wall also counts the neighbours.
    resource = pytest.importorskip("resource")
    spent = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-m", "nope_gpt.cli", *arguments], capture_output=True, check=True
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(spent) < 0.3
